"""Weights, configurations, GGUF files and tokenizers: how they are read, and their oracles."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import oracles
import samples
import torch
from harness import refused_or
from oracles import Unreadable, differing, digest, same_value, strict_json

# ---- weights


def weights_of(checkpoint: Any) -> dict[str, tuple]:
    found = {name: digest(parameter) for name, parameter in checkpoint.model.named_parameters()}
    head = checkpoint.lm_head_weight
    return found if head is None else found | {"lm_head.weight": digest(head)}


def read_weights(folder: Path) -> Any:
    from bivec.models import PackedBatch, load_pretrained

    loaded = load_pretrained(folder)
    with torch.no_grad():
        loaded.model(PackedBatch.from_sequences([[0, 5, 7][: loaded.config.max_position_embeddings], [1]]))
    return {"weights": weights_of(loaded), "config": loaded.config.to_dict()}


@refused_or
def check_weights(source: Path, case: Path, name: str, valid: Any, found: Any) -> str | None:
    """Tensors: those of a strict reading of the files. Configuration: what config.json says, field by field."""
    index = case / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(strict_json(index.read_bytes())["weight_map"].values()))
        if any(Path(one).name != one for one in names):
            return f"a shard outside of the folder was read: {names}"
        files = [case / one for one in names]
    else:
        files = [case / "model.safetensors"]
    expected = oracles.trunk_weights(files)
    if "lm_head.weight" not in found["weights"]:
        expected.pop("lm_head.weight", None)
    return differing(expected, found["weights"]) or config_says(case / "config.json", found["config"])


def config_says(file: Path, found: dict[str, Any]) -> str | None:
    """Every field that the file has, and that we have too, is as it says."""
    content = strict_json(file.read_bytes(), nan=True)
    family, extended = content["model_type"], content.get("rope_scaling") or content.get("rope_parameters")
    for key, value in found.items():
        said = content.get("dtype", content.get("torch_dtype")) if key == "torch_dtype" else content.get(key)
        if said is None or key in ("rope_scaling", "hidden_act", "hidden_activation", "layer_types"):
            continue  # names of one thing, and what is stated in two places
        if key == "rope_theta" and extended:
            continue
        if key in ("sliding_window", "use_sliding_window", "is_causal") and (
            family in ("qwen2", "qwen3", "smollm3", "gemma3_text")  # a second field says whether, or how, it counts
        ):
            continue
        if key == "no_rope_layers":  # the first are as many as the layers
            said = said[: len(value)]
        if isinstance(value, float) and type(said) is int:
            said = float(said)  # may round
        if not same_value(said, value):
            return f"{file.name}: {key} is {str(said)[:80]}, {str(value)[:80]} was read"
    if extended and found["rope_scaling"]:
        for key, value in found["rope_scaling"].items():
            inner, outer = extended.get(key), content.get(key)
            if key != "rope_type" and value not in (inner, outer):
                return f"{file.name}: {key} of the scaling is {str(inner)[:80]}, {str(value)[:80]} was read"
    return None


def read_families(folder: Path) -> Any:
    from bivec.models import DecoderConfig

    return {path.name: DecoderConfig.from_pretrained(path).to_dict() for path in sorted(folder.iterdir())}


@refused_or
def check_families(source: Path, case: Path, name: str, valid: Any, found: Any) -> str | None:
    """The family whose file was mutated: what it says. All others: as before."""
    family = Path(name).parts[0]
    others = differing({k: v for k, v in valid.items() if k != family}, {k: v for k, v in found.items() if k != family})
    return others or config_says(case / name, found[family])


def read_gguf(folder: Path) -> Any:
    from bivec.engine.encoder import Encoder

    encoder = Encoder.from_pretrained(folder / "model.gguf")
    vectors = encoder.encode(list(samples.TEXTS[:2]), show_progress_bar=False)
    return {
        "weights": {name: digest(parameter) for name, parameter in encoder.model.named_parameters()},
        "config": encoder.model.config.to_dict(),
        "tokens": encoder.tokenizer(list(samples.TEXTS))["input_ids"],
        "settings": asdict(encoder.config),
        "prompts": encoder.prompts,
        "origin": encoder.origin.to_dict(),
        "vectors": vectors.tobytes(),
    }


GGUF_NUMBERS = {  # ours, by the key behind the architecture
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "intermediate_size": "feed_forward_length",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
    "sliding_window": "attention.sliding_window",
}
GGUF_PARTS = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@refused_or
def check_gguf(source: Path, case: Path, name: str, valid: Any, found: Any) -> str | None:
    """What ``gguf.GGUFReader`` finds in the file: numbers, the scaling of RoPE, every matrix, settings and tokens."""
    fields, tensors = oracles.gguf_file(case / name)
    config, family = found["config"], fields["general.architecture"]
    for ours, theirs in GGUF_NUMBERS.items():
        said = fields.get(f"{family}.{theirs}")
        if said is not None and np.float32(config.get(ours) or 0) != np.float32(said):
            return f"{ours} is {config.get(ours)}, the file says {said}"
    for ours in ("bos_token_id", "eos_token_id"):
        said = fields.get(f"tokenizer.ggml.{ours}")
        if said is not None and config[ours] != said:
            return f"{ours} is {config[ours]}, the file says {said}"
    if complaint := scaling_says(fields, f"{family}.", config.get("rope_scaling")):
        return complaint
    expected = {}
    for theirs, values in tensors.items():
        *block, part, kind = theirs.split(".")
        matrix = np.ascontiguousarray(values)
        if family == "llama" and part in ("attn_q", "attn_k"):  # llama.cpp pairs neighbouring rows
            heads = config["num_attention_heads" if part == "attn_q" else "num_key_value_heads"]
            split = [half for head in np.split(values, heads) for half in (head[0::2], head[1::2])]
            matrix = np.concatenate(split)
        ours = ".".join([*(["layers", *block[1:]] if block else []), GGUF_PARTS.get(part, part), kind])
        expected[ours] = digest(torch.from_numpy(matrix))
    expected.pop("output.weight", None)  # the encoder has no head
    return differing(expected, found["weights"]) or gguf_says(fields, found)


NEUTRAL = {"attn_factor": 1, "yarn_attn_factor": 1, "yarn_ext_factor": 1, "yarn_log_multiplier": 0, "alpha": 0}


def scaling_says(fields: dict[str, Any], prefix: str, found: dict[str, Any] | None) -> str | None:
    """Of RoPE: llama.cpp takes a factor without a type for a linear one, and reads the older name of a factor too."""
    at = f"{prefix}rope.scaling."
    factor = fields.get(at + "factor", fields.get(f"{prefix}rope.scale_linear"))
    kind = fields.get(at + "type", "linear" if factor is not None else "none")
    have, said = found or {"rope_type": "none"}, {"rope_type": kind}
    if kind != "none":
        said["factor"] = factor
    if kind == "yarn":
        whole = fields[f"{prefix}context_length"]
        said["original_max_position_embeddings"] = fields.get(at + "original_context_length", whole)
        said |= {key: fields[f"{at}yarn_{key}"] for key in ("beta_fast", "beta_slow") if f"{at}yarn_{key}" in fields}
    same = have["rope_type"] == kind and have.keys() == said.keys()
    numbers = [(have[key], said[key]) for key in said if key != "rope_type"] if same else []
    if not same or any(np.float32(one) != np.float32(other) for one, other in numbers):
        return f"the scaling is {found}, the file says {said}"
    odd = [key for key, neutral in NEUTRAL.items() if fields.get(at + key, neutral) != neutral]
    return f"{odd} of the scaling were not heeded" if odd else None


DEFAULTS = {  # of an encoder
    "pooling": "mean",
    "pool_bos": True,
    "causal": False,
    "max_length": 512,
    "template": None,
    "skip_instruction": True,
    "pool_tail": True,
    "normalize": False,
    "similarity": "cosine",
}


def settings_say(expected: dict[str, Any], found: dict[str, Any], positions: int = 1024) -> str | None:
    """Every setting as the files say it, a length bounded by the decoder's positions."""
    expected = expected | {"max_length": min(expected["max_length"], positions)}
    for key, value in found.items():
        if not same_value(expected[key], value):
            return f"{key} is {value!r}, the files say {str(expected[key])[:80]!r}"
    return None


NO_ORIGIN = {"base_model": None, "adapters": []}
POOLING_TYPES = {1: "mean", 2: "bos_token", 3: "last_token"}  # llama.cpp's


def gguf_says(fields: dict[str, Any], found: dict[str, Any]) -> str | None:
    """Settings, prompts and origin: our own keys, else llama.cpp's. Tokens: see ``oracles.byte_level_ids``."""
    family = fields["general.architecture"]
    kind = POOLING_TYPES.get(fields.get(f"{family}.pooling_type"))
    own, causal = fields.get("bivec.encoder"), fields.get(f"{family}.attention.causal")
    if own is not None:
        said = strict_json(own.encode())
    elif kind is not None:
        said = {"pooling": kind, "causal": True if causal is None else causal}
    else:
        said = {"pooling": "mean", "causal": bool(causal)}
    if complaint := settings_say(DEFAULTS | said, found["settings"], fields[f"{family}.context_length"]):
        return complaint
    for key, nothing in (("prompts", {}), ("origin", NO_ORIGIN)):
        stored = fields.get(f"bivec.{key}")
        stored = nothing if stored is None else strict_json(stored.encode())
        if stored != found[key]:
            return f"{key}: {str(found[key])[:80]}, the file says {str(stored)[:80]}"
    tokens = oracles.byte_level_ids(fields, samples.TEXTS, bos=None if own or kind else True)
    return None if tokens == found["tokens"] else f"ids {str(found['tokens'])[:90]}, the file gives {str(tokens)[:90]}"


# ---- tokenizers


def read_tokenizer(folder: Path) -> Any:
    from bivec.engine.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(folder, add_bos=False)
    load_tokenizer(folder)
    encoded = tokenizer(list(samples.TEXTS))["input_ids"]
    return {"ids": encoded, "special": tokenizer.special_tokens_map, "length": tokenizer.model_max_length}


@refused_or
def check_tokenizer(source: Path, case: Path, name: str, valid: Any, found: Any) -> str | None:
    """tokenizer.json: the ids that the ``tokenizers`` library gives. Its neighbours change no ids."""
    from tokenizers import Tokenizer

    try:
        raw = Tokenizer.from_str((case / "tokenizer.json").read_bytes().decode("utf-8"))
    except BaseException as error:
        raise Unreadable(f"tokenizers: {error}") from None
    rules = json.loads((case / "tokenizer.json").read_bytes())
    added = [token for token in rules.get("added_tokens") or () if token["content"]]
    ids = set(dict(rules["model"]["vocab"]).items()) | {(token["content"], token["id"]) for token in added}
    if len({number for _, number in ids}) < len(ids):
        raise Unreadable("two tokens have one id")
    for token in added:
        if raw.token_to_id(token["content"]) != token["id"]:
            raise Unreadable(f"{str(token)[:80]} has another id in tokenizers")
    raw.no_truncation()
    raw.no_padding()
    ids = [raw.encode(text).ids for text in samples.TEXTS]
    return None if ids == found["ids"] else f"ids {str(found['ids'])[:100]}, tokenizers gives {str(ids)[:100]}"


PROBES = (*samples.TEXTS, "[INST] x [/INST]", "a\tb\nc  d", "Ünïcödé ½ ﬁ", "the " * 30)


def read_sentencepiece(folder: Path) -> Any:
    from bivec.engine.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(folder, add_bos=False)
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in PROBES]


@refused_or
def check_sentencepiece(source: Path, case: Path, name: str, valid: Any, found: Any) -> str | None:
    """The ids that SentencePiece itself gives."""
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor()
    processor.Load(str(case / name))
    ids = [processor.encode(text) for text in PROBES]
    return None if ids == found else f"ids {str(found)[:100]}, SentencePiece gives {str(ids)[:100]}"
