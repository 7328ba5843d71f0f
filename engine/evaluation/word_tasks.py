"""The paper's word tasks on any number of models: data, features, probes, and the table beside Table 4.

``word_data.py`` reads, ``word_features.py`` encodes once, ``word_probe.py`` trains; here the three meet.

Source: METHOD 6 (paper, section 3.1, Figure 2, Table 4, appendix D.1.3).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from bivec.engine.errors import ConfigError
from bivec.engine.evaluation.paper import paper_rows
from bivec.engine.evaluation.word_data import (
    CONLL2003_LABELS,
    SPAN_TASKS,
    TASKS,
    WordCorpus,
    read_conll2003_directory,
    read_conllu,
    read_wnut17,
)
from bivec.engine.evaluation.word_features import WordEncoder, word_features
from bivec.engine.evaluation.word_probe import ProbeConfig, ProbeResult, evaluate_probe, train_probe

TITLES = {"chunking": "Chunking", "ner": "NER", "pos": "POS"}


def read_as_paper(model: str) -> str:
    """The alignment of a state by its name: MNTP trains position i - 1 to know token i, and a word is read there."""
    return "next_token" if "mntp" in model.split("+") else "same_token"


# how states are compared
READINGS: dict[str, Callable[[str], str]] = {
    "at their own tokens": lambda _: "same_token",
    "after MNTP one to the left": read_as_paper,
}


@dataclass(frozen=True)
class WordData:
    """A training and a test corpus and the tasks that both have labels for."""

    name: str
    train: WordCorpus
    test: WordCorpus
    tasks: tuple[str, ...]
    label_sets: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # fixed ones; else the training data's


@dataclass(frozen=True)
class WordScore:
    """One model on one task; scores x 100, means over the seeds of the probe."""

    model: str
    alignment: str
    task: str
    data: str
    accuracy: float
    accuracy_std: float  # over the seeds
    f1: float | None  # over spans; None for POS
    f1_std: float | None
    seeds: tuple[int, ...]
    num_words: int  # of the test corpus
    num_missing: int  # words without a vector, counted as wrong
    unseen_labels: dict[str, int]  # test words with labels that the training data lacks, counted as wrong

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)


def shipped_word_data(directory: str | Path) -> list[WordData]:
    """UD-EWT for chunking (``chunks.py``) and POS, WNUT-17 for NER, as they ship in ``recipes/data``.

    Raises:
        DataError: see the readers.
    """
    directory = Path(directory)
    train, test = (read_conllu(directory / f"ud_ewt_{split}.conllu.gz") for split in ("train", "test"))
    ewt = WordData("ud_ewt", train, test, ("chunking", "pos"))
    train, test = (read_wnut17(directory / f"wnut17_{split}.conll.gz") for split in ("train", "test"))
    return [ewt, WordData("wnut17", train, test, ("ner",))]


def held_out_word_data(directory: str | Path) -> list[WordData]:
    """What settings are chosen by: a quarter of UD-EWT's training sentences held out, and WNUT-17's dev set.

    Raises:
        DataError: see the readers.
    """
    directory = Path(directory)
    ewt = read_conllu(directory / "ud_ewt_train.conllu.gz")
    kept = 3 * len(ewt) // 4
    train, dev = (read_wnut17(directory / f"wnut17_{split}.conll.gz") for split in ("train", "dev"))
    return [
        WordData("ud_ewt", ewt.select(range(kept)), ewt.select(range(kept, len(ewt))), ("chunking", "pos")),
        WordData("wnut17", train, dev, ("ner",)),
    ]


def conll2003_word_data(directory: str | Path) -> list[WordData]:
    """CoNLL-2003 as distributed, all three tasks with the label sets of METHOD 6.3.

    Raises:
        DataError: see the reader.
    """
    corpora = read_conll2003_directory(directory)
    return [WordData("conll2003", corpora["train"], corpora["test"], TASKS, CONLL2003_LABELS)]


def select_word_data(data: Sequence[WordData], tasks: Sequence[str], *, sentences: int | None = None) -> list[WordData]:
    """The data for some tasks, at most so many sentences of each corpus, the first ones.

    Raises:
        ConfigError: no data has labels for a task.
    """
    for task in tasks:
        if not any(task in one.tasks for one in data):
            raise ConfigError(f"task {task!r}: the data has {', '.join(task for one in data for task in one.tasks)}")
    found = []
    for one in data:
        kept = tuple(task for task in one.tasks if task in tasks)
        train, test = (
            part if sentences is None else part.select(range(min(sentences, len(part))))
            for part in (one.train, one.test)
        )
        found += [replace(one, train=train, test=test, tasks=kept)] if kept else []
    return found


def score_words(
    name: str,
    encoder: WordEncoder,
    data: Sequence[WordData],
    alignments: Sequence[str],
    *,
    config: ProbeConfig,
    seeds: Sequence[int],
    cache_dir: str | Path | None = None,
) -> list[WordScore]:
    """Encodes every corpus once, then trains and tests one probe for every task, alignment and seed.

    Args:
        name: of the model, for the scores and the cached features.
        encoder: see :func:`word_features`.
        data: from :func:`select_word_data`.
        alignments: see :func:`word_features`.
        config: of the probe; its seed gives way to ``seeds``.
        seeds: one at least.
        cache_dir: where the features are kept; None = nowhere.

    Raises:
        ConfigError: no seed; see also :func:`word_features`.
        DataError: see :func:`train_probe`.
    """
    if not seeds:
        raise ConfigError("give the probe one seed at least")
    scores = []
    for one in data:
        train, test = (
            word_features(encoder, corpus, alignments, cache_dir=cache_dir, name=f"{name}-{one.name}-{split}")
            for split, corpus in (("train", one.train), ("test", one.test))
        )
        for task in one.tasks:
            for alignment in alignments:
                results = []
                for seed in seeds:
                    settings = replace(config, seed=seed)
                    labels = one.train.labels[task]
                    probe = train_probe(train[alignment], labels, settings, label_set=one.label_sets.get(task))
                    results.append(evaluate_probe(probe, test[alignment], one.test.labels[task], task))
                scores.append(_mean_score(results, name, alignment, task, one.name, seeds))
    return scores


def _mean_score(
    results: Sequence[ProbeResult], model: str, alignment: str, task: str, data: str, seeds: Sequence[int]
) -> WordScore:
    """Of the probes of all seeds."""
    accuracy = [result.accuracy for result in results]
    f1 = [result.f1 for result in results if result.f1 is not None]
    return WordScore(
        model=model,
        alignment=alignment,
        task=task,
        data=data,
        accuracy=float(np.mean(accuracy)),
        accuracy_std=float(np.std(accuracy)),
        f1=float(np.mean(f1)) if f1 else None,
        f1_std=float(np.std(f1)) if f1 else None,
        seeds=tuple(seeds),
        num_words=results[0].num_words,
        num_missing=results[0].num_missing,
        unseen_labels=results[0].unseen_labels,
    )


def accuracy_by_task(scores: Sequence[WordScore], read: Callable[[str], str]) -> dict[str, dict[str, float]]:
    """Token accuracy x 100 by task and model, each model with its words read at one alignment.

    Args:
        scores: from :func:`score_words`.
        read: a model's name -> its alignment; see ``READINGS``.
    """
    found: dict[str, dict[str, float]] = {}
    for one in scores:
        if one.alignment == read(one.model):
            found.setdefault(one.task, {})[one.model] = one.accuracy
    return found


def words_markdown(
    scores: Sequence[WordScore], *, paper_model: str = "S-LLaMA-1.3B", read_at: Mapping[str, str] | None = None
) -> str:
    """A table with a row for every model and alignment, beside the paper's Table 4.

    Args:
        scores: from :func:`score_words`, of any number of models.
        paper_model: whose rows of Table 4 stand in the last columns, by the model's name here ("uni", "bi+mntp", …).
        read_at: model -> the alignment in whose row the paper's figures stand; None = in each.

    Raises:
        ConfigError: no such model in Table 4.
    """
    tasks = [task for task in TASKS if any(score.task == task for score in scores)]
    tasks += sorted({score.task for score in scores} - set(tasks))
    theirs = {row.variant: row.scores for row in paper_rows("4", model=paper_model)}
    columns = ["model", "word read at"]
    for task in tasks:
        title = TITLES.get(task, task)
        columns += [f"{title} accuracy", *([f"{title} F1"] if task in SPAN_TASKS else [])]
    columns += [f"{paper_model}: {TITLES.get(task, task)}" for task in tasks]
    lines = [f"| {' | '.join(columns)} |", "|---|---|" + "---:|" * (len(columns) - 2)]
    for model, alignment in dict.fromkeys((score.model, score.alignment) for score in scores):
        found = {one.task: one for one in scores if (one.model, one.alignment) == (model, alignment)}
        cells = [model, alignment.replace("_", " ")]
        for task in tasks:
            score = found.get(task)
            cells.append("" if score is None else f"{score.accuracy:.2f}")
            if task in SPAN_TASKS:
                cells.append("" if score is None or score.f1 is None else f"{score.f1:.2f}")
        beside = read_at is None or read_at.get(model, alignment) == alignment
        paper = theirs.get(model, {}) if beside else {}
        cells += [f"{paper[task]:.2f}" if task in paper else "" for task in tasks]
        lines.append(f"| {' | '.join(cells)} |")
    for row in paper_rows("4", variant=""):  # encoder-only models
        empty = [""] * (len(columns) - 2 - len(tasks))
        quoted = [f"{row.scores[task]:.2f}" if task in row.scores else "" for task in tasks]
        cells = [f"{row.model} (paper)", "", *empty, *quoted]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
