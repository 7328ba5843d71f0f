"""The numerics self-test: every operator, forward and backward, against its plain statement in float64.

    python -m bivec.engine.cli.selftest --backend torch --device cpu        # JSON on stdout, exit code 1 on a failure

The calls are those of ``selftest_cases``. Inputs are rounded to the dtype before the float64 run sees them, so what
is measured is the operator's own error. An output or gradient passes if its largest error is below the dtype's
tolerance times the largest exact value.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from bivec.engine.cli.selftest_cases import Call, Case, cases, normal
from bivec.engine.errors import first_line

# Relative to the largest exact value. On a CPU, torch's backend and Triton's in the interpreter are off by 8e-7 at most
# in fp32, 1.1e-2 in bf16 and 7e-4 in fp16; no GPU was at hand.
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
# Triton's interpreter multiplies the bit patterns of bf16, as integers: these take fp16 there, by the same paths.
MULTIPLYING = ("flash_attention", "lora_linear", "lora_linears")


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
        """Whether it was computed, and nothing is off by more than the tolerance."""
        return not self.problem


def run(backend: str, device: str) -> list[Outcome]:
    """Every case in each of its dtypes."""
    pairs = [(case, _possible(case.op, backend, device, dtype)) for case in cases() for dtype in case.dtypes]
    return [_outcome(case, backend, device, dtype) for case, dtype in pairs]


def _possible(op: str, backend: str, device: str, dtype: torch.dtype) -> torch.dtype:
    interpreted = backend == "triton" and device == "cpu"
    return torch.float16 if interpreted and op in MULTIPLYING and dtype == torch.bfloat16 else dtype


def _outcome(case: Case, backend: str, device: str, dtype: torch.dtype) -> Outcome:
    """Runs a case; whatever it raises is an outcome, too."""
    names = (case.op, case.label, backend, device, str(dtype).removeprefix("torch."))
    leaves = {name: normal(*shape, seed=i).to(dtype) for i, (name, shape) in enumerate(case.shapes.items(), start=10)}
    fixed = {name: x.to(dtype) if x.dtype == torch.float64 else x for name, x in case.fixed.items()}
    exact = _run(case.exact, *({name: _wide(x) for name, x in part.items()} for part in (leaves, fixed)))
    try:
        here = ({name: x.to(device) for name, x in part.items()} for part in (leaves, fixed))
        found = _run(lambda **x: case.ours(backend=backend, **x), *here)
    except Exception as failure:  # noqa: BLE001 - of any kind: the next cases are still to be tested
        return Outcome(*names, None, f"{type(failure).__name__}: {first_line(failure)}")
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
    ways = [(normal(*y.shape, seed=i) * 8).round().div(8).to(y) for i, y in enumerate(outputs, start=50)]
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
    """Prints the outcomes as JSON; returns 1 where a case has failed."""
    parser = argparse.ArgumentParser("python -m bivec.engine.cli.selftest", description=__doc__.split("\n")[0])
    parser.add_argument("--backend", choices=("torch", "triton"), default="torch")
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args(arguments)
    outcomes = run(given.backend, given.device)
    print(json.dumps([asdict(one) for one in outcomes]))
    return 0 if all(one.ok for one in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
