"""The calls that the numerics self-test makes: every operator, by every path that a shape or dtype chooses.

What chooses: in attention 64 and 128 tokens in 16 bits, the options, 256 dims a head; elsewhere rows wider than a
block, more rows than there are partial sums, gaps between rows, spans in no order, a dtype of its own for adapters or
weight, and who wants a gradient. Shapes are small, and multiples of nothing where no path asks for more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from bivec import kernels
from bivec.kernels import reference
from bivec.kernels.attention import attention_dropout_mask
from bivec.kernels.dropout import linear_keep_mask

DTYPES = (torch.float32, torch.bfloat16)  # one of each width, by which the kernels choose
SEED = 7
SHORT = (0, 3, 4, 4, 21, 60)  # offsets: an empty sequence, one of one token
TOKENS = SHORT[-1]

Call = Callable[..., "Tensor | tuple[Tensor, ...]"]


@dataclass(frozen=True)
class Case:
    """One way to call an operator."""

    op: str
    label: str
    shapes: Mapping[str, tuple[int, ...]]  # of the inputs that get gradients, by name
    ours: Call  # inputs, and backend=
    exact: Call  # the same inputs in float64
    fixed: dict[str, Tensor] = field(default_factory=dict)  # inputs without a gradient; float64 = of the case's dtype
    dtypes: tuple[torch.dtype, ...] = DTYPES


def cases() -> list[Case]:
    """One for every operator at least."""
    return [
        *_attention_cases(),
        *_cross_entropy_cases(),
        *_info_nce_cases(),
        *_layer_cases(),
        *_pool_cases(),
        *_lora_cases(),
    ]


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Random numbers that are the same everywhere, float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _attention_cases() -> list[Case]:
    every: dict[str, Any] = {"causal": True, "window": (9, -1), "softcap": 5.0, "dropout_p": 0.2}
    far = every | {"window": (99, -1)}
    return [
        _attention("bidirectional, grouped heads", SHORT, (6, 2, 40)),
        _attention("causal, window, softcap, dropout", SHORT, (6, 2, 40), **every),
        _attention("105 tokens", (0, 5, 110), (2, 1, 64)),
        _attention("203 tokens", (0, 203, 210), (2, 1, 64)),
        _attention("150 tokens, causal, window, softcap, dropout", (0, 150, 157), (2, 1, 128), **far),
        _attention("256 dims a head", (0, 37), (2, 1, 256)),
    ]


def _attention(label: str, offsets: tuple[int, ...], heads: tuple[int, int, int], **options: Any) -> Case:
    """``heads``: of the queries, of the keys, dims."""
    queries, keys, dims = heads
    cu_seqlens = torch.tensor(offsets, dtype=torch.int32)
    longest = int(cu_seqlens.diff().max())
    seeded: dict[str, Any] = {"seed": SEED} if "dropout_p" in options else {}

    def ours(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, backend: str) -> Tensor:
        attended: Tensor = kernels.flash_attention(q, k, v, cu_seqlens, longest, backend=backend, **options, **seeded)
        return attended

    def exact(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
        keep = attention_dropout_mask(SEED, cu_seqlens, queries, options["dropout_p"]) if seeded else None
        return reference.attention(q, k, v, cu_seqlens, keep_masks=keep, **options)[0]

    shapes = {"q": (offsets[-1], queries, dims), "k": (offsets[-1], keys, dims), "v": (offsets[-1], keys, dims)}
    return Case("flash_attention", label, shapes, ours, exact, {"cu_seqlens": cu_seqlens})


def _cross_entropy_cases() -> list[Case]:
    targets = torch.arange(13) * 7 % 101
    targets[4] = -100  # ignored
    index = torch.arange(13) * 3 % 17
    return [
        Case(
            "linear_cross_entropy",
            "rows by index, an ignored one, softcap",
            {"hidden": (17, 24), "weight": (101, 24)},
            lambda backend, **x: kernels.linear_cross_entropy(**x, softcap=8.0, backend=backend),
            lambda **x: reference.linear_cross_entropy(**x, softcap=8.0),
            {"targets": targets, "index": index},
        ),
        Case(
            "linear_cross_entropy",
            "2,100 words, a loss for every row, in chunks",
            {"hidden": (13, 24), "weight": (2100, 24)},
            lambda backend, **x: kernels.linear_cross_entropy(
                **x, reduction="none", workspace_bytes=100_000, backend=backend
            ),
            lambda **x: reference.linear_cross_entropy(**x, reduction="none"),
            {"targets": targets},
            (*DTYPES, torch.float16),  # whose gradients are scaled
        ),
        Case(
            "linear_cross_entropy",
            "a frozen weight in fp32",
            {"hidden": (13, 24)},
            lambda hidden, weight, targets, backend: kernels.linear_cross_entropy(
                hidden, weight.float(), targets, backend=backend
            ),
            reference.linear_cross_entropy,
            {"weight": normal(2048, 24), "targets": targets},
        ),
    ]


def _info_nce_cases() -> list[Case]:
    ids = {"query_ids": torch.arange(7), "candidate_ids": torch.tensor([0, 1, 2, 1, 4, 5, 6])}  # 3 is 1 again: left out
    own: dict[str, Any] = {"scale": 20.0, "margin": 0.05, "reduction": "none"}
    prefixes: dict[str, Any] = {"normalize": False, "matryoshka_dims": (24, 40)}
    return [
        Case(
            "info_nce",
            "hard negatives, ids, query against query",
            {"queries": (7, 24), "candidates": (7, 24), "hard_negatives": (5, 24)},
            lambda backend, **x: kernels.info_nce(**x, scale=5.0, include_query_query=True, backend=backend),
            lambda **x: reference.info_nce(**x, scale=5.0, include_query_query=True),
            ids,
        ),
        Case(
            "info_nce",
            "both directions",
            {"queries": (9, 40), "candidates": (9, 40)},
            lambda backend, **x: kernels.info_nce(**x, scale=20.0, symmetric=True, backend=backend),
            lambda **x: reference.info_nce(**x, scale=20.0, symmetric=True),
        ),
        Case(
            "info_nce",
            "530 fixed candidates of 1,100 dims, own hard negatives, margin, a loss for every row",
            {"queries": (9, 1100), "hard_negatives": (9, 2, 1100)},
            lambda backend, **x: kernels.info_nce(**x, **own, backend=backend),
            lambda **x: reference.info_nce(**x, **own),
            {"candidates": normal(530, 1100)},
        ),
        Case(
            "info_nce",
            "prefixes, a learned scale, not normalised",
            {"queries": (9, 40), "candidates": (11, 40), "scale": ()},
            lambda scale, backend, **x: kernels.info_nce(**x, scale=(scale + 3) / 10, **prefixes, backend=backend),
            lambda scale, **x: reference.info_nce(**x, scale=(scale + 3) / 10, **prefixes),
        ),
    ]


def _layer_cases() -> list[Case]:
    def tables(half: int) -> dict[str, Tensor]:
        angles = torch.arange(48.0)[:, None] * 100.0 ** -(torch.arange(half) / half)
        return {"cos": angles.cos(), "sin": angles.sin(), "position_ids": torch.arange(13) * 5 % 48}

    def norm(label: str, shapes: Mapping[str, tuple[int, ...]], **fixed: Tensor) -> Case:
        return Case(
            "rms_norm",
            label,
            shapes,
            lambda backend, **x: kernels.rms_norm(**x, eps=1e-5, weight_offset=1.0, backend=backend),
            lambda **x: reference.rms_norm(**x, eps=1e-5, weight_offset=1.0),
            fixed,
        )

    def sliced(both: Tensor, backend: str) -> Tensor:
        both = both.clone()  # which is overwritten
        return kernels.swiglu(both[:, :1100], both[:, 1100:], overwrite=True, backend=backend)

    gated = {"gate": (13, 72), "up": (13, 72)}
    return [
        norm("residual, (1 + weight)", {"x": (13, 72), "residual": (13, 72), "weight": (72,)}),
        norm("rows of 8,200", {"x": (3, 8200), "residual": (3, 8200), "weight": (8200,)}),
        replace(norm("520 rows of 1,030", {"x": (520, 1030), "weight": (1030,)}), dtypes=(torch.float32,)),
        norm("a frozen weight", {"x": (13, 72)}, weight=normal(72)),
        Case(
            "apply_rotary",
            "grouped heads",
            {"q": (13, 6, 40), "k": (13, 2, 40)},
            lambda backend, **x: kernels.apply_rotary(**x, backend=backend),
            reference.apply_rotary,
            tables(20),
        ),
        Case(
            "apply_rotary",
            "20 heads of 256 dims, in place",
            {"q": (13, 20, 256), "k": (13, 1, 256)},
            lambda q, k, backend, **x: kernels.apply_rotary(q.clone(), k.clone(), **x, inplace=True, backend=backend),
            reference.apply_rotary,
            tables(128),
        ),
        Case("swiglu", "", gated, lambda backend, **x: kernels.swiglu(**x, backend=backend), reference.swiglu),
        Case(
            "swiglu",
            "halves of rows of 2,200, overwritten",
            {"both": (5, 2200)},
            sliced,
            lambda both: reference.swiglu(both[:, :1100], both[:, 1100:]),
        ),
        Case("geglu", "", gated, lambda backend, **x: kernels.geglu(**x, backend=backend), reference.geglu),
    ]


def _pool_cases() -> list[Case]:
    spans = {"span_starts": torch.tensor([21, 3, 4, 4, 1]), "span_ends": torch.tensor([59, 4, 4, 21, 40])}
    found = []
    for mode, width, given in (
        ("mean", 40, {}),
        ("mean", 300, spans),
        ("weighted_mean", 300, spans),
        ("first", 40, spans),
        ("last", 40, {}),
    ):

        def ours(hidden: Tensor, backend: str, mode: str = mode, **x: Tensor) -> Tensor:
            return kernels.segment_pool(hidden, mode=mode, backend=backend, **x)

        def exact(hidden: Tensor, mode: str = mode, **x: Tensor) -> Tensor:
            return reference.segment_pool(hidden, mode=mode, **x)

        fixed = {"cu_seqlens": torch.tensor(SHORT, dtype=torch.int32), **given}
        label = mode.replace("_", " ") + (f" of spans, {width} wide" if given else "")
        found.append(Case("segment_pool", label, {"hidden": (TOKENS, width)}, ours, exact, fixed))
    return found


def _lora_cases() -> list[Case]:
    one = {"x": (13, 40), "lora_a": (6, 40), "lora_b": (56, 6), "bias": (56,)}
    several = {"x": (13, 40), "a1": (6, 40), "b1": (56, 6), "a2": (6, 40), "b2": (24, 6)}

    def keep(x: Tensor) -> Tensor:
        return linear_keep_mask(SEED, torch.arange(len(x)), x.shape[1], 0.25)

    def ours(x: Tensor, *, backend: str, **by_name: Tensor) -> tuple[Tensor, ...]:
        w, a, b = ([by_name[f"{kind}{i}"] for i in (1, 2)] for kind in "wab")
        return kernels.lora_linears(x, w, a, b, 2.0, backend=backend)

    def exact(x: Tensor, **by_name: Tensor) -> tuple[Tensor, ...]:
        sets = [[by_name[f"{kind}{i}"] for kind in "wab"] for i in (1, 2)]
        return tuple(reference.lora_linear(x, w, a, b, 2.0) for w, a, b in sets)

    return [
        Case(
            "lora_linear",
            "bias, dropout",
            one,
            lambda backend, **x: kernels.lora_linear(**x, scaling=2.0, dropout_p=0.25, seed=SEED, backend=backend),
            lambda **x: reference.lora_linear(**x, scaling=2.0, dropout_p=0.25, keep_mask=keep(x["x"])),
            {"weight": normal(56, 40, seed=5)},
        ),
        Case(
            "lora_linear",
            "rank 40, 300 tokens, adapters in fp32, a trained weight",
            {"x": (300, 80), "lora_a": (40, 80), "lora_b": (72, 40), "weight": (72, 80)},
            lambda x, lora_a, lora_b, weight, backend: kernels.lora_linear(
                x, weight, lora_a.float(), lora_b.float(), 2.0, backend=backend
            ),
            lambda **x: reference.lora_linear(**x, scaling=2.0),
        ),
        Case(
            "lora_linears",
            "two projections",
            several,
            ours,
            exact,
            {"w1": normal(56, 40, seed=5), "w2": normal(24, 40)},
        ),
    ]
