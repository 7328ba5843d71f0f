"""What a training step's matrix products cost alone: the rate that the step is held against."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from bivec.models import Checkpoint

LAYERS = 3  # a measurement
HEAD_ROWS = 512  # at most


def synchronise(device: torch.device) -> None:
    """Waits for the GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Gemms:
    """The products of a step with the frozen weights, forward and gradient of the input, into buffers that exist."""

    def __init__(self, checkpoint: Checkpoint, tokens: int, scored_rows: int):
        """Before an adapter is added.

        Args:
            checkpoint: gives the weights, so that the caches meet as many as in a step.
            tokens: rows of the projections.
            scored_rows: rows of the LM head; 0 = it takes no part.
        """
        layers: dict[str, list[Tensor]] = {}
        for name, weight in checkpoint.model.layers.named_parameters():
            if weight.dim() == 2:
                layers.setdefault(name.partition(".")[0], []).append(weight.detach())
        self.layers, self.tokens = list(layers.values()), tokens
        self.scored_rows, self.head_rows = scored_rows, min(HEAD_ROWS, scored_rows)
        self.head = checkpoint.lm_head_weight.detach() if self.head_rows else None
        sizes = {(tokens, width) for weight in self.layers[0] for width in weight.shape}
        if self.head is not None:
            sizes |= {(self.head_rows, width) for width in self.head.shape}
        like = self.layers[0][0]
        self.inputs = {size: torch.randn(size, dtype=like.dtype, device=like.device) for size in sizes}
        self.outputs = {size: torch.empty_like(x) for size, x in self.inputs.items()}

    def flops_per_s(self, turn: int) -> float:
        """Measured once, on a few of the layers, others every turn; layers and head weigh as in a step."""
        count = min(LAYERS, len(self.layers))
        chosen = [self.layers[(turn * count + i) % len(self.layers)] for i in range(count)]
        seconds, flops = self._run([(self.tokens, weight) for weights in chosen for weight in weights])
        seconds, flops = seconds * len(self.layers) / count, flops * len(self.layers) / count
        if self.head is not None:
            head_seconds, head_flops = self._run([(self.head_rows, self.head)])
            share = self.scored_rows / self.head_rows
            seconds, flops = seconds + head_seconds * share, flops + head_flops * share
        return flops / seconds

    def _run(self, work: list[tuple[int, Tensor]]) -> tuple[float, float]:
        """Seconds and FLOPs of the products of so many rows with each weight, forward and backward."""
        device = work[0][1].device
        synchronise(device)
        started = time.perf_counter()
        for rows, weight in work:
            out_size, in_size = ((rows, width) for width in weight.shape)
            torch.mm(self.inputs[in_size], weight.T, out=self.outputs[out_size])
            torch.mm(self.inputs[out_size], weight, out=self.outputs[in_size])
        synchronise(device)
        return time.perf_counter() - started, sum(4.0 * rows * weight.numel() for rows, weight in work)
