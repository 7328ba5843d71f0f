"""Texts, tables, triples, words with labels and recipes' settings: how they are read, and their oracles."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import oracles
from harness import others_as_before, refused_or
from oracles import Unreadable, strict_json


def read_texts(file: Path) -> list[str]:
    from bivec.engine.data import load_texts

    return list(load_texts(file, column=None if ".txt" in file.name else "text"))


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
        content = strict_json(data, nan=True) if name.endswith(".json") else yaml.safe_load(data.decode("utf-8"))
    except (yaml.YAMLError, ValueError) as error:
        raise Unreadable(str(error)) from None
    flat: dict[str, Any] = {}

    def walk(part: dict, prefix: str) -> None:
        for name, value in part.items():
            key = prefix + str(name).replace("-", "_")
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
