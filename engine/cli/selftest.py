"""The numerics self-test: every operator, forward and backward, against its plain statement in float64.

    python -m bivec.engine.cli.selftest --backend torch --device cpu        # JSON on stdout, exit code 1 on a failure

Shapes are small and multiples of nothing; inputs are rounded to the dtype before the float64 run sees them, so what
is measured is the operator's own error. An output or gradient passes if its largest error is below the dtype's
tolerance times the largest exact value.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from bivec import kernels
from bivec.kernels import reference
from bivec.kernels.attention import attention_dropout_mask
from bivec.kernels.dropout import linear_keep_mask

# Relative to the largest exact value. On a CPU, torch's backend and Triton's in the interpreter are off by 6e-7 at most
# in fp32, 6e-3 in bf16 and 7e-4 in fp16; no GPU was at hand.
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
OPS = (
    "flash_attention",
    "linear_cross_entropy",
    "info_nce",
    "rms_norm",
    "apply_rotary",
    "swiglu",
    "geglu",
    "segment_pool",
    "lora_linear",
    "lora_linears",
)
CU_SEQLENS = torch.tensor([0, 3, 4, 4, 21, 60], dtype=torch.int32)  # an empty sequence, one of one token
TOKENS, LONGEST, SEED = 60, 39, 7

Call = Callable[..., "Tensor | tuple[Tensor, ...]"]


@dataclass(frozen=True)
class Case:
    """One way to call an operator."""

    op: str
    label: str
    shapes: dict[str, tuple[int, ...]]  # of the inputs that get gradients, by name
    ours: Call  # inputs, and backend=
    exact: Call  # the same inputs in float64
    fixed: dict[str, Tensor] = field(default_factory=dict)  # inputs without a gradient


@dataclass(frozen=True)
class Outcome:
    """How far one case was off."""

    op: str
    label: str
    backend: str
    device: str
    dtype: str
    error: float | None  # the largest, relative to the tolerance: above 1 it fails; None = nothing was computed
    problem: str  # what is wrong; "" = nothing

    @property
    def ok(self) -> bool:
        return not self.problem


def run(backend: str, device: str, dtypes: Sequence[torch.dtype] = (torch.float32,)) -> list[Outcome]:
    """Every case in every dtype."""
    return [_outcome(case, backend, device, dtype) for case in cases() for dtype in dtypes]


def cases() -> list[Case]:
    """One for every operator at least."""
    return [*_attention_cases(), *_loss_cases(), *_layer_cases(), *_pool_cases(), *_lora_cases()]


def _attention_cases() -> list[Case]:
    shapes = {"q": (TOKENS, 6, 40), "k": (TOKENS, 2, 40), "v": (TOKENS, 2, 40)}
    every = {"causal": True, "window": (9, -1), "softcap": 5.0, "dropout_p": 0.2}
    found = []
    for label, options in (("bidirectional, grouped heads", {}), ("causal, window, softcap, dropout", every)):
        seeded = {"seed": SEED} if "dropout_p" in options else {}

        def ours(q, k, v, cu_seqlens, backend, options=options, seeded=seeded):
            return kernels.flash_attention(q, k, v, cu_seqlens, LONGEST, backend=backend, **options, **seeded)

        def exact(q, k, v, cu_seqlens, options=options, seeded=seeded):
            keep = attention_dropout_mask(SEED, cu_seqlens, 6, options["dropout_p"]) if seeded else None
            return reference.attention(q, k, v, cu_seqlens, keep_masks=keep, **options)[0]

        found.append(Case("flash_attention", label, shapes, ours, exact, {"cu_seqlens": CU_SEQLENS}))
    return found


def _loss_cases() -> list[Case]:
    targets = torch.arange(13) * 7 % 101
    targets[4] = -100  # ignored
    index = torch.arange(13) * 3 % 17
    ids = {"query_ids": torch.arange(7), "candidate_ids": torch.tensor([0, 1, 2, 1, 4, 5, 6])}  # 3 is 1 again: left out

    def named(**fixed: Tensor) -> dict[str, Tensor]:
        return {"targets": targets, "index": index, **fixed}

    return [
        Case(
            "linear_cross_entropy",
            "rows by index, an ignored one, softcap",
            {"hidden": (17, 24), "weight": (101, 24)},
            lambda backend, **x: kernels.linear_cross_entropy(**x, softcap=8.0, backend=backend),
            lambda **x: reference.linear_cross_entropy(**x, softcap=8.0),
            named(),
        ),
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
    ]


def _layer_cases() -> list[Case]:
    angles = torch.arange(48.0)[:, None] * 100.0 ** -(torch.arange(20) / 20)
    tables = {"cos": angles.cos(), "sin": angles.sin(), "position_ids": torch.arange(13) * 5 % 48}
    gated = {"gate": (13, 72), "up": (13, 72)}
    return [
        Case(
            "rms_norm",
            "residual, (1 + weight)",
            {"x": (13, 72), "residual": (13, 72), "weight": (72,)},
            lambda backend, **x: kernels.rms_norm(**x, eps=1e-5, weight_offset=1.0, backend=backend),
            lambda **x: reference.rms_norm(**x, eps=1e-5, weight_offset=1.0),
        ),
        Case(
            "apply_rotary",
            "grouped heads",
            {"q": (13, 6, 40), "k": (13, 2, 40)},
            lambda backend, **x: kernels.apply_rotary(**x, backend=backend),
            reference.apply_rotary,
            tables,
        ),
        Case("swiglu", "", gated, lambda backend, **x: kernels.swiglu(**x, backend=backend), reference.swiglu),
        Case("geglu", "", gated, lambda backend, **x: kernels.geglu(**x, backend=backend), reference.geglu),
    ]


def _pool_cases() -> list[Case]:
    spans = {"span_starts": torch.tensor([1, 3, 4, 6, 21]), "span_ends": torch.tensor([3, 4, 4, 21, 59])}
    found = []
    for mode in ("mean", "weighted_mean", "last"):

        def ours(hidden, backend, mode=mode, **x):
            return kernels.segment_pool(hidden, mode=mode, backend=backend, **x)

        def exact(hidden, mode=mode, **x):
            return reference.segment_pool(hidden, mode=mode, **x)

        fixed = {"cu_seqlens": CU_SEQLENS, **(spans if mode != "last" else {})}
        found.append(Case("segment_pool", mode.replace("_", " "), {"hidden": (TOKENS, 40)}, ours, exact, fixed))
    return found


def _lora_cases() -> list[Case]:
    one = {"x": (13, 40), "lora_a": (6, 40), "lora_b": (56, 6), "bias": (56,)}
    several = {"x": (13, 40), "a1": (6, 40), "b1": (56, 6), "a2": (6, 40), "b2": (24, 6)}

    def keep(x: Tensor) -> Tensor:
        return linear_keep_mask(SEED, torch.arange(len(x)), x.shape[1], 0.25)

    def ours(x, a1, b1, a2, b2, w1, w2, backend):
        return kernels.lora_linears(x, [w1, w2], [a1, a2], [b1, b2], 2.0, backend=backend)

    def exact(x, a1, b1, a2, b2, w1, w2):
        return tuple(reference.lora_linear(x, w, a, b, 2.0) for w, a, b in ((w1, a1, b1), (w2, a2, b2)))

    return [
        Case(
            "lora_linear",
            "bias, dropout",
            one,
            lambda backend, **x: kernels.lora_linear(**x, scaling=2.0, dropout_p=0.25, seed=SEED, backend=backend),
            lambda **x: reference.lora_linear(**x, scaling=2.0, dropout_p=0.25, keep_mask=keep(x["x"])),
            {"weight": _normal(56, 40, seed=5)},
        ),
        Case(
            "lora_linears",
            "two projections",
            several,
            ours,
            exact,
            {"w1": _normal(56, 40, seed=5), "w2": _normal(24, 40)},
        ),
    ]


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _outcome(case: Case, backend: str, device: str, dtype: torch.dtype) -> Outcome:
    """Runs a case; whatever it raises is an outcome, too."""
    names = (case.op, case.label, backend, device, str(dtype).removeprefix("torch."))
    leaves = {name: _normal(*shape, seed=i).to(dtype) for i, (name, shape) in enumerate(case.shapes.items(), start=10)}
    fixed = {name: x.to(dtype) if x.dtype == torch.float64 else x for name, x in case.fixed.items()}
    exact = _run(case.exact, *({name: _wide(x) for name, x in part.items()} for part in (leaves, fixed)))
    try:
        here = ({name: x.to(device) for name, x in part.items()} for part in (leaves, fixed))
        found = _run(lambda **x: case.ours(backend=backend, **x), *here)
    except Exception as error:  # of any kind: the next cases are still to be tested
        return Outcome(*names, None, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
    worst, problems = 0.0, []
    for name, expected in exact.items():
        error = _error(found[name], expected) / TOLERANCES[dtype]
        worst = max(worst, error)
        if not error <= 1:
            problems.append(f"{name} is off by {error * TOLERANCES[dtype]:.1e} of its largest value")
    return Outcome(*names, worst, "; ".join(problems))


def _run(call: Call, leaves: dict[str, Tensor], fixed: dict[str, Tensor]) -> dict[str, Tensor]:
    """Outputs and gradients by name, on the CPU in float64."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in leaves.items()}
    outputs = call(**leaves, **fixed)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    # the gradients that arrive: eighths, which every dtype holds
    ways = [(_normal(*y.shape, seed=i) * 8).round().div(8).to(y) for i, y in enumerate(outputs, start=50)]
    found = {f"output {i}": y for i, y in enumerate(outputs)}
    gradients = torch.autograd.grad(outputs, list(leaves.values()), ways)
    found |= {f"the gradient of {name}": x for name, x in zip(leaves, gradients, strict=True)}
    return {name: x.detach().cpu().double() for name, x in found.items()}


def _wide(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def _error(found: Tensor, exact: Tensor) -> float:
    """The largest deviation, relative to the largest exact value; infinite for another shape or NaN."""
    if found.shape != exact.shape or not bool(found.isfinite().all()):
        return float("inf")
    largest = float(exact.abs().max()) if exact.numel() else 0.0
    return float((found - exact).abs().max()) / (largest or 1.0) if exact.numel() else 0.0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m bivec.engine.cli.selftest", description=__doc__.split("\n")[0])
    parser.add_argument("--backend", choices=("torch", "triton"), default="torch")
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args(arguments)
    outcomes = run(given.backend, given.device)
    print(json.dumps([asdict(one) for one in outcomes]))
    return 0 if all(one.ok for one in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
