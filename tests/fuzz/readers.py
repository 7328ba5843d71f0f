"""The readers under test: their valid files, how these are mutated and read, and what a value must agree with.

The oracle of each is said at its ``check``; none may take a value for right only because nothing was raised.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import mutants
import oracles
import samples
import torch
from oracles import Unreadable, differing, digest, same_value, strict_json

warnings.simplefilter("ignore")


@dataclass(frozen=True)
class Reader:
    """One kind of file, or of folder."""

    name: str
    build: Callable[[Path, Path], None]  # (empty folder, tiny decoder): writes the valid files
    files: dict[str, mutants.Mutation]  # which are mutated, and how
    read: Callable[[Path], Any]
    check: Callable[[Path, Path, str, Any, Any], str | None]  # valid folder, mutant's, file, both values -> complaint
    weights: dict[str, float] = field(default_factory=dict)  # how often a file is chosen; 1 where it is not there
    names_file: bool = True  # an error must name a place inside the mutant's folder
    mutated: list[bytes] = field(default_factory=list)  # the mutant at hand, for a reader that removes its file


def refused_or(check: Callable[..., str | None]) -> Callable[..., str | None]:
    """An oracle that cannot read the file says that nobody should."""

    def checked(source: Path, case: Path, name: str, valid: Any, found: Any) -> str | None:
        try:
            return check(source, case, name, valid, found)
        except Unreadable as error:
            return f"{name} was accepted: {error}"

    return checked


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
    aliases = {"torch_dtype": "dtype"}
    for key, value in found.items():
        said = content.get(aliases.get(key, key), content.get(key))
        if said is None or key in ("rope_theta", "rope_scaling", "sliding_window", "use_sliding_window", "layer_types"):
            continue
        if key in ("hidden_act", "hidden_activation", "no_rope_layers", "is_causal"):
            continue
        if isinstance(value, float) and type(said) is int:
            said = float(said)  # may round
        if not same_value(said, value):
            return f"{file.name}: {key} is {str(said)[:80]}, {str(value)[:80]} was read"
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


@refused_or
def check_gguf(source: Path, case: Path, name: str, valid: Any, found: Any) -> str | None:
    """What ``gguf.GGUFReader`` finds in the file; q and k are compared up to the order of their rows."""
    fields, tensors = oracles.gguf_file(case / name)
    said = {
        "hidden_size": "llama.embedding_length",
        "num_hidden_layers": "llama.block_count",
        "num_attention_heads": "llama.attention.head_count",
        "num_key_value_heads": "llama.attention.head_count_kv",
        "intermediate_size": "llama.feed_forward_length",
        "max_position_embeddings": "llama.context_length",
    }
    for ours, theirs in said.items():
        if theirs in fields and found["config"][ours] != fields[theirs]:
            return f"{ours} is {found['config'][ours]}, the file says {fields[theirs]}"
    for theirs, ours in (("token_embd.weight", "embed_tokens.weight"), ("output_norm.weight", "norm.weight")):
        if found["weights"][ours] != digest(torch.from_numpy(tensors[theirs])):
            return f"{ours} is not {theirs}"
    for layer in range(found["config"]["num_hidden_layers"]):
        for theirs, ours in (
            ("attn_q", "self_attn.q_proj"),
            ("attn_v", "self_attn.v_proj"),
            ("ffn_down", "mlp.down_proj"),
        ):
            want = torch.from_numpy(tensors[f"blk.{layer}.{theirs}.weight"])
            shape, raw = found["weights"][f"layers.{layer}.{ours}.weight"]
            have = torch.frombuffer(bytearray(raw), dtype=torch.float32).reshape(shape)
            if theirs == "attn_q":
                want, have = (values.nan_to_num(7e7).sort(0).values for values in (want, have))
            if digest(want) != digest(have):
                return f"layers.{layer}.{ours} is not {theirs}"
    words = fields["tokenizer.ggml.tokens"]
    if len(set(words)) < len(words):
        return "a token is in the vocabulary twice"
    return None


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
    if not name.endswith(".json"):
        return None if name.endswith(".safetensors") else "unknown file"
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
    return None if name.startswith("adapter") else settled(valid, found)


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
    return read_encoder(folder)


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


# ---- data


def each(read: Callable[[Path], Any], *names: str) -> Callable[[Path], dict[str, Any]]:
    """Reads every file of a folder, there or not."""
    return lambda folder: {name: read(folder / name) for name in names}


def read_texts(file: Path) -> list[str]:
    from bivec.engine.data import load_texts

    return list(load_texts(file, column=None if ".txt" in file.name else "text"))


def others_as_before(name: str, valid: dict, found: dict) -> str | None:
    return differing({k: v for k, v in valid.items() if k != name}, {k: v for k, v in found.items() if k != name})


def by_second_reading(read: Callable[[Path], Any]) -> Callable[..., str | None]:
    """The mutated file's value is that of another reading of it, the other files' that of the valid ones."""

    def check(source: Path, case: Path, name: str, valid: Any, found: Any) -> str | None:
        expected = read(case / name)
        if expected != found[name]:
            at = next(
                (i for i, pair in enumerate(zip(expected, found[name], strict=False)) if pair[0] != pair[1]), None
            )
            if at is None:
                return f"{name}: {len(found[name])} rows instead of {len(expected)}"
            return f"{name}, row {at}: {str(found[name][at])[:100]!r} instead of {str(expected[at])[:100]!r}"
        return others_as_before(name, valid, found)

    return refused_or(check)


def parquet_column(file: Path) -> list[str]:
    import pyarrow.parquet as pq

    try:
        return pq.read_table(file).column("text").to_pylist()
    except MemoryError:
        raise
    except Exception as error:
        raise Unreadable(f"pyarrow: {error!r}") from None


def second_csv(file: Path) -> list[str]:
    return oracles.csv_column(file, "\t" if ".tsv" in file.name else ",", "text")


def read_sts(file: Path) -> list[tuple]:
    from bivec.engine.data import load_sts

    return [(pair.sentence1, pair.sentence2, pair.score) for pair in load_sts(file)]


def second_sts(file: Path) -> list[tuple]:
    import csv
    import io

    delimiter = "\t" if ".tsv" in file.name else ","
    rows = [row for row in csv.reader(io.StringIO(oracles.text_of(file), newline=""), delimiter=delimiter) if row]
    order = (0, 1, 2)
    if {"sentence1", "sentence2", "score"} <= set(rows[0]):
        order = tuple(rows[0].index(column) for column in ("sentence1", "sentence2", "score"))
        width, rows = len(rows[0]), rows[1:]
        if any(len(row) != width for row in rows):
            raise Unreadable("a row of another width")
    try:
        return [(row[order[0]], row[order[1]], float(row[order[2]])) for row in rows]
    except ValueError as error:
        raise Unreadable(str(error)) from None


def read_triples(file: Path) -> list[dict]:
    from bivec.engine.triples import load_triples

    (strict,) = load_triples(file)
    (lenient,) = load_triples(file, on_bad_line="skip")
    if list(strict) != list(lenient):
        raise AssertionError("skipping bad lines changes good ones")
    return [asdict(triple) for triple in strict]


def second_triples(file: Path) -> list[dict]:
    rows = [strict_json(line.encode()) for line in oracles.text_of(file).split("\n") if line.strip()]
    return [expected_triple(row) for row in rows]


def expected_triple(row: dict) -> dict:
    several = row.get("negatives")
    negatives = [row["negative"]] if row.get("negative") is not None else several if several is not None else []
    ids = [row["negative_id"]] if row.get("negative_id") is not None else row.get("negative_ids")
    one = row.get("positive_id")
    return {
        "query": row["query"],
        "positive": row["positive"],
        "negatives": tuple(negatives),
        "instruction": (row.get("instruction") or "").strip(),
        "positive_id": None if one is None else str(one),
        "negative_ids": None if ids is None else tuple(map(str, ids)),
        "symmetric": bool(row.get("symmetric")),
    }


def second_triple_table(file: Path) -> list[dict]:
    import pyarrow.parquet as pq

    try:
        return [expected_triple(row) for row in pq.read_table(file).to_pylist()]
    except MemoryError:
        raise
    except Exception as error:
        raise Unreadable(f"pyarrow: {error!r}") from None


def read_entailment(file: Path) -> Any:
    from bivec.engine.entailment import entailment_triples

    return [[asdict(triple) for triple in part] for part in entailment_triples([file])]


@refused_or
def check_entailment(source: Path, case: Path, name: str, valid: Any, found: Any) -> str | None:
    """Every sentence of the outcome is a cell of the file; the other files as before."""
    if name.endswith(".jsonl"):
        rows = [strict_json(line.encode()) for line in oracles.text_of(case / name).split("\n") if line.strip()]
        cells = {value for row in rows for value in row.values() if isinstance(value, str)}
    else:
        import csv
        import io

        quoting = csv.QUOTE_NONE if name.endswith(".txt") else csv.QUOTE_MINIMAL
        delimiter = "\t" if name.endswith(".txt") else ","
        text = io.StringIO(oracles.text_of(case / name), newline="")
        cells = {cell for row in csv.reader(text, delimiter=delimiter, quoting=quoting) for cell in row}
    cells |= {cell.strip() for cell in cells}
    for part in found[name]:
        for triple in part:
            for text in (triple["query"], triple["positive"], *triple["negatives"]):
                if text not in cells:
                    return f"{name}: {text[:80]!r} is not in the file"
    return others_as_before(name, valid, found)


WORD_FILES = {"conll2003.txt": 4, "wnut17.conll": 2, "tree.conllu": 10, "tree.conllu.gz": 10}


def read_words(file: Path) -> Any:
    from bivec.engine.evaluation import word_data

    readers = {4: word_data.read_conll2003, 2: word_data.read_wnut17, 10: word_data.read_conllu}
    corpus = readers[WORD_FILES[file.name]](file)
    for task, rows in corpus.labels.items():
        if [len(row) for row in rows] != [len(sentence) for sentence in corpus.sentences]:
            raise AssertionError(f"{task}: not one label a word")
    return [
        list(zip(sentence, *(rows[i] for rows in corpus.labels.values()), strict=True))
        for i, sentence in enumerate(corpus.sentences)
    ]


@refused_or
def check_words(source: Path, case: Path, name: str, valid: Any, found: Any) -> str | None:
    """Words, and tags that are taken as they are (POS, UPOS), are the cells of the file."""
    width = WORD_FILES[name]
    word, tag = {4: (0, 1), 2: (0, None), 10: (1, 3)}[width]
    expected = oracles.columns_of(case / name, width)
    if [[row[0] for row in sentence] for sentence in found[name]] != [
        [row[word] for row in sentence] for sentence in expected
    ]:
        return f"{name}: other words than in the file"
    tags = [{row[tag] for row in sentence} for sentence in expected] if tag else []
    for sentence, known in zip(found[name], tags, strict=False):
        if not {row[1] if width == 4 else row[-2] for row in sentence} <= known:
            return f"{name}: a tag that is not in the file"
    return others_as_before(name, valid, found)


def read_settings(file: Path) -> Any:
    from bivec.engine.cli.config_file import read_config
    from bivec.engine.cli.convert import parse
    from bivec.engine.errors import RunError

    try:
        recipe, _, as_json = parse(["--config", str(file)])
    except SystemExit as error:  # argparse has said what is wrong
        raise RunError(f"{file}: usage, exit {error.code}") from None
    return read_config(file), asdict(recipe), as_json


@refused_or
def check_settings(source: Path, case: Path, name: str, valid: Any, found: Any) -> str | None:
    """The flat settings are those of PyYAML or of the json module; the recipe holds their seed and learning rate."""
    import yaml

    data = (case / name).read_bytes()
    try:
        content = strict_json(data) if name.endswith(".json") else yaml.safe_load(data.decode("utf-8"))
    except (yaml.YAMLError, ValueError) as error:
        raise Unreadable(str(error)) from None
    flat: dict[str, Any] = {}

    def walk(part: dict, prefix: str) -> None:
        for key, value in part.items():
            key = prefix + str(key).replace("-", "_")
            if isinstance(value, dict):
                walk(value, "" if key == "set" else key + ".")
            else:
                flat[key] = value

    walk(content or {}, "")
    settings, recipe, _ = found[name]
    if repr(settings) != repr(flat):
        return f"{name}: read as {str(settings)[:200]}, it says {str(flat)[:200]}"
    if "seed" in flat and isinstance(flat["seed"], int) and recipe["seed"] != flat["seed"]:
        return f"{name}: seed {recipe['seed']} instead of {flat['seed']}"
    return others_as_before(name, valid, found)


# ---- what a run leaves


def read_checkpoint(folder: Path) -> Any:
    from bivec.engine.checkpoint import load_checkpoint

    fresh = samples.train_state()
    before = {name: digest(parameter) for name, parameter in fresh.parameters.items()}
    try:
        loaded = load_checkpoint(folder / "mntp-000003", fresh)
    except BaseException:
        if {name: digest(parameter) for name, parameter in fresh.parameters.items()} != before:
            raise AssertionError("a refused checkpoint has changed the parameters") from None
        raise
    tensors = {f"parameter/{name}": digest(parameter) for name, parameter in loaded.parameters.items()}
    for name, parameter in loaded.parameters.items():
        for slot, value in loaded.optimizer.state[parameter].items():
            tensors[f"optimizer/{slot}/{name}"] = digest(torch.as_tensor(value))
    return loaded.step, tensors


@refused_or
def check_checkpoint(source: Path, case: Path, name: str, valid: Any, found: Any) -> str | None:
    """A strict reading of the safetensors file; the step of state.json, which is that of the folder's name."""
    stored = oracles.safetensors((case / "mntp-000003/state.safetensors").read_bytes())
    if any(tensor is None for tensor in stored.values()):
        return "a tensor that is not of floating point was accepted"
    content = strict_json((case / "mntp-000003/state.json").read_bytes())
    if not same_value(found[0], 3) or not same_value(content["step"], 3) or content["stage"] != "mntp":
        return f"step {found[0]} of {content}"
    if any(tensor.dtype != torch.float32 for tensor in stored.values()):
        return "a dtype that was never written was accepted"
    return differing({name: digest(tensor) for name, tensor in stored.items()}, found[1])


def read_run(folder: Path) -> Any:
    from bivec.engine.inputs import Inputs
    from bivec.engine.metrics import StepLog
    from bivec.engine.model_card import card_of_run
    from bivec.engine.presets import PRESETS
    from bivec.engine.recipe_arguments import RunOptions
    from bivec.engine.report import results_table
    from bivec.engine.run_files import (
        base_model,
        check_same_data,
        check_same_device,
        earlier_run,
        read_results,
        start_state,
    )
    from bivec.engine.trainer import StepMetrics

    options = RunOptions(folder, resume=True)
    earlier = earlier_run(PRESETS["smollm2-135m"], options)

    class Data(Inputs):
        def __init__(self) -> None:
            pass

        def fingerprints(self) -> dict[str, str]:
            return {"mntp": "300 rows", "simcse": "200 rows"}

    check_same_data(earlier, Data(), folder)
    check_same_device(earlier, "cpu", folder)
    results, seconds, peak = read_results(folder, True)
    table = results_table(results, {"dev": 10, "test": 10})
    card = card_of_run(folder)
    str(card)
    metrics = [asdict(line) for line in StepLog(folder / "metrics.jsonl", StepMetrics).read()]
    return {
        "recipe": without_nulls(earlier["recipe"]),
        "stages": [asdict(result) for result in results],
        "seconds": seconds,
        "peak": peak,
        "table": table,
        "metrics": metrics,
        "base": base_model(str(folder)),
        "state": start_state(str(folder), ()),
    }


def without_nulls(part: Any) -> Any:
    """A hyper-parameter that is null is one that is not there."""
    if not isinstance(part, dict):
        return part
    return {key: without_nulls(value) for key, value in part.items() if value is not None}


@refused_or
def check_run(source: Path, case: Path, name: str, valid: Any, found: Any) -> str | None:
    """Recipe and data are those of the run; results and metrics are what the files say, number for number."""
    strict_json((case / "run.json").read_bytes())
    content = strict_json((case / "results.json").read_bytes())
    stages = [{"sts_test_spearman": None, **stage} for stage in content["stages"]]
    if not all(
        same_value(list(one.items()), list({k: two[k] for k in one}.items()))
        for one, two in zip(found["stages"], stages, strict=True)
    ):
        return f"stages {found['stages']}, the file says {str(stages)[:200]}"
    if not same_value(content["seconds"], found["seconds"]) or not same_value(
        content["peak_memory_bytes"], found["peak"]
    ):
        return f"seconds {found['seconds']}, bytes {found['peak']}, the file says {str(content)[-120:]}"
    if found["recipe"] != valid["recipe"]:
        return "another recipe was accepted"
    if not (case / "metrics.jsonl").is_file():
        return "metrics of no file" if found["metrics"] else None
    kept = []
    lines = (case / "metrics.jsonl").read_bytes().decode("utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            kept.append(strict_json(line.encode()))
        except Unreadable:
            if number < len(lines):
                raise
    for one, two in zip(found["metrics"], kept, strict=False):
        if differing(one, two):
            return f"metrics: {differing(one, two)}"
    return None if abs(len(found["metrics"]) - len(kept)) <= 1 else "lines of metrics are missing"


def read_corpus(folder: Path) -> Any:
    import numpy as np

    (folder / "partial").rename(folder / ".out.npy.partial")
    return np.load(samples.encode_sample(folder, LLAMA[0]))


@refused_or
def check_corpus(source: Path, case: Path, name: str, valid: Any, found: Any) -> str | None:
    """The rows of a call that nobody stopped; but those of slices that are marked as done are what is in the file."""
    import numpy as np

    expected = valid.copy()
    if name.endswith("vectors.npy"):
        size = source.joinpath(name).stat().st_size
        (data,) = READERS["corpus"].mutated
        if data is None:  # begun anew
            return None if found.tobytes() == expected.tobytes() else "other rows"
        if len(data) != size:
            raise Unreadable("another size")
        kept = np.frombuffer(data[size - valid.nbytes :], dtype=valid.dtype).reshape(valid.shape)
        expected[:4] = kept[:4]
    return None if found.tobytes() == expected.tobytes() else "other rows"


LLAMA: list[Path] = []  # the decoder of encode_corpus; filled by the worker

SAFETENSORS, JSON = mutants.any_safetensors, mutants.any_json

READERS = {
    reader.name: reader
    for reader in (
        Reader("safetensors", samples.decoder, {"model.safetensors": SAFETENSORS}, read_weights, check_weights),
        Reader(
            "sharded",
            samples.sharded,
            {
                "model.safetensors.index.json": JSON,
                "model-00001-of-00003.safetensors": SAFETENSORS,
                "model-00002-of-00003.safetensors": SAFETENSORS,
            },
            read_weights,
            check_weights,
        ),
        Reader("config", samples.decoder, {"config.json": JSON}, read_weights, check_weights),
        Reader(
            "families",
            samples.families,
            {
                f"{family}/config.json": JSON
                for family in ("llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma", "gemma2", "gemma3_text")
            },
            read_families,
            check_families,
        ),
        Reader("gguf", samples.gguf, {"model.gguf": mutants.any_gguf}, read_gguf, check_gguf),
        Reader(
            "encoder", samples.encoder, {"bivec_config.json": JSON, "tokenizer.json": JSON}, read_encoder, check_own
        ),
        Reader(
            "sentence_transformers",
            samples.sentence_transformers,
            {
                "modules.json": JSON,
                "1_Pooling/config.json": JSON,
                "sentence_bert_config.json": JSON,
                "config_sentence_transformers.json": JSON,
                "tokenizer_config.json": JSON,
                "0_WordWeights/model.safetensors": SAFETENSORS,
            },
            read_encoder,
            check_foreign,
        ),
        Reader(
            "llm2vec",
            samples.llm2vec,
            {"llm2vec_config.json": JSON, "adapter_config.json": JSON, "adapter_model.safetensors": SAFETENSORS},
            read_llm2vec,
            check_foreign,
        ),
        Reader(
            "adapter",
            samples.adapter,
            {"adapter_config.json": JSON, "adapter_model.safetensors": SAFETENSORS},
            read_adapter,
            check_adapter,
        ),
        Reader(
            "tokenizer",
            samples.decoder,
            {"tokenizer.json": JSON, "tokenizer_config.json": JSON},
            read_tokenizer,
            check_tokenizer,
            weights={"tokenizer.json": 2.0},
        ),
        Reader(
            "sentencepiece",
            samples.sentencepiece,
            {"tokenizer.model": mutants.any_protobuf},
            read_sentencepiece,
            check_sentencepiece,
        ),
        Reader(
            "texts",
            samples.texts,
            {"a.txt": mutants.any_text, "b.txt.gz": mutants.inside_gzip(mutants.any_text)},
            each(read_texts, "a.txt", "b.txt.gz"),
            by_second_reading(oracles.lines_of),
        ),
        Reader(
            "csv",
            samples.csv,
            {"a.csv": mutants.any_text, "b.tsv": mutants.any_text},
            each(read_texts, "a.csv", "b.tsv"),
            by_second_reading(second_csv),
        ),
        Reader(
            "jsonl",
            samples.json_lines,
            {
                "a.jsonl": mutants.any_json_lines,
                "b.jsonl.gz": mutants.inside_gzip(mutants.any_json_lines),
                "c.json": JSON,
            },
            each(read_texts, "a.jsonl", "b.jsonl.gz", "c.json"),
            by_second_reading(lambda file: oracles.json_column(file, "text")),
        ),
        Reader(
            "parquet",
            samples.parquet,
            {"a.parquet": mutants.any_parquet, "b.parquet": mutants.any_parquet},
            each(read_texts, "a.parquet", "b.parquet"),
            by_second_reading(parquet_column),
        ),
        Reader(
            "sts",
            samples.sts,
            {"a.csv": mutants.any_text, "b.tsv": mutants.any_text, "c.tsv.gz": mutants.inside_gzip(mutants.any_text)},
            each(read_sts, "a.csv", "b.tsv", "c.tsv.gz"),
            by_second_reading(second_sts),
        ),
        Reader(
            "triples",
            samples.triples,
            {"a.jsonl": mutants.any_json_lines},
            each(read_triples, "a.jsonl"),
            by_second_reading(second_triples),
        ),
        Reader(
            "triples_parquet",
            samples.triples_parquet,
            {"a.parquet": mutants.any_parquet},
            each(read_triples, "a.parquet"),
            by_second_reading(second_triple_table),
        ),
        Reader(
            "entailment",
            samples.entailment,
            {"sick.txt": mutants.any_text, "snli.jsonl": mutants.any_json_lines, "nli.csv": mutants.any_text},
            each(read_entailment, "sick.txt", "snli.jsonl", "nli.csv"),
            check_entailment,
        ),
        Reader(
            "words",
            samples.conll,
            {
                "conll2003.txt": mutants.any_text,
                "wnut17.conll": mutants.any_text,
                "tree.conllu": mutants.any_text,
                "tree.conllu.gz": mutants.inside_gzip(mutants.any_text),
            },
            each(read_words, *WORD_FILES),
            check_words,
        ),
        Reader(
            "settings",
            samples.settings,
            {"a.yaml": mutants.any_yaml, "b.json": JSON},
            each(read_settings, "a.yaml", "b.json"),
            check_settings,
        ),
        Reader(
            "checkpoint",
            samples.checkpoint,
            {"mntp-000003/state.safetensors": SAFETENSORS, "mntp-000003/state.json": JSON},
            read_checkpoint,
            check_checkpoint,
        ),
        Reader(
            "run",
            samples.run,
            {"run.json": JSON, "results.json": JSON, "metrics.jsonl": mutants.any_json_lines},
            read_run,
            check_run,
        ),
        Reader(
            "corpus",
            samples.corpus,
            {"partial/state.json": JSON, "partial/done": mutants.any_bytes, "partial/vectors.npy": mutants.head_or_any},
            read_corpus,
            check_corpus,
        ),
    )
}
