"""Encoders' folders, ours and others', and adapters: how they are read, and their oracles."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import oracles
import samples
from harness import refused_or
from model_readers import DEFAULTS, NO_ORIGIN, check_tokenizer, settings_say
from oracles import differing, digest, same_value, strict_json


def described(encoder: Any) -> dict[str, Any]:
    """What an encoder has taken from its files, and what it does."""
    return {
        "settings": asdict(encoder.config),
        "prompts": encoder.prompts,
        "origin": encoder.origin.to_dict(),
        "tokens": encoder.tokenizer(list(samples.TEXTS))["input_ids"],
        "vectors": encoder.encode(list(samples.TEXTS[:3]), show_progress_bar=False).tobytes(),
    }


def read_encoder(folder: Path) -> Any:
    from bivec.engine.encoder import Encoder

    return described(Encoder.from_pretrained(folder))


def settled(valid: Any, found: Any) -> str | None:
    """The same settings and tokens give the same vectors, whatever else a file says."""
    same = all(found[key] == valid[key] for key in ("settings", "tokens"))
    return "same settings and tokens, other vectors" if same and found["vectors"] != valid["vectors"] else None


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


# ---- our own file


@refused_or
def check_own(source: Path, case: Path, name: str, valid: Any, found: Any) -> str | None:
    """bivec_config.json: its fields, typed, are the encoder's; nothing of the tokens changes."""
    if not (case / name).is_file():
        return None  # a folder of sentence-transformers then
    complaint = check_tokenizer(source, case, name, None, {"ids": found["tokens"]})
    if name == "tokenizer.json":
        return complaint
    content = strict_json((case / name).read_bytes())
    if complaint := complaint or typed(content, OWN_TYPES, name):
        return complaint
    said = DEFAULTS | {key: value for key, value in content.items() if key in DEFAULTS}
    if said["template"] is not None and "{text}" not in said["template"]:
        said["template"] = found["settings"]["template"]  # the short name of one
        if "{text}" not in (said["template"] or "{text}"):  # "none" is one too
            return f"a template without a text was accepted: {said['template'][:80]}"
    others = strict_json((case / "config_sentence_transformers.json").read_bytes())
    prompts = others["prompts"] if content.get("prompts") is None else content["prompts"]
    if not same_value(prompts, found["prompts"]):
        return f"the prompts are {str(found['prompts'])[:80]}, the file says {str(prompts)[:80]}"
    origin = NO_ORIGIN if content.get("origin") is None else content["origin"]
    origin = origin | {"base_model": origin["base_model"] or case.name}  # by the folder's name then
    if any(not same_value(found["origin"][key], origin[key]) for key in NO_ORIGIN):
        return f"the origin is {found['origin']!r}, the file says {str(origin)[:80]}"
    return settings_say(said, found["settings"]) or settled(valid, found)


# ---- others' files

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
MODES = {  # as flags behind "pooling_mode_", and in one field
    "mean_tokens": "mean",
    "mean": "mean",
    "weightedmean_tokens": "weighted_mean",
    "weightedmean": "weighted_mean",
    "lasttoken": "last_token",
    "cls_token": "bos_token",
    "cls": "bos_token",
}


@refused_or
def check_foreign(source: Path, case: Path, name: str, valid: Any, found: Any) -> str | None:
    """The files of others: what we read is of its type, and the encoder is what they say."""
    if not (case / name).is_file():
        return None  # none of these files must be there
    if name.startswith("adapter"):
        return check_adapter(source, case, name, None, found["adapter"]) or check_merged(case, found)
    if not name.endswith(".safetensors"):
        # the tokenizer's other settings are transformers' matter
        content = strict_json((case / name).read_bytes(), nan=name == "tokenizer_config.json")
        for part in content if isinstance(content, list) else [content]:
            if complaint := typed(part, FOREIGN_TYPES, name):
                return complaint
    said = of_llm2vec if name == "llm2vec_config.json" else of_sentence_transformers
    try:
        expected, prompts = said(case)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        return f"{name} was accepted: {error!r}"
    if prompts != found["prompts"]:
        return f"the prompts are {str(found['prompts'])[:80]}, the files say {str(prompts)[:80]}"
    if complaint := settings_say(DEFAULTS | expected, found["settings"]):
        return complaint
    folder = case / "base" if (case / "base").is_dir() else case
    return check_tokenizer(source, folder, name, None, {"ids": found["tokens"]}) or settled(valid, found)


def of_llm2vec(case: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Where the instruction is left out, so is the BOS."""
    content = strict_json((case / "llm2vec_config.json").read_bytes())
    skip = content.get("skip_instruction", True)
    named = {"pooling_mode": "pooling", "max_length": "max_length"}
    settings = {ours: content[theirs] for theirs, ours in named.items() if theirs in content}
    return settings | {"skip_instruction": skip, "pool_bos": not skip}, {}


def of_sentence_transformers(case: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Settings and prompts by modules.json and what it names."""

    def file(path: Path, nan: bool = False) -> dict[str, Any]:
        return strict_json(path.read_bytes(), nan=nan) if path.is_file() else {}

    folders = {
        entry["type"].rpartition(".")[2]: case / entry["path"]
        for entry in strict_json((case / "modules.json").read_bytes())
    }
    settings: dict[str, Any] = {"normalize": "Normalize" in folders}
    if "Pooling" in folders:
        content = file(folders["Pooling"] / "config.json")
        flags = [key for key, value in content.items() if key.startswith("pooling_mode_") and value is True]
        (mode,) = [key.removeprefix("pooling_mode_") for key in flags] or [content["pooling_mode"]]
        settings |= {"pooling": MODES[mode], "skip_instruction": not content.get("include_prompt", True)}
    if "WordWeights" in folders:
        settings["pool_bos"] = weights_of_words(folders["WordWeights"] / "model.safetensors", case)
    stored = file(case / "config_sentence_transformers.json")
    prompts, default = stored.get("prompts") or {}, stored.get("default_prompt_name")
    head = None if default is None else prompts[default]
    settings["template"] = head + "{text}" if head else None
    settings["similarity"] = "dot" if stored.get("similarity_fn_name") in ("dot", "dot_product") else "cosine"
    trunk = folders.get("Transformer", case)
    length = file(trunk / "sentence_bert_config.json").get("max_seq_length")
    if length is None:
        length = file(trunk / "tokenizer_config.json", nan=True).get("model_max_length")
        length = None if length is None or length >= 1e6 else length  # transformers writes 1e30 for none
    return settings | ({} if length is None else {"max_length": length}), prompts


def weights_of_words(file: Path, case: Path) -> bool:
    """Whether every token counts; else every one but the BOS does. Nothing of ours could stand for other weights."""
    from tokenizers import Tokenizer

    raw = Tokenizer.from_file(str(case / "tokenizer.json"))
    weights = oracles.safetensors(file.read_bytes())["emb_layer.weight"]
    if weights is None or weights.shape[1:] != (1,) or len(weights) <= max(raw.get_vocab().values()):
        raise oracles.Unreadable("these are no weights of words, or fewer than tokens")
    (left_out, _) = (weights != 1).nonzero(as_tuple=True)
    if len(left_out) and (left_out.tolist() != raw.encode("").ids or weights[left_out] != 0):
        raise oracles.Unreadable("the weights are neither all 1 nor 0 for the BOS alone")
    return not len(left_out)


# ---- adapters


def read_llm2vec(folder: Path) -> Any:
    from bivec.engine.encoder import Encoder

    config = folder / "adapter_config.json"
    text = config.read_text(encoding="utf-8", errors="surrogateescape") if config.is_file() else ""
    if '"base"' in text:  # the name of the folder beside it
        config.write_text(
            text.replace('"base"', json.dumps(str(folder / "base"))), encoding="utf-8", errors="surrogateescape"
        )
    encoder = Encoder.from_pretrained(folder)
    merged = {name: parameter.detach().clone() for name, parameter in encoder.model.named_parameters()}
    return described(encoder) | {"adapter": read_adapter(folder), "merged": merged}


def check_merged(case: Path, found: Any) -> str | None:
    """Every matrix is W + alpha / r * B A, those without an adapter are W."""
    content = strict_json((case / "adapter_config.json").read_bytes(), nan=True)
    base = oracles.safetensors((case / "base" / "model.safetensors").read_bytes())
    expected = {name.removeprefix("model."): matrix.double() for name, matrix in base.items()}
    sizes = {name: matrix.abs() for name, matrix in expected.items()}  # of what is added up, which may cancel
    stored = oracles.safetensors((case / "adapter_model.safetensors").read_bytes())
    for name in stored:
        if name.endswith(".lora_A.weight"):
            down, up = (stored[one].double() for one in (name, name.replace("lora_A", "lora_B")))
            target = name.removeprefix("base_model.model.").removeprefix("model.").replace(".lora_A", "")
            expected[target] = expected[target] + up @ down * content["lora_alpha"] / content["r"]
            sizes[target] = sizes[target] + up.abs() @ down.abs() * abs(content["lora_alpha"]) / content["r"]
    for name, matrix in found["merged"].items():
        known = sizes[name] < 1e33  # else float32 may have become infinite on the way
        close = (matrix.double() - expected[name]).abs() <= 1e-5 * sizes[name] + 1e-7
        if not bool(close[known].all()):
            return f"{name} is not W + alpha / r * B A"
    return None


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
