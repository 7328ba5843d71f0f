"""A small recipe of both stages on a tiny random checkpoint, and how it is run."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest

from bivec.engine.lora import LoraConfig
from bivec.engine.optim import OptimConfig
from bivec.engine.recipe import MntpStage, Recipe, SimcseStage, SupervisedStage
from bivec.engine.run_start import start

DATA = Path(__file__).parents[2] / "recipes" / "data"
STEPS = 4
LORA = LoraConfig(rank=4, alpha=8, dropout=0.1)


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """Text, sentences and STS pairs, a few of each."""
    folder = tmp_path_factory.mktemp("data")
    for name, source, rows in (
        ("mntp.txt", "wikitext2_paragraphs.txt.gz", 12),
        ("simcse.txt", "wikipedia_sentences.txt.gz", 30),
        ("dev.csv", "stsb_dev.csv.gz", 12),
        ("test.csv", "stsb_test.csv.gz", 12),
    ):
        with gzip.open(DATA / source, "rt", encoding="utf-8") as lines:
            (folder / name).write_text("".join(islice(lines, rows)), encoding="utf-8")
    sentences = (folder / "simcse.txt").read_text(encoding="utf-8").splitlines()
    rows = [
        {"query": one, "positive": other, "negatives": sentences[i : i + i % 3], "instruction": "Find it" * (i % 2)}
        for i, (one, other) in enumerate(zip(sentences[::2], sentences[1::2], strict=True))
    ]
    lines = (json.dumps(row) + "\n" for row in rows)
    (folder / "triples.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def recipe(files, tiny_llama_dir):
    """Both stages in four steps, with dropout of both kinds, micro-batches and evaluations in between."""
    return Recipe(
        name="tiny",
        model=str(tiny_llama_dir),
        mntp_data=str(files / "mntp.txt"),
        simcse_data=str(files / "simcse.txt"),
        sts_dev=str(files / "dev.csv"),
        sts_test=str(files / "test.csv"),
        mntp=MntpStage(
            optim=OptimConfig(learning_rate=1e-2, steps=STEPS, warmup_steps=1),
            batch_size=6,
            sequence_length=24,
            lora=LORA,
            micro_batch_tokens=96,
            save_every=2,
            evaluate_every=1,
        ),
        simcse=SimcseStage(
            optim=OptimConfig(learning_rate=1e-2, steps=STEPS),
            batch_size=8,
            max_length=24,
            lora=LORA,
            save_every=2,
            evaluate_every=2,
        ),
        supervised=SupervisedStage(
            optim=OptimConfig(learning_rate=1e-2, steps=STEPS),
            batch_size=5,
            max_length=48,
            scale=5.0,
            lora=LORA,
            micro_batch_tokens=200,
            save_every=2,
            evaluate_every=2,
        ),
        supervised_data=str(files / "triples.jsonl"),
        eval_pairs=10,
    )


def run_all_steps(recipe: Recipe, directory: Path, *flags: object) -> None:
    """The recipe from its first step to its last."""
    with start(recipe, "a test", ["--output-dir", str(directory), *map(str, flags)]) as run:
        run.evaluate("uni", causal=True)
        run.evaluate("uni weighted-mean", causal=True, pooling="weighted_mean")
        run.evaluate("bi")
        run.mntp()
        run.evaluate()
        run.simcse()
        run.evaluate()
        run.supervised()
        run.evaluate()
        run.finish()


@pytest.fixture(scope="session")
def execute() -> Callable[..., None]:
    """execute(recipe, directory, *flags)"""
    return run_all_steps


@pytest.fixture
def fails(capsys: pytest.CaptureFixture) -> Callable[..., str]:
    """fails(recipe, directory, *flags, code=2): the error of a run that must end with this code and no traceback."""

    def run(recipe: Recipe, directory: Path, *flags: object, code: int = 2) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            run_all_steps(recipe, directory, *flags)
        assert stop.value.code == code
        return capsys.readouterr().err

    return run
