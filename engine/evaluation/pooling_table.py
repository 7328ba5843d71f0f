"""Pooling x variant: STS of every state of a model with EOS, mean and weighted-mean pooling, and of Echo.

The paper's Figure 3 and Table 5 on another yardstick: theirs is the average of 15 MTEB tasks, ours the sentence pairs
given. The poolings of one state read the same hidden states. Behind the row the EOS pooling needs one token more: under
a causal mask no other token sees it, so one forward serves all three; under a bidirectional mask every state of the row
changes with it, so EOS is run again by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bivec.engine.data import STSPair
from bivec.engine.encoder import Encoder
from bivec.engine.encoder_config import text_format
from bivec.engine.evaluation.echo import ECHO_TEMPLATE, EchoEncoder
from bivec.engine.evaluation.paper import paper_rows
from bivec.engine.evaluation.sts import sts_spearman
from bivec.engine.evaluation.variants import Variant
from bivec.engine.figure import new_figure, save_figure
from bivec.engine.text_format import Row, encoding_head

TITLES = {"eos_token": "EOS", "mean": "mean", "weighted_mean": "weighted mean"}
ECHO = "echo"
PAPER_MODEL = "S-LLaMA-1.3B"  # the smallest of the paper's


@dataclass(frozen=True)
class PoolingScore:
    """STS of one state of a model with one pooling."""

    variant: str  # a variant's name, "echo", or that of another encoder
    pooling: str
    spearman: float  # x 100


@dataclass(frozen=True)
class PoolingTable:
    """All scores on the same sentence pairs."""

    scores: tuple[PoolingScore, ...]
    num_pairs: int

    def score(self, variant: str, pooling: str) -> float | None:
        """Spearman x 100; None where it was not measured."""
        found = (one.spearman for one in self.scores if (one.variant, one.pooling) == (variant, pooling))
        return next(found, None)

    @property
    def variants(self) -> list[str]:
        """Their names, in the order of the scores."""
        return list(dict.fromkeys(one.variant for one in self.scores))

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)


def pooling_table(
    variants: Sequence[Variant],
    pairs: Sequence[STSPair],
    *,
    echo: str | None = ECHO_TEMPLATE,
    others: Mapping[str, Encoder] | None = None,
    instruction: str | None = None,
    device: torch.device | str | None = None,
    report: Callable[[PoolingScore], None] = lambda _: None,
) -> PoolingTable:
    """Scores every variant with every pooling; one model at a time is in memory.

    Args:
        variants: of one run or of several.
        pairs: of sentences, with scores.
        echo: Echo's template, for a row beside Uni's (mean over the second copy); None = no such row.
        others: further encoders by name, such as encoder-only models; each with its own pooling.
        instruction: put before every sentence.
        device: None = CPU.
        report: called with every score as it comes.

    Raises:
        BivecError: files that are missing or damaged, fewer than two pairs, vectors that are not finite.
    """
    scores: list[PoolingScore] = []
    sentences = list(dict.fromkeys(s for pair in pairs for s in (pair.sentence1, pair.sentence2)))
    row_of = {sentence: row for row, sentence in enumerate(sentences)}

    def add(variant: str, pooling: str, embed: Callable[[list[str]], np.ndarray | Tensor]) -> None:
        scores.append(PoolingScore(variant, pooling, sts_spearman(embed, pairs)))
        report(scores[-1])

    for variant in variants:
        encoder = variant.load(device=device)
        vectors = embed_poolings(encoder, sentences, instruction=instruction)
        for pooling, found in vectors.items():
            add(variant.name, pooling, partial(_looked_up, found, row_of))
        if echo is not None and variant.name == "uni":
            twice = EchoEncoder(encoder, template=echo)
            add(ECHO, "mean", partial(twice.encode, instruction=instruction))
    for name, encoder in (others or {}).items():
        add(name, encoder.config.pooling, partial(encoder.encode, instruction=instruction))
    return PoolingTable(tuple(scores), len(pairs))


def _looked_up(vectors: np.ndarray, row_of: Mapping[str, int], sentences: list[str]) -> np.ndarray:
    return vectors[[row_of[sentence] for sentence in sentences]]


def embed_poolings(
    encoder: Encoder, sentences: Sequence[str], *, instruction: str | None = None, tokens_per_batch: int | None = None
) -> dict[str, np.ndarray]:
    """The same vectors as ``encode`` with each of ``TITLES``, in one forward (causal) or in two.

    Args:
        encoder: a decoder; its own pooling does not count.
        sentences: N of them.
        instruction: put before every sentence.
        tokens_per_batch: see :meth:`Encoder.encode`.

    Returns:
        By pooling, float32 [N, D].

    Raises:
        ConfigError: the tokenizer has no EOS.
    """
    rows = {pooling: _rows(encoder, sentences, pooling, instruction) for pooling in TITLES}
    plain, ended = rows["mean"], rows["eos_token"]
    if encoder.config.causal and all(a.input_ids == b.input_ids[:-1] for a, b in zip(plain, ended, strict=True)):
        passes = [(ended, tuple(TITLES))]
    else:
        passes = [(plain, ("mean", "weighted_mean")), (ended, ("eos_token",))]
    result = {pooling: np.empty((len(sentences), encoder.dimension), np.float32) for pooling in TITLES}
    for read, poolings in passes:
        inputs = [row.input_ids for row in read]
        for hidden, cu_seqlens, indices in encoder.hidden_states(inputs, tokens_per_batch=tokens_per_batch):
            for pooling in poolings:
                spans = [(rows[pooling][i].start, rows[pooling][i].end) for i in indices]
                result[pooling][indices] = encoder.pool_spans(hidden, cu_seqlens, spans, pooling).cpu().numpy()
    return result


def pooling_markdown(table: PoolingTable, *, paper_model: str = PAPER_MODEL) -> str:
    """The table, beside the paper's Table 5 (15 tasks) and the STS column of its Table 1 (10 tasks).

    Args:
        table: of ours.
        paper_model: which of the paper's models.

    Raises:
        ConfigError: the paper has no such model.
    """
    theirs = {row.variant: row.scores for row in paper_rows("5", model=paper_model)}
    sts = {row.variant: row.scores["STS"] for row in paper_rows("1", model=paper_model)}
    names = list(TITLES.values())
    lines = [
        f"| state | {' | '.join(names)} | {' | '.join(f'paper: {name}' for name in names)} | paper: 10 STS tasks |",
        "|---|" + "---|" * (2 * len(names) + 1),
    ]
    for variant in table.variants:
        ours = [table.score(variant, pooling) for pooling in TITLES]
        paper = [theirs.get(variant, {}).get(pooling) for pooling in TITLES]
        cells = [_cell(value, 1) for value in ours] + [_cell(value, 2) for value in (*paper, sts.get(variant))]
        lines.append(f"| {variant} | {' | '.join(cells)} |")
    for variant, name in (("", "BERT, mean (paper)"), ("simcse", "BERT, SimCSE (paper)")):
        (row,) = paper_rows("1", model="BERT", variant=variant)
        lines.append(f"| {name} | {' | '.join([''] * 2 * len(names))} | {row.scores['STS']:.2f} |")
    note = (
        f"Ours: Spearman x 100 on {table.num_pairs} sentence pairs. Paper: {paper_model}, average of 15 MTEB tasks "
        "(Table 5), and of the 10 STS tasks (Table 1: Uni by weighted mean, the rest by mean)."
    )
    return "\n".join([*lines, "", note])


def draw_pooling_table(path: str | Path, table: PoolingTable, *, paper_model: str = PAPER_MODEL) -> None:
    """Bars by variant and pooling, ours and beside it the paper's Figure 3.

    Args:
        path: of the PNG file.
        table: of ours.
        paper_model: which of the paper's models.
    """
    figure = new_figure(12, 4)
    left, right = figure.subplots(1, 2, width_ratios=[len(table.variants), 6])
    _bars(left, table.variants, table.score)
    left.set(title=f"STS, {table.num_pairs} pairs", ylabel="Spearman x 100")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    theirs = {row.variant: row.scores for row in paper_rows("5", model=paper_model)}
    _bars(right, list(theirs), lambda variant, pooling: theirs[variant][pooling])
    right.set(title=f"paper: {paper_model}, average of 15 MTEB tasks")
    save_figure(figure, path)


def _bars(axis: Any, variants: list[str], score: Callable[[str, str], float | None]) -> None:
    width = 0.27
    for shift, (pooling, label) in enumerate(TITLES.items()):
        values = [score(variant, pooling) for variant in variants]
        places = [place + (shift - 1) * width for place, value in enumerate(values) if value is not None]
        axis.bar(places, [value for value in values if value is not None], width, label=label)
    axis.set_xticks(range(len(variants)), [name.replace("+", "+\n") for name in variants], fontsize=8)
    axis.axhline(0, color="black", linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)


def _rows(encoder: Encoder, sentences: Sequence[str], pooling: str, instruction: str | None) -> list[Row]:
    rule = text_format(replace(encoder.config, pooling=pooling), encoder.tokenizer)
    head = encoding_head(instruction or "")
    return rule.rows([head] * len(sentences), list(sentences), allow_empty=True)


def _cell(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
