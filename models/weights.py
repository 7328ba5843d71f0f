"""Checkpoints in and out: safetensors directories, GGUF files and hub ids to packed models, and back to a directory.

Loading streams: the model is made on the ``meta`` device and every tensor is read from the memory-mapped file, cast,
moved to its device and put in place before the next one is touched, so the peak is the weights plus one shard. Nothing
is ever unpickled.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bivec.models import gguf
from bivec.models.config import DecoderConfig
from bivec.models.errors import CheckpointError, ConfigError
from bivec.models.families import MODEL_CLASSES
from bivec.models.files import atomic_directory
from bivec.models.llama import Llama
from bivec.models.shards import INDEX_FILE, WEIGHTS_FILE, read_stored, some_of, stored_tensors

CONFIG_FILE = "config.json"
HEAD_NAME, EMBEDDING_NAME = "lm_head.weight", "embed_tokens.weight"
TOKENIZER_PATTERNS = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*")
# by name, since some repositories carry the weights twice (consolidated.safetensors next to the shards)
MODEL_PATTERNS = (CONFIG_FILE, WEIGHTS_FILE, INDEX_FILE, "model-*-of-*.safetensors")
MAX_SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class Checkpoint:
    """What ``load_pretrained`` gives."""

    model: Llama  # or a subclass; parameters on the device, in the dtype asked for
    lm_head_weight: Tensor | None  # [vocab_size, hidden_size]; the embedding parameter itself when tied; None: no head
    tokenizer_path: Path  # what engine.tokenizer.load_tokenizer takes: the directory or the .gguf file
    config: DecoderConfig


def load_pretrained(
    path_or_hub_id: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
) -> Checkpoint:
    """Loads a decoder of one of the families (``models/families.py``).

    Args:
        path_or_hub_id: a directory with config.json and safetensors (one file or shards; CausalLM or trunk-only names),
            a .gguf file, or a hub id such as ``"mistralai/Mistral-7B-Instruct-v0.2"``.
        dtype: of the parameters; by default float32 on a CPU and the checkpoint's own elsewhere (bfloat16 for GGUF).
        device: where the parameters go; the CPU by default.

    Returns:
        Checkpoint(model, lm_head_weight, tokenizer_path, config); the model is in evaluation mode.

    Raises:
        CheckpointError: nothing loadable is there, or a tensor is missing, unexpected, of another shape or cut off.
        ConfigError: an architecture or a setting that our models do not support.
    """
    device = torch.device(device or "cpu")
    path = resolve_checkpoint(path_or_hub_id)
    opened = _open(path)
    target_dtype = _target_dtype(dtype, device, opened.stored_dtype)
    tied = opened.config.tie_word_embeddings
    head = _fill(opened.model, opened.tensors, target_dtype, device, tied=tied, source=path)
    return Checkpoint(opened.model.eval(), head, path, opened.config)


def inspect_checkpoint(path: Path) -> tuple[DecoderConfig, bool]:
    """Checks a checkpoint by its headers alone: every tensor there, whole, of the right shape. Reads no weights.

    Args:
        path: a local directory or ``.gguf`` file (see ``resolve_checkpoint``).

    Returns:
        The configuration, and whether there is an LM head (its own or the tied embedding).

    Raises:
        CheckpointError, ConfigError: as ``load_pretrained``.
    """
    opened = _open(path)
    return opened.config, opened.config.tie_word_embeddings or opened.has_head


@dataclass(frozen=True)
class _Opened:
    """A checkpoint whose headers have been read and checked."""

    config: DecoderConfig
    model: Llama  # on the meta device
    tensors: Iterator[tuple[str, Tensor]]  # reads the weights when it is consumed
    stored_dtype: str
    has_head: bool


def _open(path: Path) -> _Opened:
    if path.is_file():
        header = gguf.read_header(path)
        config = gguf.decoder_config(header)
        shapes = {name: tensor.shape for name, tensor in gguf.named_tensors(header).items()}
        files = dict.fromkeys(shapes, str(path))
        tensors, stored_dtype = gguf.read_tensors(header, config), "bfloat16"
    else:
        config = DecoderConfig.from_pretrained(path)
        entries = stored_tensors(path)
        shapes = {name: entry.shape for name, entry in entries.items()}
        files = {name: str(entry.file) for name, entry in entries.items()}
        tensors = read_stored(entries)
        stored_dtype = entries[EMBEDDING_NAME].dtype if EMBEDDING_NAME in entries else "float32"
    if config.num_layers > len(shapes):  # before so many are made
        raise CheckpointError(
            f"{path}: {len(shapes)} tensors, of a model of {config.num_layers} layers; the checkpoint is incomplete, "
            "or its configuration is another model's"
        )
    model = _meta_model(config)
    _check_tensors(model, config, shapes, files)
    return _Opened(config, model, tensors, stored_dtype, HEAD_NAME in shapes)


def resolve_checkpoint(
    path_or_hub_id: str | Path, patterns: Sequence[str] = (*MODEL_PATTERNS, *TOKENIZER_PATTERNS)
) -> Path:
    """The local directory or .gguf file behind a path or a hub id; a hub id is downloaded (only files that match).

    Args:
        path_or_hub_id: a directory, a .gguf file, or ``owner/name`` on the Hugging Face hub.
        patterns: the files to download of a hub repository.

    Raises:
        CheckpointError: nothing is there, and it is no hub id or the hub does not give it.
    """
    path = Path(path_or_hub_id).expanduser()
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if path.is_file():
        raise CheckpointError(f"{path} is a file; give the directory that holds config.json, or a .gguf file")
    name = str(path_or_hub_id)
    if name.startswith((".", "/", "~", "\\")) or name.count("/") != 1 or path.suffix == ".gguf":
        raise CheckpointError(f"{name}: no such directory or .gguf file, and it is not a hub id of the form owner/name")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise CheckpointError(
            f"{name}: no such directory, and a hub id needs the package huggingface_hub: pip install huggingface_hub"
        ) from None
    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except Exception as error:  # hub, HTTP, proxy and cache errors share no base class
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(
            f"{name}: there is no local directory of this name, and the hub does not give the repository "
            f"({type(error).__name__}: {reason}); check the name and the network, accept the licence of a gated "
            f"model and run `hf auth login`, or give a local directory with {CONFIG_FILE} and {WEIGHTS_FILE}"
        ) from error


class _NoInitialisation(TorchFunctionMode):
    """Skips ``torch.nn.init``: on meta tensors it would only import torch's decompositions (2.4 s and 150 MB)."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def _meta_model(config: DecoderConfig) -> Llama:
    with torch.device("meta"), _NoInitialisation():
        return MODEL_CLASSES[config.model_type](config)


def _check_tensors(
    model: Llama, config: DecoderConfig, shapes: dict[str, tuple[int, ...]], files: dict[str, str]
) -> None:
    """Compares the checkpoint's tensors with the model's before anything is read."""
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    accepted = {**expected, HEAD_NAME: expected[EMBEDDING_NAME]}
    source = ", ".join(sorted(set(files.values()))) or "the checkpoint"
    missing = [name for name in expected if name not in shapes]
    if missing:
        raise CheckpointError(
            f"{source}: {len(missing)} of {len(expected)} tensors are missing: {some_of(missing)}; the checkpoint is "
            f"incomplete, or config.json describes another model ({config.model_type}, {config.num_layers} layers)"
        )
    unexpected = [name for name in shapes if name not in accepted]
    if unexpected:
        raise CheckpointError(
            f"{files[unexpected[0]]}: {len(unexpected)} unexpected tensors: {some_of(unexpected)}; the checkpoint is "
            f"no plain {config.model_type} model of {config.num_layers} layers (an adapter must be merged first)"
        )
    for name, shape in shapes.items():
        if tuple(shape) != accepted[name]:
            raise CheckpointError(
                f"{files[name]}: tensor {name} has shape {list(shape)}, config.json asks for {list(accepted[name])}"
            )


def named_dtype(name: str | torch.dtype) -> torch.dtype:
    """The dtype of weights of this name, "bfloat16" or "torch.bfloat16"; a dtype is taken as it is.

    Raises:
        ConfigError: torch has none, or one of integers.
    """
    dtype = getattr(torch, name.removeprefix("torch."), None) if isinstance(name, str) else name
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ConfigError(f"dtype {name}: no floating-point dtype of torch; expected float32, bfloat16 or float16")
    return dtype


def _target_dtype(asked: torch.dtype | str | None, device: torch.device, stored: str) -> torch.dtype:
    if asked is None:
        # bf16 matrix products on a CPU without AMX run at a hundredth of fp32's speed
        asked = "float32" if device.type == "cpu" else stored
    return named_dtype(asked)


def _fill(
    model: Llama,
    tensors: Iterator[tuple[str, Tensor]],
    dtype: torch.dtype,
    device: torch.device,
    *,
    tied: bool,
    source: Path,
) -> Tensor | None:
    """Puts every tensor in its place and returns the head."""
    head: Tensor | None = None
    for name, stored in tensors:
        # copy: a view of the mapped file would die with it, and follow whatever is later written there
        tensor = stored.to(device=device, dtype=dtype, copy=True)
        if name == HEAD_NAME:
            head = tensor
        else:
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor))
    embedding = model.get_parameter(EMBEDDING_NAME)
    if not tied:
        return head
    if head is not None and not torch.equal(head, embedding):
        raise CheckpointError(
            f"{source}: config.json says tie_word_embeddings, but {HEAD_NAME} differs from the embedding; "
            "set tie_word_embeddings to false there if the head is meant to be its own"
        )
    return embedding


def save_pretrained(
    model: Llama,
    path: str | Path,
    *,
    is_causal: bool,
    lm_head_weight: Tensor | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes a directory that ``transformers.AutoModel`` loads with no custom code.

    Everything is written under a temporary name and renamed when complete. Where ``path`` already holds files, those of
    ours replace their namesakes, weight files of an earlier save go, and all others stay.

    Args:
        model: a Llama, or of another family, whose adapters, if any, are merged.
        path: the directory to write.
        is_causal: what config.json says; False makes transformers (5.2 and later) attend in both directions.
        lm_head_weight: [vocab_size, hidden_size]; when given, the directory holds the whole causal language model
            (``LlamaForCausalLM``), else the trunk (``LlamaModel``). The embedding parameter itself means tied.
        max_shard_bytes: size above which the weights are split over several files with an index.

    Raises:
        CheckpointError: parameters that do not belong to the architecture (an adapter not merged), the disk is too
            full, or ``path`` is a file.
    """
    path = Path(path)
    tensors, config = _tensors_to_save(model, is_causal, lm_head_weight)
    size = sum(tensor.nbytes for tensor in tensors.values())
    with atomic_directory(path, stale=MODEL_PATTERNS, last=CONFIG_FILE) as temporary:
        free = shutil.disk_usage(temporary).free
        if free < size:
            raise CheckpointError(
                f"{path}: the disk is too full; the model takes {size / 1e9:.2f} GB and {free / 1e9:.2f} GB are free; "
                "nothing was changed. Free some space or choose another directory"
            )
        _write_weights(temporary, tensors, max_shard_bytes)
        (temporary / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _tensors_to_save(model: Llama, is_causal: bool, head: Tensor | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors under the names that transformers expects, and the content of config.json."""
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    expected = {name for name, _ in _meta_model(model.config).named_parameters()}
    foreign = sorted(expected.symmetric_difference(tensors))
    if foreign:
        raise CheckpointError(
            f"cannot save: the model's parameters are not those of a plain {model.config.model_type} model "
            f"({some_of(foreign)}); merge the adapter first"
        )
    embedding = model.get_parameter(EMBEDDING_NAME)
    tied = model.config.tie_word_embeddings if head is None else head is embedding
    family = model.config.family
    if head is not None:
        tensors = {f"model.{name}": tensor for name, tensor in tensors.items()}
        if not tied:
            tensors[HEAD_NAME] = head.detach()
    config = replace(
        model.config,
        is_causal=is_causal,
        tie_word_embeddings=tied,
        dtype=str(embedding.dtype).removeprefix("torch."),
    ).to_dict()
    return tensors, {**config, "architectures": [family.trunk if head is None else family.causal_lm]}


def _write_weights(folder: Path, tensors: dict[str, Tensor], max_shard_bytes: int) -> None:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, tensor in tensors.items():
        if shards[-1] and filled + tensor.nbytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += tensor.nbytes
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file = WEIGHTS_FILE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: tensors[name].cpu().contiguous() for name in names}, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(names, file))
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
            "weight_map": weight_map,
        }
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
