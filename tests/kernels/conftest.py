"""A truer and faster Triton interpreter, the criteria that kernels are held to, and a measure of memory."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bivec.kernels import reference
from bivec.kernels.attention import attention_dropout_mask, flash_attention

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _repair_interpreter() -> None:
    """Rounds to bf16 as GPUs do, and patches triton.language once a launch."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle

    cast, launch, patch = InterpreterBuilder.cast_impl, GridExecutor.__call__, interpreter._patch_lang
    patched = set()

    def rounding_cast(self, src, dst_type):
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:  # it would cut the low bits off
            bits = src.data.view(np.uint32)
            return TensorHandle(((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16), tl.bfloat16)
        return cast(self, src, dst_type)

    def launch_afresh(self, *args, **kwargs):
        patched.clear()
        return launch(self, *args, **kwargs)

    def patch_once(fn):  # it patches at every call of one kernel function by another: 40 % of the time
        modules = frozenset(id(value) for value in fn.__globals__.values() if value is tl or value is tl.core)
        if modules in patched:
            return None
        patched.add(modules)
        return patch(fn)

    InterpreterBuilder.cast_impl = rounding_cast
    GridExecutor.__call__, interpreter._patch_lang = launch_afresh, patch_once


if os.environ.get("TRITON_INTERPRET") == "1":
    _repair_interpreter()


@dataclass(frozen=True)
class Inputs:
    """A packed batch for attention."""

    cu_seqlens: Tensor  # [B+1] int32
    q: Tensor  # [T, H, Dh]
    k: Tensor  # [T, Hkv, Dh]
    v: Tensor
    d_out: Tensor  # [T, H, Dh]

    def to(self, dtype: torch.dtype) -> Inputs:
        return Inputs(self.cu_seqlens, *(x.to(dtype) for x in (self.q, self.k, self.v, self.d_out)))


def with_gradients(function: Callable[..., tuple[Tensor, Tensor]], inputs: Inputs) -> dict[str, Tensor]:
    """out, lse and the gradients of ``function(q, k, v) -> (out, lse)``."""
    leaves = [x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    out, lse = function(*leaves)
    gradients = torch.autograd.grad(out, leaves, inputs.d_out)
    return {"out": out.detach(), "lse": lse} | dict(zip(("dQ", "dK", "dV"), gradients, strict=True))


class AttentionTests:
    """Makes inputs, runs the kernels and the oracle, judges, and keeps the worst ratio of error to limit."""

    device = DEVICE

    def __init__(self) -> None:
        self.ratios: defaultdict[str, dict[str, float]] = defaultdict(dict)

    @staticmethod
    def make(
        lengths: Sequence[int], heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, seed: int = 0
    ) -> Inputs:
        """Normally distributed, drawn in float64 and rounded."""
        g = torch.Generator().manual_seed(seed)
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
        shapes = [(sum(lengths), h, head_dim) for h in (heads, kv_heads, kv_heads, heads)]
        tensors = [torch.randn(shape, generator=g, dtype=torch.float64).to(DEVICE, dtype) for shape in shapes]
        return Inputs(cu_seqlens.to(DEVICE), *tensors)

    @staticmethod
    def ours(inputs: Inputs, options: dict[str, Any], max_seqlen: int) -> dict[str, Tensor]:
        """flash_attention; its path follows ``max_seqlen``."""

        def call(q, k, v):
            return flash_attention(q, k, v, inputs.cu_seqlens, max_seqlen, return_lse=True, backend="triton", **options)

        return with_gradients(call, inputs)

    @staticmethod
    def oracle(inputs: Inputs, options: dict[str, Any], dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        """reference.attention computed in ``dtype``, on the same (already rounded) inputs."""
        options = dict(options)
        seed, sample_ids = options.pop("seed", None), options.pop("sample_ids", None)
        if seed is not None:
            options["keep_masks"] = attention_dropout_mask(
                seed, inputs.cu_seqlens, inputs.q.shape[1], options["dropout_p"], sample_ids
            )
        return with_gradients(
            lambda q, k, v: reference.attention(q, k, v, inputs.cu_seqlens, **options), inputs.to(dtype)
        )

    @staticmethod
    def rounding(inputs: Inputs, options: dict[str, Any], exact: dict[str, Tensor]) -> dict[str, Tensor]:
        """The floor of the criterion, per sequence: what rounding *stored* tensors to the dtype costs even when all
        arithmetic is exact.

        Results are rounded when stored: eps times the largest. The output is stored, too, before the backward forms
        ``delta = rowsum(dO * O)`` from it; half an eps of ``rowsum|dO * O|`` reaches dQ and dK through the softmax,
        also where the exact gradients cancel to 0. In a sequence of one token plain torch subtracts a number from
        itself there, ours two sums of the same products, each rounded to fp32 at best.
        """
        masks = {name: options[name] for name in ("causal", "window", "softcap", "softmax_scale") if name in options}
        scale = options.get("softmax_scale") or inputs.q.shape[-1] ** -0.5
        wide = inputs.to(torch.float64)
        delta = scale * (wide.d_out * exact["out"]).abs().sum(-1, keepdim=True)  # [T, H, 1]
        keys = Inputs(wide.cu_seqlens, wide.q, wide.k, wide.k, delta * wide.q)
        through = with_gradients(lambda q, k, v: reference.attention(q, k, v, wide.cu_seqlens, **masks), keys)
        reached = {"dQ": delta * through["out"], "dK": through["dV"]}  # P K and Pᵀ Q, weighted
        eps = torch.finfo(inputs.q.dtype).eps
        floor = {}
        for name in ("out", "dQ", "dK", "dV"):
            floor[name] = eps * largest(exact[name], inputs.cu_seqlens)
            if name in reached:
                lengths = inputs.cu_seqlens.diff()
                single = torch.finfo(torch.float32).eps * (lengths[lengths > 0] == 1)
                floor[name] += (eps / 2 + single) * largest(reached[name], inputs.cu_seqlens)
        return floor

    def limits(self, inputs: Inputs, options: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The exact values, and by quantity the error allowed in each sequence: 2 x plain torch's in the dtype + floor.

        By sequence, because gradients of long ones are small beside those of short ones. Of a short one plain torch's
        error is a few roundings, which a machine's order of summation may make small by chance: it is taken twice, the
        second time with the head's dimensions in another order, and the larger counts.
        """
        exact = self.oracle(inputs, options)
        floor = self.rounding(inputs, options, exact)
        plain = self.oracle(inputs, options, inputs.q.dtype)
        order = torch.randperm(inputs.q.shape[-1], generator=torch.Generator().manual_seed(0)).to(inputs.q.device)
        tensors = (inputs.q, inputs.k, inputs.v, inputs.d_out)
        other = self.oracle(Inputs(inputs.cu_seqlens, *(x[..., order] for x in tensors)), options, inputs.q.dtype)
        limits = {}
        for name in floor:
            errors = [plain[name].double() - exact[name], other[name].double() - exact[name][..., order]]
            limits[name] = 2 * torch.maximum(*(largest(x, inputs.cu_seqlens) for x in errors)) + floor[name]
        return exact, limits

    def judge(
        self,
        family: str,
        got: dict[str, Tensor],
        expected: dict[str, Tensor],
        limits: dict[str, Tensor],
        cu_seqlens: Tensor,
    ) -> None:
        """Fails where an error passes its limit, NaN included; otherwise notes the worst ratio."""
        worst = {}
        for name, limit in limits.items():
            error = largest(got[name].double() - expected[name].double(), cu_seqlens)
            ratio = error / limit.clamp_min(1e-300)
            assert (error <= limit).all(), f"{family}, {name}: error / limit by sequence {ratio.tolist()}"
            worst[name] = max(self.ratios.get(family, {}).get(name, 0.0), *ratio.tolist(), 0.0)
        self.ratios[family] |= worst

    def check(
        self, family: str, inputs: Inputs, options: dict[str, Any], max_seqlen: int
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Runs and judges; lse within fp32. Returns what it got, and the limits."""
        exact, limits = self.limits(inputs, options)
        got = self.ours(inputs, options, max_seqlen)
        assert all(got[name].dtype == inputs.q.dtype for name in limits)
        assert got["lse"].dtype == torch.float32 and not got["lse"].requires_grad
        torch.testing.assert_close(got["lse"].double(), exact["lse"].detach(), rtol=2e-6, atol=2e-6)
        self.judge(family, got, exact, limits, inputs.cu_seqlens)
        return got, limits


def largest(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The largest magnitude in each sequence that is not empty; NaN if it has one."""
    rows = x.abs().flatten(1).amax(1)
    parts = [part.max() for part in rows.split(cu_seqlens.diff().tolist()) if len(part)]
    return torch.stack(parts) if parts else rows


class LayerTests:
    """Runs an operator and its backward, and holds it to its plain statement in float64."""

    @staticmethod
    def run(function: Callable[..., Any], *tensors: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The outputs, and the gradients of the tensors under one fixed upstream gradient per output."""
        leaves = [tensor.detach().clone().requires_grad_(tensor.is_floating_point()) for tensor in tensors]
        out = function(*leaves)
        outputs = out if isinstance(out, tuple) else (out,)
        # rounded to bf16, so that every dtype sees the same numbers
        upstream = [normal(*o.shape, seed=90 + i, dtype=torch.bfloat16).to(o) for i, o in enumerate(outputs)]
        gradients = torch.autograd.grad(outputs, leaves, upstream)
        return [one.detach() for one in outputs], list(gradients)

    @staticmethod
    def relative_error(value: Tensor, truth: Tensor) -> float:
        return ((value.double() - truth).norm() / truth.norm()).item()

    @classmethod
    def assert_close_to_float64(cls, ours: Callable[..., Any], statement: Callable[..., Any], *tensors: Tensor) -> None:
        """Our error is at most twice that of plain torch in the same dtype, outputs and gradients; dtypes are kept."""
        results = cls.run(ours, *tensors)
        plain = cls.run(statement, *tensors)
        exact = cls.run(statement, *(tensor.double() for tensor in tensors))
        assert [g.dtype for g in results[1]] == [tensor.dtype for tensor in tensors]
        for kind, mine, same_dtype, truth in zip(("output", "gradient"), results, plain, exact, strict=True):
            for i, (a, b, c) in enumerate(zip(mine, same_dtype, truth, strict=True)):
                assert cls.relative_error(a, c) <= 2 * cls.relative_error(b, c) + 1e-6, f"{kind} {i}"

    @staticmethod
    def check_empty(function: Callable[[Tensor], Any], *shape: int) -> None:
        """It takes an input without tokens, and its gradient has none."""
        x = torch.ones(*shape, requires_grad=True)
        out = function(x)
        sum(one.sum() for one in (out if isinstance(out, tuple) else (out,))).backward()
        assert x.grad.shape == shape


@pytest.fixture(scope="session")
def layers() -> LayerTests:
    """Shared by the tests of rms_norm, apply_rotary, the gated units and LoRA."""
    return LayerTests()


class LoraOperands:
    """x, weights, biases (the second is None), A and B, of odd sizes; as one list of leaves and back."""

    def __init__(
        self, dtype=torch.float32, lora_dtype=None, *, tokens=37, width=45, outs=(33, 17, 70), ranks=None, bias=True
    ):
        lora_dtype, ranks = lora_dtype or dtype, ranks or [5] * len(outs)
        self.count = len(outs)
        self.tensors = [
            normal(tokens, width, dtype=dtype),
            *(normal(out, width, seed=10 + p, dtype=dtype, scale=0.2) for p, out in enumerate(outs)),
            *(normal(out, seed=20 + p, dtype=dtype) if bias and p != 1 else None for p, out in enumerate(outs)),
            *(normal(rank, width, seed=30 + p, dtype=lora_dtype, scale=0.2) for p, rank in enumerate(ranks)),
            *(
                normal(out, rank, seed=40 + p, dtype=lora_dtype, scale=0.4)
                for p, (out, rank) in enumerate(zip(outs, ranks, strict=True))
            ),
        ]

    def unpack(self, leaves: Sequence[Tensor | None]) -> tuple[Any, ...]:
        x, *others = leaves
        return x, *(others[i * self.count : (i + 1) * self.count] for i in range(4))

    def double(self) -> LoraOperands:
        other = object.__new__(LoraOperands)
        other.count, other.tensors = self.count, [None if t is None else t.double() for t in self.tensors]
        return other


class LoraTests:
    """Runs lora_linears, whatever the form of the call, on operands of many kinds."""

    Operands = LoraOperands

    @staticmethod
    def upstream(outs: Sequence[Tensor]) -> list[Tensor]:
        """Rounded to bf16, so that every dtype sees the same numbers."""
        return [normal(*o.shape, seed=90 + p, dtype=torch.bfloat16).to(o.dtype) for p, o in enumerate(outs)]

    @classmethod
    def run(
        cls,
        function: Callable[..., Sequence[Tensor]],
        operands: LoraOperands,
        trained: Iterable[int] | None = None,
        reached: Sequence[int] | None = None,
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        """The outputs, and the gradients of the operands (None of an absent bias and of what is not trained).

        ``trained`` are positions in ``operands.tensors``, ``reached`` the outputs that something depends on; default
        all.
        """
        trained = set(range(len(operands.tensors)) if trained is None else trained)
        leaves = [
            None if t is None else t.detach().clone().requires_grad_(i in trained)
            for i, t in enumerate(operands.tensors)
        ]
        outs = function(*operands.unpack(leaves))
        chosen = [p for p in range(len(outs)) if reached is None or p in reached]
        gradients = cls.upstream(outs)
        torch.autograd.backward([outs[p] for p in chosen], [gradients[p] for p in chosen])
        return [o.detach() for o in outs], [None if t is None else t.grad for t in leaves]

    @staticmethod
    def flat(results: tuple[list[Tensor], list[Tensor | None]]) -> list[Tensor]:
        outs, gradients = results
        return [*outs, *(g for g in gradients if g is not None)]

    @classmethod
    def assert_equal(cls, found: Any, expected: Any) -> None:
        for a, b in zip(cls.flat(found), cls.flat(expected), strict=True):
            assert torch.equal(a, b)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    """Normally distributed, drawn in float64 and rounded."""
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, dtype=torch.float64, generator=g) * scale).to(DEVICE, dtype)


@pytest.fixture(scope="session")
def lora() -> LoraTests:
    """Shared by the tests of LoRA in Triton."""
    return LoraTests()


def contrastive_example(
    options: dict[str, Any],
    dtype: torch.dtype = torch.float32,
    sizes: Sequence[int] = (6, 9, 4, 3, 24),
    seed: int = 0,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns (differentiable tensors, keyword arguments); the losses are neither solved nor hopeless."""
    options, g = dict(options), torch.Generator().manual_seed(seed)
    B, N, M, K, D = sizes
    num, hard = B if options.get("symmetric") else N, options.pop("hard", None)
    if options.get("hard_negative_ids") and hard is None:
        hard = "own"
    tensors = {
        "queries": torch.randn(B, D, generator=g) * 3,
        "candidates": torch.randn(num, D, generator=g) / 2,
        "scale": torch.tensor(options.pop("scale", 20.0), device=DEVICE),
    }
    tensors["candidates"][:B] += 0.08 * tensors["queries"]
    if hard is not None:
        tensors["hard_negatives"] = torch.randn(*((M,) if hard == "shared" else (B, K)), D, generator=g)
    for name, x in tensors.items():
        tensors[name] = x if name == "scale" else x.to(DEVICE, dtype)
    ids = {"query_ids": (B,), "candidate_ids": (num,), "hard_negative_ids": (M,) if hard == "shared" else (B, K)}
    for name, shape in ids.items():  # few identities: duplicates among queries, positives and negatives
        if options.get(name):
            options[name] = torch.randint(0, 6, shape, generator=g).to(DEVICE)
    if options.get("query_ids") is not None and not {"candidate_ids", "hard_negative_ids"} & set(options):
        options.pop("query_ids")
    if options.get("targets"):
        options["targets"] = torch.randint(0, num, (B,), generator=g).to(DEVICE)
    return tensors, options


@pytest.fixture(scope="session")
def example() -> Callable[..., tuple[dict[str, Tensor], dict[str, Any]]]:
    """Makes inputs of info_nce by names of options: queries B, candidates N, hard negatives M or K a query, D."""
    return contrastive_example


@pytest.fixture
def peak_bytes() -> Callable[[Callable[[], object]], int]:
    """Gives the peak of what the CPU's allocator hands out while a function runs, which gives what it keeps."""
    from torch.profiler import ProfilerActivity, profile

    def peak(function: Callable[[], object]) -> int:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            kept = function()
        events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
        sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
        assert sizes and kept is not None
        return max(accumulate(sizes))

    return peak


@pytest.fixture(scope="session")
def attention() -> Iterator[AttentionTests]:
    """Shared by all tests; ``BIVEC_ERROR_RATIOS=file`` writes the worst ratios there as JSON."""
    tests = AttentionTests()
    yield tests
    if path := os.environ.get("BIVEC_ERROR_RATIOS"):
        Path(path).write_text(json.dumps(tests.ratios, indent=1, sort_keys=True))
