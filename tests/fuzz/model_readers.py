"""Weights, configurations, encoders' settings, adapters and tokenizers: how they are read, and their oracles."""

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
    """What ``gguf.GGUFReader`` finds in the file: numbers, the scaling of RoPE, and every matrix."""
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
    if complaint := scaling_says(fields, f"{family}.rope.", config.get("rope_scaling")):
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
    words = fields["tokenizer.ggml.tokens"]
    if len(set(words)) < len(words):
        return "a token is in the vocabulary twice"
    return differing(expected, found["weights"])


def scaling_says(fields: dict[str, Any], prefix: str, found: dict[str, Any] | None) -> str | None:
    """Of RoPE: llama.cpp takes a factor without a type for a linear one, and reads the older name of a factor too."""
    factor = fields.get(f"{prefix}scaling.factor", fields.get(f"{prefix}scale_linear"))
    kind = fields.get(f"{prefix}scaling.type", "linear" if factor is not None else "none")
    have = {"rope_type": "none"} if found is None else found
    same = have["rope_type"] == kind and (kind == "none" or np.float32(have["factor"]) == np.float32(factor))
    return None if same else f"the scaling is {found}, the file says {kind!r} by {factor}"


# ---- encoders


def read_encoder(folder: Path) -> Any:
    from bivec.engine.encoder import Encoder

    encoder = Encoder.from_pretrained(folder)
    return {
        "settings": asdict(encoder.config),
        "prompts": encoder.prompts,
        "origin": encoder.origin.to_dict(),
        "tokens": encoder.tokenizer(list(samples.TEXTS))["input_ids"],
        "vectors": encoder.encode(list(samples.TEXTS[:3]), show_progress_bar=False).tobytes(),
    }


BOOL, NUMBER, TEXT = (bool,), (int,), (str, type(None))
OWN_TYPES = {
    "pooling": (str,),
    "pool_bos": BOOL,
    "causal": BOOL,
    "max_length": NUMBER,
    "template": TEXT,
    "skip_instruction": BOOL,
    "pool_tail": BOOL,
    "normalize": BOOL,
    "similarity": (str,),
    "bos_token": TEXT,
}


def typed(content: Any, types: dict[str, tuple], where: str) -> str | None:
    """Whether what is there is of its type: true is no number, "false" no truth value."""
    for key, value in content.items() if isinstance(content, dict) else ():
        if key in types and type(value) not in types[key]:
            return f"{where}: {key} = {str(value)[:60]!r} was accepted"
    return None


@refused_or
def check_own(source: Path, case: Path, name: str, valid: Any, found: Any) -> str | None:
    """bivec_config.json: its fields, typed, are the encoder's; nothing of the tokens changes."""
    if not (case / name).is_file():
        return None  # a folder of sentence-transformers then
    if name == "tokenizer.json":
        return check_tokenizer(source, case, name, None, {"ids": found["tokens"]})
    content = strict_json((case / name).read_bytes())
    complaint = typed(content, OWN_TYPES, name)
    length = content.get("max_length")
    content |= {"max_length": min(length, 1024)} if type(length) is int else {}  # the decoder's positions
    for key, value in found["settings"].items():
        if key in content and content[key] is not None and not same_value(content[key], value) and key != "template":
            complaint = complaint or f"{key} is {value!r}, the file says {str(content[key])[:60]!r}"
    if found["prompts"] != content.get("prompts", {}) and content.get("prompts") is not None:
        complaint = complaint or "the prompts are not those of the file"
    if content.get("origin") is not None and not same_value(
        found["origin"]["base_model"], content["origin"]["base_model"]
    ):
        complaint = complaint or f"the origin is {found['origin']!r}, the file says {str(content['origin'])[:80]}"
    return complaint or settled(valid, found)


FOREIGN_TYPES = {
    "max_seq_length": (int, type(None)),
    "do_lower_case": (bool, type(None)),
    "include_prompt": BOOL,
    "default_prompt_name": TEXT,
    "similarity_fn_name": TEXT,
    "path": (str,),
    "type": (str,),
    "pooling_mode": (str,),
    "max_length": NUMBER,
    "skip_instruction": BOOL,
    "model_max_length": (int, float, type(None)),
    **{f"pooling_mode_{kind}": BOOL for kind in ("cls_token", "mean_tokens", "max_tokens", "lasttoken")},
}


@refused_or
def check_foreign(source: Path, case: Path, name: str, valid: Any, found: Any) -> str | None:
    """The files of others: every field that we read is of its type, and a length that is said is the encoder's."""
    if not (case / name).is_file():
        return None  # none of these files must be there
    if name == "adapter_model.safetensors":
        return check_adapter(source, case, name, None, found["adapter"])
    if name.endswith(".safetensors"):
        return check_word_weights(case / name, found)
    # the tokenizer's other settings are transformers' matter
    content = strict_json((case / name).read_bytes(), nan=name == "tokenizer_config.json")
    for part in content if isinstance(content, list) else [content]:
        if complaint := typed(part, FOREIGN_TYPES, name):
            return complaint
    if isinstance(content, dict):
        for key in ("max_seq_length", "max_length"):
            if (
                key in content
                and content[key] is not None
                and found["settings"]["max_length"] != min(content[key], 1024)
            ):
                return f"max_length is {found['settings']['max_length']}, the file says {content[key]}"
    return check_adapter(source, case, name, None, found["adapter"]) if "adapter" in found else settled(valid, found)


def check_word_weights(file: Path, found: dict[str, Any]) -> str | None:
    """Every token counts, or every one but the BOS: else there is nothing of ours that the weights could be."""
    stored = oracles.safetensors(file.read_bytes())
    if len(stored) != 1:
        return f"{len(stored)} tensors were taken for the weights of words"
    (weights,) = (tensor.to(torch.float32).flatten() for tensor in stored.values())
    expected = torch.ones_like(weights)
    if not found["settings"]["pool_bos"]:
        expected[found["tokens"][0][0]] = 0.0
    same = torch.equal(weights, expected)
    return None if same else "the weights of words are neither all 1 nor 0 for the BOS alone"


def settled(valid: Any, found: Any) -> str | None:
    """The same settings and tokens give the same vectors, whatever else a file says."""
    same = all(found[key] == valid[key] for key in ("settings", "tokens"))
    return "same settings and tokens, other vectors" if same and found["vectors"] != valid["vectors"] else None


def read_llm2vec(folder: Path) -> Any:
    config = folder / "adapter_config.json"
    text = config.read_text(encoding="utf-8", errors="surrogateescape") if config.is_file() else ""
    if '"base"' in text:  # the name of the folder beside it
        config.write_text(
            text.replace('"base"', json.dumps(str(folder / "base"))), encoding="utf-8", errors="surrogateescape"
        )
    return read_encoder(folder) | {"adapter": read_adapter(folder)}


def read_adapter(folder: Path) -> Any:
    from bivec.engine.lora import read_adapter

    config, tensors = read_adapter(folder)
    return asdict(config), {name: digest(tensor) for name, tensor in tensors.items()}


@refused_or
def check_adapter(source: Path, case: Path, name: str, valid: Any, found: Any) -> str | None:
    """Settings: what adapter_config.json says. Matrices: a strict reading of the file."""
    config, tensors = found
    content = strict_json((case / "adapter_config.json").read_bytes(), nan=True)
    for key, ours in (("r", "rank"), ("lora_alpha", "alpha"), ("lora_dropout", "dropout")):
        if content.get(key) is not None and not same_value(content[key], config[ours]):
            return f"{key} is {str(content[key])[:60]}, {config[ours]} was read"
    if not same_value(sorted(content["target_modules"]), list(config["targets"])):
        return f"targets are {config['targets']}, the file says {str(content['target_modules'])[:80]}"
    stored = oracles.safetensors((case / "adapter_model.safetensors").read_bytes())
    if any(tensor is None for tensor in stored.values()):
        return "a matrix that is not of floating point was accepted"
    strip = {
        name.removeprefix("base_model.model.").removeprefix("model."): digest(tensor) for name, tensor in stored.items()
    }
    return differing(strip, tensors)


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
