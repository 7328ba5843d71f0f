"""What the mask does to the hidden states: the same model on the same text, causal and bidirectional (METHOD 8.2).

For every layer, the embedding output (layer 0) included, and every token: the cosine between its state under the one
mask and under the other, with no training in between. Last is the state after the final norm.

Source: paper, section 4.2 and Figures 5, 8, 9.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bivec.engine.encoder import Encoder
from bivec.engine.errors import DataError
from bivec.engine.evaluation.auto_encoder import AutoEncoder
from bivec.engine.evaluation.echo import encode_strings
from bivec.engine.evaluation.figure import new_figure, save_figure
from bivec.engine.evaluation.paper import paper_findings
from bivec.engine.packing import token_budget_batches
from bivec.models import PackedBatch

TOKENS_PER_BATCH = 1024  # the states of all layers are kept: 2 x layers x tokens x width x 4 bytes, 0.15 GB at 135M


@dataclass(frozen=True)
class MaskSimilarity:
    """Cosines between the hidden states of a model under both masks."""

    name: str
    tokens: tuple[tuple[str, ...], ...]  # of every text, special ones included
    cosines: tuple[np.ndarray, ...]  # of every text, float32 [layers + 1, tokens]

    @property
    def by_layer(self) -> np.ndarray:
        """[layers + 1]: the mean over all tokens of all texts."""
        return np.concatenate(self.cosines, axis=1).mean(axis=1)

    @property
    def by_position(self) -> np.ndarray:
        """[layers + 1, longest text]: the mean over the texts that reach so far."""
        longest = max(one.shape[1] for one in self.cosines)
        padded = [np.pad(one, ((0, 0), (0, longest - one.shape[1])), constant_values=np.nan) for one in self.cosines]
        return np.nanmean(padded, axis=0)

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "by_layer": [round(value, 4) for value in self.by_layer.tolist()],
            "texts": [
                {"tokens": list(tokens), "cosines": np.round(cosines.astype(np.float64), 4).tolist()}
                for tokens, cosines in zip(self.tokens, self.cosines, strict=True)
            ],
        }


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
    for group in token_budget_batches([len(row) for row in rows], TOKENS_PER_BATCH):
        batch = PackedBatch.from_sequences([rows[i] for i in group], device=encoder.device)
        found = _batch_cosines(encoder, batch)  # [layers + 1, T]
        for i, part in zip(group, found.split(batch.cu_seqlens.diff().tolist(), dim=1), strict=True):
            cosines[i] = part.cpu().numpy()
    tokens = tuple(tuple(encoding.tokens[: len(row)]) for encoding, row in zip(encodings, rows, strict=True))
    return MaskSimilarity(name, tokens, tuple(cosines))


def similarity_markdown(results: Sequence[MaskSimilarity]) -> str:
    """Mean cosine by layer, one column a model, and what the paper found."""
    depth = max(len(one.by_layer) for one in results)
    lines = [f"| layer | {' | '.join(one.name for one in results)} |", "|---|" + "---|" * len(results)]
    for layer in range(depth):
        cells = [f"{one.by_layer[layer]:.3f}" if layer < len(one.by_layer) else "" for one in results]
        lines.append(f"| {layer} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"Paper: {paper_findings()['layer_similarity']}"])


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
        texts = "1 text" if len(one.cosines) == 1 else f"mean of {len(one.cosines)} texts"
        axis.set(title=f"{one.name}: cos(causal, bidirectional), {texts}", xlabel="token position", ylabel="layer")
        lines.plot(one.by_layer, range(len(grid)), label=one.name)
    figure.colorbar(image, ax=maps, pad=0.01)
    lines.set(xlabel="mean cosine", ylabel="layer", xlim=(min(0, *lines.get_xlim()), 1.02))
    lines.invert_yaxis()
    lines.spines[["top", "right"]].set_visible(False)
    lines.legend(frameon=False)
    save_figure(figure, path)


@torch.no_grad()
def _batch_cosines(encoder: Encoder, batch: PackedBatch) -> torch.Tensor:
    """[layers + 1, T] float32."""
    masks = (True, False)
    causal, bidirectional = (
        encoder.model(batch, causal=mask, output_hidden_states=True, backend=encoder.backend)[1] for mask in masks
    )
    # in float64: the norm of an attention sink is a thousand times that of its neighbours
    pairs = zip(causal, bidirectional, strict=True)
    return torch.stack([torch.cosine_similarity(a.double(), b.double(), dim=-1) for a, b in pairs]).float()
