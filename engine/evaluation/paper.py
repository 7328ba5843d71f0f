"""The figures of the LLM2Vec paper as data, to stand beside ours.

    paper_rows("1", model="S-LLaMA-1.3B", variant="bi+mntp")[0].scores["average"]  # 41.43

Tables: "1" and "2" (56 MTEB tasks by category, unsupervised and supervised), "4" (word tasks), "5" (the 15-task subset
by pooling), "9" (the leaderboard then), "11" and "12" (every task, unsupervised and supervised), "figure6" (the subset
by steps of supervised training). Variants have the names of ``variants.py``: "uni", "bi+mntp+simcse", …; "" is a model
that is used as it is. Table 3, the subset, is a field of :func:`paper_tasks`.

Source: BehnamGhader et al., 2024, arXiv 2404.05961; figure 6 was read off the published image, within 0.5.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from bivec.engine.errors import ConfigError

FILE = Path(__file__).parent / "data" / "paper.json"
CATEGORIES = (
    "Retrieval",
    "Reranking",
    "Clustering",
    "PairClassification",
    "Classification",
    "STS",
    "Summarization",
)
AVERAGE = "average"  # the column of the mean over all tasks of a table
SUBSET_AVERAGE = "subset_average"  # tables 11 and 12: the mean over the 15 tasks, computed from their rows


@dataclass(frozen=True)
class PaperTask:
    """One of the 56 MTEB tasks, under the name it has in the paper."""

    name: str
    category: str  # one of CATEGORIES
    in_subset: bool  # Table 3: one of the 15 of the ablations


@dataclass(frozen=True)
class PaperRow:
    """One row of a table; scores x 100."""

    table: str
    model: str  # "S-LLaMA-1.3B", "LLaMA-2-7B", "Mistral-7B", "Llama-3-8B", or a baseline
    variant: str  # "uni", "bi", "bi+mntp", … ; "echo", "simcse", or "" for a model as it is
    pooling: str | None  # "mean" or "weighted_mean"; None: not said, or a column of the table
    scores: Mapping[str, float]  # by category, task, pooling or step
    note: str | None = None


def paper_rows(table: str | int, *, model: str | None = None, variant: str | None = None) -> list[PaperRow]:
    """Rows of a table, in the paper's order.

    Args:
        table: see the module's docstring.
        model: only those of this model.
        variant: only those of this variant.

    Raises:
        ConfigError: no such table, or no such model in it.
    """
    rows = _tables().get(str(table))
    if rows is None:
        raise ConfigError(f"the paper's table {table!r} is not kept; choose one of {', '.join(_tables())}")
    models = list(dict.fromkeys(row.model for row in rows))
    if model is not None and model not in models:
        raise ConfigError(f"table {table} has no model {model!r}; choose one of {', '.join(models)}")
    return [row for row in rows if model in (None, row.model) and variant in (None, row.variant)]


def paper_title(table: str | int) -> str:
    """What the figures of a table are.

    Raises:
        ConfigError: no such table.
    """
    paper_rows(table)
    title: str = _content()["tables"][str(table)]["title"]
    return title


def paper_tasks(*, category: str | None = None, subset_only: bool = False) -> list[PaperTask]:
    """The MTEB tasks of the paper, by name.

    Args:
        category: only those of one of ``CATEGORIES``.
        subset_only: only the 15 of Table 3.

    Raises:
        ConfigError: no such category.
    """
    if category is not None and category not in CATEGORIES:
        raise ConfigError(f"category {category!r} is unknown; choose one of {', '.join(CATEGORIES)}")
    tasks = [PaperTask(name, **fields) for name, fields in _content()["tasks"].items()]
    return [task for task in tasks if category in (None, task.category) and (task.in_subset or not subset_only)]


def paper_findings() -> dict[str, str]:
    """What the paper says of its figures and of the analyses that have no table, each in a sentence or two.

    Keys: gains, bi_untrained, mntp_before_simcse, pooling, word_tasks, word_tasks_mistral, future_tokens,
    layer_similarity, sample_efficiency, supervised, echo, evaluation_hours.
    """
    return dict(_content()["findings"])


@cache
def _content() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return content


@cache
def _tables() -> dict[str, list[PaperRow]]:
    return {
        name: [PaperRow(table=name, **{**row, "scores": MappingProxyType(row["scores"])}) for row in table["rows"]]
        for name, table in _content()["tables"].items()
    }
