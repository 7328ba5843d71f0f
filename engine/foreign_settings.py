"""What LLM2Vec's and sentence-transformers' folders say of how texts become vectors, in our terms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from bivec.engine.json_files import read_json
from bivec.engine.text_format import SLOT
from bivec.models.errors import ConfigError

MODULES_FILE = "modules.json"
LENGTH_FILE, PROMPTS_FILE = "sentence_bert_config.json", "config_sentence_transformers.json"
POOLING_PATTERN = "*_Pooling/config.json"
WEIGHTS_PATTERN = "*_WordWeights/*"
LONGEST_PATH = 1000  # no file system takes much more
UNLIMITED = 10**6  # transformers writes 1e30 as the length of a tokenizer that has none
# their names, with "pooling_mode_" before them as flags or alone in one field -> ours
FOREIGN_POOLINGS = {
    "mean_tokens": "mean",
    "mean": "mean",
    "weightedmean_tokens": "weighted_mean",
    "weightedmean": "weighted_mean",
    "lasttoken": "last_token",
    "cls_token": "bos_token",
    "cls": "bos_token",
}
SIMILARITIES = {"cosine": "cosine", "dot": "dot", "dot_product": "dot"}
# the modules that we can stand for, in their only order
TRANSFORMER, WEIGHTS, POOLING, NORMALIZE = "Transformer", "WordWeights", "Pooling", "Normalize"
ORDER = (TRANSFORMER, WEIGHTS, POOLING, NORMALIZE)


def read_llm2vec(file: Path) -> dict[str, Any]:
    """Fields of EncoderConfig by an llm2vec_config.json.

    Where LLM2Vec skips the instruction it skips BOS too; else its mean runs over the whole row (METHOD 5.4).
    """
    stored = read_json(file, dict)
    skip = stored.get("skip_instruction", True)
    if not isinstance(skip, bool):
        raise ConfigError(f"{file}: skip_instruction is {repr(skip)[:80]}, expected true or false")
    settings = {"pool_bos": not skip, "skip_instruction": skip}
    settings |= {"pooling": stored["pooling_mode"]} if "pooling_mode" in stored else {}
    return settings | ({"max_length": stored["max_length"]} if "max_length" in stored else {})


def read_sentence_transformers(file: Path) -> dict[str, Any]:
    """Fields of EncoderConfig by a modules.json and the files that it names.

    Raises:
        ConfigError: modules that are not sentence-transformers' own, or that we have nothing for; damaged files.
    """
    modules = module_folders(file)
    settings: dict[str, Any] = {"normalize": NORMALIZE in modules}
    if POOLING in modules:
        settings |= _pooling(modules[POOLING] / "config.json")
    if WEIGHTS in modules:
        if settings.get("pooling", "mean") != "mean":
            raise ConfigError(f"{file}: {WEIGHTS} is supported before a mean only, not before {settings['pooling']!r}")
        settings["pool_bos"] = _prefix_counts(modules[WEIGHTS], modules.get(TRANSFORMER, file.parent))
    prompts_file = file.parent / PROMPTS_FILE
    prompts = read_json(prompts_file, dict) if prompts_file.is_file() else {}
    settings |= _prompt_settings(prompts_file, prompts, settings)
    similarity = prompts.get("similarity_fn_name")
    similarity = "cosine" if similarity is None else similarity
    if not isinstance(similarity, str):
        raise ConfigError(f"{prompts_file}: similarity_fn_name is {repr(similarity)[:80]}, expected a string")
    if similarity in SIMILARITIES:  # others are no matter of the vectors
        settings["similarity"] = SIMILARITIES[similarity]
    return settings | _stored_length(modules.get(TRANSFORMER, file.parent))


def _prompt_settings(prompts_file: Path, prompts: dict[str, Any], settings: dict[str, Any]) -> dict[str, str]:
    """The template that a default prompt is.

    Args:
        prompts_file: for errors.
        prompts: its content.
        settings: what the modules say.
    """
    named, default = prompts.get("prompts") or {}, prompts.get("default_prompt_name")
    if not isinstance(named, dict) or not isinstance(default, (str, type(None))):
        raise ConfigError(
            f"{prompts_file}: prompts and default_prompt_name are {repr(named)[:80]} and {repr(default)[:80]}, "
            "expected an object of strings and the name of one, or null"
        )
    if default is not None and default not in named:
        raise ConfigError(
            f"{prompts_file}: default_prompt_name is {default[:80]!r}, which prompts does not have; add it there, or "
            "set it to null"
        )
    head = None if default is None else named[default]
    if not isinstance(head, (str, type(None))):
        raise ConfigError(f"{prompts_file}: the prompt {str(default)[:80]!r} is {repr(head)[:80]}, expected a string")
    if (
        settings.get("skip_instruction")
        and settings["pooling"] in ("weighted_mean", "bos_token")
        and any(named.values())
    ):
        raise ConfigError(
            f"{prompts_file}: has prompts that the pooling {settings['pooling']!r} leaves out (include_prompt is "
            "false), from where on sentence-transformers counts differently; remove the prompts there"
        )
    return {"template": f"{head}{SLOT}"} if head else {}  # put before every text


def module_folders(file: Path) -> dict[str, Path]:
    """The modules that a modules.json names, by kind, and their folders.

    Raises:
        ConfigError: a module of another library (code of the checkpoint, which is not run), one that is not supported,
            an order that is not ours, or a folder outside the checkpoint.
    """
    kinds: dict[str, Path] = {}
    for module in read_json(file, list):
        path, kind = (module.get("path"), module.get("type")) if isinstance(module, dict) else (None, None)
        if not isinstance(path, str) or not isinstance(kind, str):
            raise ConfigError(f"{file}: every module needs a type and a path, found {repr(module)[:80]}")
        library, _, _ = kind.partition(".")
        name = kind.rpartition(".")[2]
        if library != "sentence_transformers":
            raise ConfigError(
                f"{file}: module {kind!r} is code of the checkpoint, which bivec never runs; the vectors would differ"
            )
        if name not in ORDER or name in kinds or any(ORDER.index(name) < ORDER.index(other) for other in kinds):
            raise ConfigError(
                f"{file}: module {name!r} is not supported there; bivec has a decoder, a pooling and unit vectors: "
                f"{', '.join(ORDER)}, each at most once and in this order"
            )
        kinds[name] = _inside(file, path)
    return kinds


def _inside(file: Path, path: str) -> Path:
    folder = file.parent / path
    if "\0" in path or len(path) > LONGEST_PATH:
        raise ConfigError(f"{file}: the path {path[:80]!r} can be none")
    if not folder.resolve().is_relative_to(file.parent.resolve()):
        raise ConfigError(f"{file}: the path {path!r} leads out of {file.parent}; nothing there is read")
    return folder


def _pooling(file: Path) -> dict[str, Any]:
    pooling, prefix = read_json(file, dict), "pooling_mode_"
    modes = [key.removeprefix(prefix) for key, value in pooling.items() if key.startswith(prefix) and value is True]
    for key, value in pooling.items():
        if (key.startswith(prefix) or key == "include_prompt") and not isinstance(value, bool):
            raise ConfigError(f"{file}: {key} is {repr(value)[:80]}, expected true or false")
    modes = modes or [str(pooling.get("pooling_mode"))]
    if len(modes) != 1 or modes[0] not in FOREIGN_POOLINGS:
        raise ConfigError(f"{file}: pooling {' + '.join(modes)} is not supported")
    return {"pooling": FOREIGN_POOLINGS[modes[0]], "skip_instruction": not pooling.get("include_prompt", True)}


def _prefix_counts(folder: Path, tokenizer: Path) -> bool:
    """False: the weights leave out exactly the special tokens in front of a text, as our own export has it.

    Raises:
        ConfigError: any other weights.
    """
    from bivec.engine.tokenizer import load_tokenizer, prefix_ids

    file = folder / "model.safetensors"
    try:
        weights = load_file(file)["emb_layer.weight"]
    except (OSError, SafetensorError, KeyError) as error:
        raise ConfigError(f"{file}: no weights of a {WEIGHTS} module ({error}); pickles are not read") from None
    backend = load_tokenizer(tokenizer, add_bos=False)
    tokens = 1 + max(backend.get_vocab().values(), default=-1)
    if not weights.is_floating_point() or weights.shape[1:] != (1,) or len(weights) < tokens:
        raise ConfigError(
            f"{file}: emb_layer.weight is {str(weights.dtype).removeprefix('torch.')} {list(weights.shape)}, expected "
            f"floating point [{tokens} or more, 1]: one weight for every token of the tokenizer"
        )
    weights = weights.flatten()
    if bool((weights == 1).all()):
        return True
    zeros = set((weights == 0).nonzero().flatten().tolist())
    others = int(((weights != 0) & (weights != 1)).sum())
    prefix = set(prefix_ids(backend))
    if others or zeros != prefix:
        raise ConfigError(
            f"{file}: weighs {others or len(zeros)} tokens in a way that bivec has nothing for: only the special "
            f"tokens in front of a text can be left out (ids {sorted(prefix)})"
        )
    return False


def _stored_length(folder: Path) -> dict[str, int | float]:
    """``max_length``, if the folder says it: from version 6 on it is the tokenizer's."""
    own = read_json(folder / LENGTH_FILE, dict) if (folder / LENGTH_FILE).is_file() else {}
    lower = own.get("do_lower_case")
    if not isinstance(lower, (bool, type(None))):
        raise ConfigError(f"{folder / LENGTH_FILE}: do_lower_case is {repr(lower)[:80]}, expected true or false")
    if lower:
        raise ConfigError(
            f"{folder / LENGTH_FILE}: do_lower_case is true, which bivec does not do; set it to false there and lower "
            "the case of the texts before you give them"
        )
    file = folder / "tokenizer_config.json"
    tokenizer = read_json(file, dict, allow_nan=True) if file.is_file() else {}
    if tokenizer.get("truncation_side") == "left":
        raise ConfigError(
            f"{file}: truncation_side is 'left': a long text would lose its beginning, in bivec it loses its end; "
            "write 'right' there if no text is longer than the model takes"
        )
    if (length := own.get("max_seq_length")) is not None:
        if type(length) is not int:
            raise ConfigError(f"{folder / LENGTH_FILE}: max_seq_length is {repr(length)[:80]}, expected an integer")
        return {"max_length": length}
    length = tokenizer.get("model_max_length")
    if isinstance(length, bool) or not isinstance(length, (int, float, type(None))):
        raise ConfigError(f"{file}: model_max_length is {repr(length)[:80]}, expected a number of tokens")
    return {"max_length": length} if length is not None and length < UNLIMITED else {}
