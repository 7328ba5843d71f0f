"""What the mask does to the hidden states: the same model on the same text, causal and bidirectional (METHOD 8.2).

For every layer, the embedding output (layer 0) included, and every token: the cosine between its state under the one
mask and under the other, with no training in between. Last is the state after the final norm.

Hidden states of a decoder point into a narrow cone, so that even states of different tokens are not far from each
other. How near, is the floor beside it: without it a cosine of 0.6 says nothing.

Source: paper, section 4.2 and Figures 5, 8, 9.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bivec.engine.data import load_texts
from bivec.engine.encoder import Encoder
from bivec.engine.errors import DataError
from bivec.engine.evaluation.auto_encoder import AutoEncoder
from bivec.engine.evaluation.paper import paper_findings
from bivec.engine.figure import new_figure, save_figure
from bivec.engine.packing import token_budget_batches
from bivec.engine.text_format import encode_strings
from bivec.models import PackedBatch

PARAGRAPH_WORDS = range(110, 150)  # the paper's paragraph has 107 words, about 180 tokens
TOKENS_PER_BATCH = 1024  # the states of all layers are kept: 2 x layers x tokens x width x 4 bytes, 0.15 GB at 135M


@dataclass(frozen=True)
class MaskSimilarity:
    """Cosines between the hidden states of a model under both masks."""

    name: str
    tokens: tuple[tuple[str, ...], ...]  # of every text, special ones included
    cosines: tuple[np.ndarray, ...]  # of every text, float32 [layers + 1, tokens]
    floors: tuple[np.ndarray, ...]  # of every text, float32 [layers + 1]: mean cosine of two different tokens, causal

    @property
    def by_layer(self) -> np.ndarray:
        """[layers + 1]: the mean over all tokens of all texts."""
        means: np.ndarray = np.concatenate(self.cosines, axis=1).mean(axis=1)
        return means

    @property
    def floor(self) -> np.ndarray:
        """[layers + 1]: the mean of the floors of the texts; NaN where no text has two tokens."""
        found = [floor for floor in self.floors if not np.isnan(floor).any()]
        return np.mean(found, axis=0) if found else np.full(len(self.floors[0]), np.nan)

    @property
    def by_position(self) -> np.ndarray:
        """[layers + 1, longest text]: the mean over the texts that reach so far."""
        longest = max(one.shape[1] for one in self.cosines)
        padded = [np.pad(one, ((0, 0), (0, longest - one.shape[1])), constant_values=np.nan) for one in self.cosines]
        return np.asarray(np.nanmean(padded, axis=0))

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {
            "name": self.name,
            "by_layer": [round(value, 4) for value in self.by_layer.tolist()],
            "floor": [None if np.isnan(value) else round(value, 4) for value in self.floor.tolist()],
            "texts": [
                {"tokens": list(tokens), "cosines": np.round(cosines.astype(np.float64), 4).tolist()}
                for tokens, cosines in zip(self.tokens, self.cosines, strict=True)
            ],
        }


def sample_paragraphs(file: str | Path, number: int) -> list[str]:
    """The first paragraphs of a ``.txt`` of about the length of the paper's, one a line.

    Args:
        file: the shipped WikiText, for instance.
        number: how many.
    """
    return [text for text in load_texts(file) if len(text.split()) in PARAGRAPH_WORDS][:number]


def mask_similarity(name: str, encoder: Encoder, texts: Sequence[str]) -> MaskSimilarity:
    """Runs the texts under both masks and compares the states of every layer.

    Args:
        name: of the result.
        encoder: a decoder; its own mask, pooling and template do not count.
        texts: one or many, each cut at the encoder's ``max_length``.

    Raises:
        DataError: no texts, a text without tokens, or an encoder-only model, which has no causal mask.
    """
    if isinstance(encoder, AutoEncoder):
        raise DataError(f"{name}: an encoder-only model has no causal mask to compare with")
    encodings = encode_strings(encoder.tokenizer, texts)
    rows = [encoding.ids[: encoder.config.max_length] for encoding in encodings]
    if not rows or not all(rows):
        raise DataError(f"{name}: the similarity of the masks needs texts with at least one token each")
    cosines: list[np.ndarray] = [np.empty(0)] * len(rows)
    floors = list(cosines)
    for group in token_budget_batches([len(row) for row in rows], TOKENS_PER_BATCH):
        batch = PackedBatch.from_sequences([rows[i] for i in group], device=encoder.device)
        for i, (found, floor) in zip(group, _compare(encoder, batch), strict=True):
            cosines[i], floors[i] = found, floor
    tokens = tuple(tuple(encoding.tokens[: len(row)]) for encoding, row in zip(encodings, rows, strict=True))
    return MaskSimilarity(name, tokens, tuple(cosines), tuple(floors))


def similarity_markdown(results: Sequence[MaskSimilarity]) -> str:
    """Mean cosine and floor by layer, a pair of columns a model, and what the paper found."""
    header = " | ".join(f"{one.name} | floor" for one in results)
    lines = [f"| layer | {header} |", "|---|" + "---|---|" * len(results)]
    for layer in range(max(len(one.by_layer) for one in results)):
        cells = [
            f"{one.by_layer[layer]:.3f} | {one.floor[layer]:.3f}" if layer < len(one.by_layer) else " | "
            for one in results
        ]
        lines.append(f"| {layer} | {' | '.join(cells)} |")
    note = (
        "Mean over all tokens of cos(causal, bidirectional), no training; floor: mean cosine of two different tokens, "
        "causal."
    )
    return "\n".join([*lines, "", note, "", f"Paper: {paper_findings()['layer_similarity']}"])


def draw_similarity(path: str | Path, results: Sequence[MaskSimilarity]) -> None:
    """One heat map (layer x position) a model, the mean over its texts, and the mean by layer of all.

    Args:
        path: of the PNG file.
        results: one at least.
    """
    figure = new_figure(5 * len(results) + 4, 4)
    *maps, lines = figure.subplots(1, len(results) + 1)
    for axis, one in zip(maps, results, strict=True):
        grid = one.by_position
        image = axis.imshow(grid, cmap="plasma", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        texts = "" if len(one.cosines) == 1 else f", mean of {len(one.cosines)}"
        axis.set(title=f"{one.name}{texts}", xlabel="token position", ylabel="layer")
        (line,) = lines.plot(one.by_layer, range(len(grid)), label=one.name)
        lines.plot(one.floor, range(len(grid)), "--", color=line.get_color(), label="floor: two tokens")
    figure.colorbar(image, ax=maps, pad=0.01, label="cos(causal, bidirectional)")
    lines.set(xlabel="mean cosine", ylabel="layer", xlim=(min(0, *lines.get_xlim()), 1.02))
    lines.invert_yaxis()
    lines.spines[["top", "right"]].set_visible(False)
    lines.legend(frameon=False)
    save_figure(figure, path)


@torch.no_grad()
def _compare(encoder: Encoder, batch: PackedBatch) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of every sequence: the cosines [layers + 1, tokens] between the masks, the floor [layers + 1]; float32."""
    causal, bidirectional = (
        encoder.model(batch, causal=mask, output_hidden_states=True, backend=encoder.backend)[1]
        for mask in (True, False)
    )
    lengths = batch.cu_seqlens.diff().tolist()
    layers: list[list[tuple[torch.Tensor, float]]] = [[] for _ in lengths]
    for states in zip(causal, bidirectional, strict=True):
        # in float64: the norm of an attention sink is a thousand times that of its neighbours
        one, other = (torch.nn.functional.normalize(each.double(), dim=-1) for each in states)  # [T, D]
        for found, a, b in zip(layers, one.split(lengths), other.split(lengths), strict=True):
            found.append(((a * b).sum(-1), _mean_pair(a)))
    return [
        (torch.stack([cosines for cosines, _ in found]).float().cpu().numpy(), np.array([f for _, f in found], "f4"))
        for found in layers
    ]


def _mean_pair(units: torch.Tensor) -> float:
    """The mean cosine of two different rows of unit vectors [n, D]; the square of their sum holds every pair twice."""
    n = len(units)
    return float("nan") if n < 2 else float((units.sum(0).square().sum() - n) / (n * (n - 1)))
