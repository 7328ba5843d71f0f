"""Four MTEB tasks on the samples that ship with the recipes, for evaluations without a network.

They are mteb's own tasks, scored by mteb; only their data is ours, and small:

* ``LocalSTS``: pairs of STS-B dev (Spearman's correlation of the cosines).
* ``LocalPairClassification``: pairs of STS-B dev with a score of 4 and more against 1 and less (average precision).
* ``LocalRetrieval``: the last sentence of a WikiText paragraph asks for the paragraph it was taken out of, whose first
  sentence stands for a title (nDCG@10). Source of the idea: the inverse cloze task, Lee et al., 2019.
* ``LocalClustering``: sentences of long WikiText paragraphs, by paragraph (V-measure).

Their scores compare models with each other, not with the paper's, whose tasks are others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from bivec.engine.data import STSPair, load_sts, load_texts
from bivec.engine.encoder import Encoder
from bivec.engine.errors import DataError
from bivec.engine.evaluation.paper import paper_rows

if TYPE_CHECKING:
    from mteb.abstasks.abstask import AbsTask
    from mteb.abstasks.task_metadata import TaskMetadata, TaskType
    from mteb.models.models_protocols import EncoderProtocol

Item = TypeVar("Item")

SPLIT = "test"
LOCAL_INSTRUCTIONS = {
    "LocalSTS": "Retrieve semantically similar text:",
    "LocalPairClassification": "Retrieve semantically similar text:",
    "LocalRetrieval": "Given a sentence, retrieve the Wikipedia paragraph that it belongs to:",
    "LocalClustering": "Identify the topic or theme of the given sentences:",
}
POSITIVE, NEGATIVE = 4.0, 1.0  # STS-B scores of LocalPairClassification: so high and more, so low and less


@dataclass(frozen=True)
class LocalSizes:
    """How much of the samples is used; evenly spaced over their files. The defaults are 30k SmolLM2 tokens."""

    sts_pairs: int = 200
    pairs_per_class: int = 100
    documents: int = 150
    queries: int = 100  # the documents that are asked for, at most all
    clusters: int = 24
    sentences_per_cluster: int = 6


def local_tasks(data_dir: str | Path, sizes: LocalSizes | None = None) -> list[AbsTask]:
    """The four tasks; their data is read when they are evaluated.

    mteb seeds the global generators of Python, numpy and torch whenever a task is made.

    Args:
        data_dir: the directory of the samples, ``recipes/data``.
        sizes: None = the defaults.

    Raises:
        DataError: a sample is missing (here), or damaged (in the evaluation).
    """
    from mteb.abstasks import AbsTaskClustering, AbsTaskPairClassification, AbsTaskRetrieval, AbsTaskSTS

    folder, sizes = Path(data_dir), sizes or LocalSizes()
    pairs, texts = folder / "stsb_dev.csv.gz", folder / "wikitext2_paragraphs.txt.gz"
    for file in (pairs, texts, folder / "wikipedia_sentences.txt.gz"):
        if not file.is_file():
            raise DataError(f"{file}: no such file; the local tasks need the samples of recipes/data")
    return [
        _task(
            AbsTaskSTS,
            _metadata("LocalSTS", "STS", "cosine_spearman", "Pairs of STS-B dev."),
            lambda: {SPLIT: _sts_data(load_sts(pairs), sizes)},
        ),
        _task(
            AbsTaskPairClassification,
            _metadata("LocalPairClassification", "PairClassification", "cosine_ap", "Equal or unequal, of STS-B dev."),
            lambda: {SPLIT: _pair_data(load_sts(pairs), sizes)},
        ),
        _task(
            AbsTaskRetrieval,
            _metadata("LocalRetrieval", "Retrieval", "ndcg_at_10", "The paragraph of a sentence, of WikiText-2."),
            lambda: {"default": {SPLIT: _retrieval_data(_paragraphs(folder), sizes)}},
        ),
        _task(
            AbsTaskClustering,
            _metadata("LocalClustering", "Clustering", "v_measure", "Sentences by paragraph, of WikiText-2."),
            lambda: {SPLIT: _clustering_data(_paragraphs(folder), sizes)},
            max_fraction_of_documents_to_embed=None,
            # as many draws an experiment as there are sentences
            max_documents_per_cluster=sizes.clusters * sizes.sentences_per_cluster,
        ),
    ]


def evaluate_local(encoder: Encoder | EncoderProtocol, tasks: Sequence[AbsTask]) -> dict[str, float]:
    """Main scores x 100 of an encoder, by task, through ``mteb.evaluate``; nothing is kept on disk.

    Args:
        encoder: a bivec encoder, which gets ``LOCAL_INSTRUCTIONS``, or one that is mteb's already.
        tasks: of :func:`local_tasks`; the same ones may be used for any number of encoders.

    Raises:
        DataError: a damaged sample.
    """
    import datasets
    import mteb

    model = encoder.as_mteb(instructions=LOCAL_INSTRUCTIONS) if isinstance(encoder, Encoder) else encoder
    # made anew: a clustering task draws on from where its last evaluation left it
    fresh = [type(task)(seed=task.seed) for task in tasks]
    quiet = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()  # of its tables of a few rows
    try:
        results = mteb.evaluate(model, fresh, cache=None, co2_tracker=False, show_progress_bar=False)
    finally:
        if not quiet:
            datasets.enable_progress_bars()
    return {result.task_name: 100 * float(result.get_score()) for result in results.task_results}


def local_markdown(scores: Mapping[str, Mapping[str, float]], *, paper_model: str = "S-LLaMA-1.3B") -> str:
    """A table, one row a model, beside the paper's means of the same categories (Table 1, unsupervised).

    Args:
        scores: by model, what :func:`evaluate_local` gives; a model with a variant's name gets the paper's row of it.
        paper_model: which of the paper's models.

    Raises:
        ConfigError: the paper has no such model.
    """
    names = list(dict.fromkeys(task for row in scores.values() for task in row))
    categories = [name.removeprefix("Local") for name in names]
    theirs = {row.variant: row.scores for row in paper_rows("1", model=paper_model)}
    head = [*categories, *(f"paper: {category}" for category in categories)]
    lines = [f"| model | {' | '.join(head)} |", "|---|" + "---|" * len(head)]
    for model, row in scores.items():
        paper = theirs.get(model, {})
        cells = [f"{row[name]:.1f}" if name in row else "" for name in names]
        cells += [f"{paper[category]:.2f}" if category in paper else "" for category in categories]
        lines.append(f"| {model} | {' | '.join(cells)} |")
    for variant, name in (("", "BERT, mean (paper)"), ("simcse", "BERT, SimCSE (paper)")):
        (bert,) = paper_rows("1", model="BERT", variant=variant)
        cells = [""] * len(names) + [f"{bert.scores[one]:.2f}" if one in bert.scores else "" for one in categories]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    note = (
        f"Ours: one small task a category, main score x 100 by mteb. Paper: {paper_model}, means over the "
        "English tasks of the category in MTEB; Uni with the weighted mean, as here."
    )
    return "\n".join([*lines, "", note])


def _task(base: type[AbsTask], metadata: TaskMetadata, load: Callable[[], Any], **attributes: Any) -> AbsTask:
    """One of mteb's tasks with data of ours in place of the hub's."""

    def load_data(self: AbsTask, *_: Any, **__: Any) -> None:
        if not self.data_loaded:
            self.dataset, self.data_loaded = load(), True

    made: type[AbsTask] = type(metadata.name, (base,), {"metadata": metadata, "load_data": load_data, **attributes})
    return made()


def _metadata(name: str, kind: TaskType, main_score: str, description: str) -> TaskMetadata:
    from mteb.abstasks.task_metadata import TaskMetadata

    return TaskMetadata(
        name=name,
        description=description,
        type=kind,
        category="t2c" if kind == "Clustering" else "t2t",
        dataset={"path": "bivec/recipes", "revision": "1"},  # of the samples, raised when one changes
        eval_splits=[SPLIT],
        eval_langs=["eng-Latn"],
        main_score=main_score,
    )


def _evenly(items: Sequence[Item], count: int) -> list[Item]:
    """``count`` of the items, or all, evenly spaced and in order."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def _sts_data(pairs: Sequence[STSPair], sizes: LocalSizes) -> Any:
    from datasets import Dataset

    chosen = _evenly(pairs, sizes.sts_pairs)
    return Dataset.from_dict(
        {
            "sentence1": [pair.sentence1 for pair in chosen],
            "sentence2": [pair.sentence2 for pair in chosen],
            "score": [pair.score for pair in chosen],
        }
    )


def _pair_data(pairs: Sequence[STSPair], sizes: LocalSizes) -> Any:
    from datasets import Dataset

    positive = _evenly([pair for pair in pairs if pair.score >= POSITIVE], sizes.pairs_per_class)
    negative = _evenly([pair for pair in pairs if pair.score <= NEGATIVE], sizes.pairs_per_class)
    return Dataset.from_dict(
        {
            "sentence1": [pair.sentence1 for pair in (*positive, *negative)],
            "sentence2": [pair.sentence2 for pair in (*positive, *negative)],
            "labels": [1] * len(positive) + [0] * len(negative),
        }
    )


def _retrieval_data(paragraphs: Sequence[Sequence[str]], sizes: LocalSizes) -> dict[str, Any]:
    from datasets import Dataset

    chosen = _evenly([sentences for sentences in paragraphs if len(sentences) >= 3], sizes.documents)
    asked = _evenly(range(len(chosen)), sizes.queries)
    return {
        "corpus": Dataset.from_dict(
            {
                "id": [f"d{i}" for i in range(len(chosen))],
                "title": [sentences[0] for sentences in chosen],
                "text": [" ".join(sentences[1:-1]) for sentences in chosen],
            }
        ),
        "queries": Dataset.from_dict({"id": [f"q{i}" for i in asked], "text": [chosen[i][-1] for i in asked]}),
        "relevant_docs": {f"q{i}": {f"d{i}": 1} for i in asked},
        "top_ranked": None,
    }


def _clustering_data(paragraphs: Sequence[Sequence[str]], sizes: LocalSizes) -> Any:
    from datasets import Dataset

    size = sizes.sentences_per_cluster
    chosen = _evenly([sentences for sentences in paragraphs if len(sentences) >= size], sizes.clusters)
    return Dataset.from_dict(
        {
            "sentences": [sentence for sentences in chosen for sentence in sentences[:size]],
            "labels": [f"paragraph {i}" for i, sentences in enumerate(chosen) for _ in sentences[:size]],
        }
    )


def _paragraphs(folder: Path) -> list[list[str]]:
    """The sentences of every paragraph: the file of sentences has them in the order of the text, each once."""
    paragraphs = load_texts(folder / "wikitext2_paragraphs.txt.gz")
    sentences = load_texts(folder / "wikipedia_sentences.txt.gz")
    found, position = [], 0
    for paragraph in paragraphs:
        of_this, start = [], 0
        while position < len(sentences) and (at := paragraph.find(sentences[position], start)) >= 0:
            of_this.append(sentences[position])
            start = at + len(sentences[position])
            position += 1
        found.append(of_this)
    if position < len(sentences):
        raise DataError(
            f"{folder / 'wikipedia_sentences.txt.gz'}, line {position + 1}: not a sentence of the paragraphs in "
            f"{folder / 'wikitext2_paragraphs.txt.gz'}, in their order; take both files from the same release"
        )
    return found
