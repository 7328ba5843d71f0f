"""Which operands cost the Triton kernels digits? Vectors that are nearly parallel, and large attention scores.

    python benchmarks/hard_operands.py    # a few seconds on a CPU, in Triton's interpreter

Gradients of both losses from bf16 operands, by the mean cosine of the vectors of each side (of the head's rows, for
linear_cross_entropy), and of attention from fp32 operands, by how many times larger than usual q and k are: relative
error of the worst operand against float64, on the same rounded operands. Writes hard_operands.json into
benchmarks/results, or ``--output DIR``.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported

from bivec.kernels import flash_attention, info_nce, linear_cross_entropy

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
RESULTS = Path(__file__).resolve().parent / "results"
COSINES = (0.5, 0.9, 0.95, 0.97, 0.99)
SIZES = (1, 10, 50)
ROWS, DIM, VOCABULARY = 64, 128, 256
LENGTH, HEADS, HEAD_DIM = 64, 2, 64


def near(rows: int, cosine: float, generator: torch.Generator) -> Tensor:
    """Random vectors with this mean cosine to each other, [rows, DIM] in bf16."""
    shared = torch.randn(DIM, generator=generator)
    noise = (1 / cosine - 1) ** 0.5 * torch.randn(rows, DIM, generator=generator) / DIM**0.5
    return (shared / shared.norm() + noise).bfloat16().to(DEVICE)


def errors(loss: Callable[..., Tensor], operands: Sequence[Tensor]) -> list[float]:
    """Of the gradient of each operand: Triton's relative error against float64."""
    found, exact = [], []
    for dtype, backend, gradients in ((None, "triton", found), (torch.float64, "torch", exact)):
        leaves = [one.detach().to(dtype or one.dtype, copy=True).requires_grad_() for one in operands]
        loss(*leaves, backend=backend).backward()
        gradients += [one.grad.double() for one in leaves]
    return [float((one - other).norm() / other.norm()) for one, other in zip(found, exact, strict=True)]


def measured() -> dict[str, list[dict[str, float]]]:
    """The worst gradient of each loss by cosine, and dV of attention by size."""
    generator = torch.Generator().manual_seed(0)
    losses, attention = [], []
    for cosine in COSINES:
        sides = [near(ROWS, cosine, generator) for _ in range(2)]
        hidden, head = (
            torch.randn(ROWS, DIM, generator=generator).bfloat16().to(DEVICE),
            near(VOCABULARY, cosine, generator),
        )
        labels = torch.randint(VOCABULARY, (ROWS,), generator=generator).to(DEVICE)
        losses.append(
            {
                "cosine": cosine,
                "info_nce": max(errors(lambda a, b, backend: info_nce(a, b, scale=20.0, backend=backend), sides)),
                "linear_cross_entropy": max(
                    errors(
                        lambda h, w, backend, labels=labels: linear_cross_entropy(h, w, labels, backend=backend),
                        [hidden, head],
                    )
                ),
            }
        )
    cu_seqlens = torch.tensor([0, LENGTH], dtype=torch.int32, device=DEVICE)
    q, k, v, grad = torch.randn(4, LENGTH, HEADS, HEAD_DIM, generator=generator).to(DEVICE).unbind(0)

    def attend(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
        return (flash_attention(q, k, v, cu_seqlens, max_seqlen=LENGTH, backend=backend) * grad).sum()

    for size in SIZES:
        found = errors(attend, [size * q, size * k, v])
        score = float((size**2 * torch.einsum("lhd,mhd->hlm", q, k) / HEAD_DIM**0.5).abs().max())
        attention.append({"size": size, "largest_score": score, **dict(zip(("dq", "dk", "dv"), found, strict=True))})
    return {"losses": losses, "attention": attention}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    from timing import describe_run

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="DIR", help="where the file is written")
    options = parser.parse_args(arguments)
    found = measured()
    for name, rows in found.items():
        print(f"{name}: " + "  ".join(f"{key:>20}" for key in rows[0]))
        for row in rows:
            print(f"{name}: " + "  ".join(f"{value:20.2g}" for value in row.values()))
    content = {**describe_run(DEVICE), "interpreter": DEVICE.type == "cpu", **found}
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "hard_operands.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
