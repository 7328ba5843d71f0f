"""The losses that benchmarks/losses.py compares, each behind the same call, and the reference they are held against."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bivec.kernels import info_nce, linear_cross_entropy
from bivec.kernels import reference as exact
from bivec.kernels.gemm import multiply_

CROSS_ENTROPY, SELECTED = "linear_cross_entropy", "linear_cross_entropy of 20 %"
ONE_WAY, SYMMETRIC = "info_nce", "info_nce symmetric"
CROSS_ENTROPIES, INFO_NCE = (CROSS_ENTROPY, SELECTED), (ONE_WAY, SYMMETRIC)
LOSSES = CROSS_ENTROPIES + INFO_NCE
MINI_BATCH_BYTES = 32 * 2**20  # fp32 logits of a mini-batch of sentence-transformers' cached loss
GEMM_BYTES = 256 * 2**20  # fp32 logits of a chunk of the products alone


@dataclass(frozen=True, eq=False)
class Work:
    """One batch; ``x`` requires its gradient, ``y`` may."""

    loss: str  # of LOSSES
    x: Tensor  # [T, D] hidden states, or [N, D] queries
    y: Tensor  # [V, D] the head's weight, or [N, D] candidates
    targets: Tensor  # [N] int64
    scale: float  # of info_nce
    index: Tensor | None = None  # [N] int64, the rows of x that have a target; None = all

    @property
    def rows(self) -> Tensor:
        """The rows of x that have a target, gathered."""
        return self.x if self.index is None else self.x[self.index]

    @property
    def leaves(self) -> list[Tensor]:
        """The operands that get a gradient."""
        return [leaf for leaf in (self.x, self.y) if leaf.requires_grad]


@dataclass(frozen=True)
class Peer:
    """An implementation."""

    prepare: Callable[[Work], Callable[[], None]]  # gives the step: forward and backward, the gradients in ``.grad``
    losses: tuple[str, ...]
    module: str | None = None  # what must be importable
    needs_gpu: bool = False
    is_loss: bool = True  # whether it has gradients to judge


def gradients(step: Callable[[], None], work: Work) -> list[Tensor]:
    """Runs the step once; the gradients, which are left nowhere else."""
    for leaf in work.leaves:
        leaf.grad = None
    step()
    found = [leaf.grad for leaf in work.leaves]
    for leaf in work.leaves:
        leaf.grad = None
    return found


def exact_cross_entropy(rows: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Mean of log(1 + Σ exp(z - z_target)) over the other logits; softmax - 1 has no digits near 0, in float64 too."""
    logits = rows @ weight.T
    picked = logits.gather(1, targets[:, None])
    others = logits.scatter(1, targets[:, None], -torch.inf).logsumexp(1, keepdim=True)
    return F.softplus(others - picked, threshold=1e9).mean()


def reference(work: Work) -> list[Tensor]:
    """The gradients in float64, of the same (already rounded) operands, on the CPU."""
    x, y = (leaf.detach().cpu().double().requires_grad_(leaf.requires_grad) for leaf in (work.x, work.y))
    index = None if work.index is None else work.index.cpu()
    wide = Work(work.loss, x, y, work.targets.cpu(), work.scale, index)
    if work.loss in CROSS_ENTROPIES:
        loss = exact_cross_entropy(wide.rows, y, wide.targets)
    else:
        loss = exact.info_nce(x, y, scale=work.scale, symmetric=work.loss == SYMMETRIC)
    return gradients(loss.backward, wide)


def _backward(loss: Callable[[], Tensor]) -> Callable[[], None]:
    return lambda: loss().backward()


def bivec_step(work: Work) -> Callable[[], None]:
    """Ours, with the device's default backend."""
    if work.loss in CROSS_ENTROPIES:
        return _backward(partial(linear_cross_entropy, work.x, work.y, work.targets, work.index))
    return _backward(partial(info_nce, work.x, work.y, scale=work.scale, symmetric=work.loss == SYMMETRIC))


def _plain_cross_entropy(x: Tensor, y: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(x @ y.T, targets)


def _plain_info_nce(x: Tensor, y: Tensor, targets: Tensor, scale: float, symmetric: bool) -> Tensor:
    logits = scale * (F.normalize(x, dim=-1) @ F.normalize(y, dim=-1).T)
    loss = F.cross_entropy(logits, targets)
    return (loss + F.cross_entropy(logits.T, targets)) / 2 if symmetric else loss


def plain_step(work: Work, compiled: bool = False) -> Callable[[], None]:
    """What one writes by hand, all logits at once and in the operands' dtype; or that, compiled."""
    wrap = torch.compile if compiled else lambda function: function
    if work.loss in CROSS_ENTROPIES:
        plain = wrap(_plain_cross_entropy)
        return _backward(lambda: plain(work.rows, work.y, work.targets))
    loss = partial(wrap(_plain_info_nce), work.x, work.y, work.targets, work.scale, work.loss == SYMMETRIC)
    return _backward(loss)


def liger_step(work: Work) -> Callable[[], None]:
    """Liger-Kernel's fused linear cross-entropy, as it comes."""
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    liger = LigerFusedLinearCrossEntropyLoss()
    return _backward(lambda: liger(work.y, work.rows, work.targets))


def cut_cross_entropy_step(work: Work) -> Callable[[], None]:
    """Cut Cross-Entropy, as it comes: small gradients are skipped (``filter_eps``)."""
    from cut_cross_entropy import linear_cross_entropy as cut

    return _backward(lambda: cut(work.rows, work.y, work.targets))


def memeff_step(work: Work) -> Callable[[], None]:
    """memeff's CLIP loss; ``stable=True``, its default, scales the gradients and is another function."""
    from memeff import MemoryEfficientCLIPLoss

    return _backward(partial(MemoryEfficientCLIPLoss(temperature=1.0 / work.scale, stable=False), work.x, work.y))


def sentence_transformers_step(work: Work) -> Callable[[], None]:
    """The loss stage of CachedMultipleNegativesRankingLoss, on embeddings that are there.

    GradCache embeds without gradients, forms loss and gradients of all embeddings in mini-batches of queries, and
    embeds again. The stage in the middle is ``calculate_loss`` with a backward for each mini-batch; it does not touch
    the model. Mini-batches are as large as fit ``MINI_BATCH_BYTES``, and at least the default of 32.
    """
    from sentence_transformers.losses import CachedMultipleNegativesRankingLoss

    options = {"mini_batch_size": max(32, min(len(work.x), MINI_BATCH_BYTES // (4 * len(work.y))))}
    if work.loss == SYMMETRIC:
        options |= {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
    loss = CachedMultipleNegativesRankingLoss(torch.nn.Sequential(torch.nn.Identity()), scale=work.scale, **options)
    return lambda: loss.calculate_loss([[work.x], [work.y]], with_backward=True)


def products_step(work: Work) -> Callable[[], None]:
    """Only the GEMMs of a loss in chunks: the logits, and for each gradient one with what has their shape.

    The least of them: a symmetric loss whose chunks hold rows or columns, as ours, makes twice as many.
    """
    x, y = work.rows.detach(), work.y.detach()
    size = min(len(x), max(1, GEMM_BYTES // (4 * len(y))))

    def step() -> None:
        logits = x.new_empty(size, len(y), dtype=torch.float32)
        slopes, d_x = x.new_zeros(size, len(y)), torch.empty_like(x)
        d_y = torch.zeros_like(y, dtype=torch.float32) if work.y.requires_grad else None
        for first in range(0, len(x), size):
            part = x[first : first + size]
            multiply_(logits[: len(part)], part, y.T, add=False)
            torch.mm(slopes[: len(part)], y, out=d_x[first : first + size])
            if d_y is not None:
                multiply_(d_y, slopes[: len(part)].T, part, add=True)

    return step


PEERS = {
    "bivec": Peer(bivec_step, LOSSES),
    "torch": Peer(plain_step, LOSSES),
    "GEMMs alone": Peer(products_step, LOSSES, is_loss=False),
    "torch.compile": Peer(partial(plain_step, compiled=True), LOSSES, needs_gpu=True),
    "liger": Peer(liger_step, CROSS_ENTROPIES, "liger_kernel"),
    "cut-cross-entropy": Peer(cut_cross_entropy_step, CROSS_ENTROPIES, "cut_cross_entropy"),
    "memeff": Peer(memeff_step, (SYMMETRIC,), "memeff"),
    "sentence-transformers": Peer(sentence_transformers_step, INFO_NCE, "sentence_transformers"),
}


def missing(device: torch.device) -> dict[str, str]:
    """The peers that cannot run here, and why."""
    reasons = {}
    for name, peer in PEERS.items():
        if peer.needs_gpu and device.type != "cuda":
            reasons[name] = "only on a GPU"
        elif peer.module is not None:
            try:
                importlib.import_module(peer.module)
            except Exception as error:  # of any kind: a build for another torch raises what it likes
                reasons[name] = f"{type(error).__name__}: {error}"
    return reasons
