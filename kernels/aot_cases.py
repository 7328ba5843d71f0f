"""The calls that ``kernels/aot.py`` checks: those of attention, and all that the other operators' files state.

An operator's own are in a function ``cases`` of its file, or of ``aot_cases_….py`` beside it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from importlib import import_module
from itertools import product
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import torch

from bivec.kernels.aot import Case
from bivec.kernels.attention_long import long_forward
from bivec.kernels.attention_long_backward import long_backward
from bivec.kernels.attention_short import LENGTHS, short_backward, short_forward
from bivec.kernels.attention_tiles import Problem
from bivec.kernels.tuning import ARCHITECTURES, has_config

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"left": 64, "right": 64},  # causal is the window (-1, 0)
    "softcap": {"softcap": 50.0},
    "dropout": {"dropout_p": 0.1},
    "all": {"left": 64, "right": 0, "softcap": 50.0, "dropout_p": 0.1},
}
PASSES = ("forward", "backward")
HEAD_DIMS = (64, 128, 256)  # as the tables know them
LONG_KERNELS = frozenset({"attention_forward", "attention_backward_q", "attention_backward_kv"})
SHORT_KERNELS = frozenset({"attention_short_forward", "attention_short_backward"})
# every other file of the folder, so that a new operator's is found without being named anywhere
MODULES = [
    import_module(f"bivec.kernels.{module.name}")
    for module in iter_modules([str(Path(__file__).parent)])
    if module.name != "aot_cases"
]


def attention_problem(
    dtype: torch.dtype,
    head_dim: int,
    group: int = 4,
    *,
    left: int | None = None,
    right: int | None = None,
    softcap: float | None = None,
    dropout_p: float = 0.0,
) -> Problem:
    """A call of shapes that LLaMA- and Mistral-style models have, on the meta device."""
    tokens, kv_heads, sequences = 4096, 8, 32

    def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    k = empty(tokens, kv_heads, head_dim, dtype=dtype)
    cu_seqlens, order = empty(sequences + 1, dtype=torch.int32), empty(sequences, dtype=torch.int32)
    return Problem(
        q=empty(tokens, kv_heads * group, head_dim, dtype=dtype),
        k=k,
        v=k,
        cu_seqlens=cu_seqlens,
        starts=cu_seqlens,
        order=order,
        softmax_scale=head_dim**-0.5,
        softcap=softcap,
        left=left,
        right=right,
        dropout_p=dropout_p,
        seed=empty(1, dtype=torch.int64),
        sample_ids=empty(sequences, dtype=torch.int64),
    )


def run_long(problem: Problem, passes: Sequence[str] = PASSES) -> None:
    """The kernels of the long path, or those of one pass."""
    out, lse = torch.empty_like(problem.q), problem.q.new_empty(problem.q.shape[1::-1], dtype=torch.float32)
    if "forward" in passes:
        long_forward(problem)
    if "backward" in passes:
        long_backward(problem, out, lse, out)


def run_short(problem: Problem, length: int, passes: Sequence[str] = PASSES) -> None:
    """The kernels of the short path, or that of one pass."""
    out, lse = torch.empty_like(problem.q), problem.q.new_empty(problem.q.shape[1::-1], dtype=torch.float32)
    if "forward" in passes:
        short_forward(problem, length)
    if "backward" in passes:
        short_backward(problem, length, lse, out)


def variants(itemsize: int) -> list[tuple[str, torch.dtype, str, Sequence[str]]]:
    """Name, dtype, option and passes of the calls that a table's row for ``itemsize`` serves.

    Each option alone, none, and all. fp16 differs from bf16 in the backward only, by code that no option changes: it is
    compiled with all. fp32 has one kernel for every window and softcap, the short path one for every window.
    """
    if itemsize == 4:
        return [("fp32", torch.float32, option, PASSES) for option in OPTIONS]
    return [("bf16", torch.bfloat16, option, PASSES) for option in OPTIONS] + [
        ("fp16", torch.float16, "all", ("backward",))
    ]


def other_shapes(itemsize: int) -> list[Problem]:
    """Padded head dims and other groups, which the rows of head dim 128 serve, with all options."""
    dtype = torch.bfloat16 if itemsize == 2 else torch.float32
    shapes = ((80, 1), (96, 3), (128, 7))
    return [attention_problem(dtype, head_dim, group, **OPTIONS["all"]) for head_dim, group in shapes]


def short_architectures(**key: int) -> tuple[str, ...]:
    """Those on which the short path has a tile; elsewhere the long path serves these sequences."""
    return tuple(a for a in ARCHITECTURES if has_config("attention", "attention_short_backward", a, **key))


def cases() -> list[Case]:
    """What ``--check`` compiles."""
    return attention_cases() + other_cases()


def other_cases() -> list[Case]:
    """Those of the other operators: of every module of this folder that has a function ``cases``."""
    return [case for module in MODULES if hasattr(module, "cases") for case in module.cases()]


def attention_cases(fp16_head_dims: Collection[int] = (128,)) -> list[Case]:
    """Every row of attention's table with each option alone, with none and with all; fp16 at some head dims only."""
    found = []
    for head_dim, itemsize in product(HEAD_DIMS, (2, 4)):
        for name, dtype, option, passes in variants(itemsize):
            if name == "fp16" and head_dim not in fp16_head_dims:
                continue
            problem = attention_problem(dtype, head_dim, **OPTIONS[option])
            place = f"{name} d{head_dim} g4"
            used = frozenset(k for k in LONG_KERNELS | SHORT_KERNELS if itemsize == 2 and any(p in k for p in passes))
            run = partial(run_long, problem, passes=passes)
            found.append(Case("attention_long", f"{place} {option}", run, used & LONG_KERNELS))
            for length in LENGTHS:
                key = {"head_dim": head_dim, "itemsize": itemsize, "length": length}
                run = partial(run_short, problem, length, passes=passes)
                label, architectures = f"{place} L{length} {option}", short_architectures(**key)
                if architectures:
                    found.append(Case("attention_short", label, run, used & SHORT_KERNELS, architectures))
    return found


def all_cases() -> list[Case]:
    """:func:`cases`, and padded head dims, other groups and fp16 throughout: what ``benchmarks/tune.py`` compiles.

    ``python -m bivec.kernels.aot --check --cases bivec.kernels.aot_cases:all_cases``
    """
    found = attention_cases(HEAD_DIMS) + other_cases()
    for itemsize in (2, 4):
        for problem in other_shapes(itemsize):
            place = f"{'bf16' if itemsize == 2 else 'fp32'} d{problem.q.shape[2]} g{problem.group}"
            used = LONG_KERNELS if itemsize == 2 else frozenset()
            found.append(Case("attention_long", f"{place} all", partial(run_long, problem), used))
            if itemsize == 2:
                short = partial(run_short, problem, 64)
                found.append(Case("attention_short", f"{place} L64 all", short, SHORT_KERNELS))
    return found
