"""Every operator, forward and backward, against plain torch and torch.compile, by pytest-benchmark.

    pytest benchmarks/ops.py                                    # on a GPU: Mistral's shapes; on a CPU: SmolLM2's
    pytest benchmarks/ops.py -k "swiglu and backward"
    pytest benchmarks/ops.py --benchmark-json=ops.json          # and compare two of these: pytest-benchmark compare

Three contenders in groups of one operator and direction: "bivec" (the default backend of the device), "torch" (the
plain statement) and "compile" (torch.compile of it, where the device has a compiler). Groups come one after the other
and their members in turn, so compare inside a group only. A GPU is waited for inside the timed call, with inputs large
enough that this does not count. Attention and the losses have files of their own too, against the libraries' kernels,
over many shapes, with their memory.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bivec.kernels import (
    apply_rotary,
    flash_attention,
    geglu,
    info_nce,
    linear_cross_entropy,
    lora_linears,
    rms_norm,
    segment_pool,
    swiglu,
)

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
DTYPE = torch.bfloat16 if GPU else torch.float32
TOKENS, HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM = (
    (8192, 4096, 14336, 32, 8, 128) if GPU else (512, 576, 1536, 9, 3, 64)
)
VOCAB, RANK, LENGTH, LONG, EPS = 32000 if GPU else 8192, 16, 64, 512, 1e-5
DIRECTIONS = ("forward", "backward")
CONTENDERS = ("bivec", "torch", "compile")
HAS_COMPILER = GPU or shutil.which("g++") is not None


def randn(*shape: int, dtype: torch.dtype = DTYPE, scale: float = 1.0, grad: bool = True) -> Tensor:
    """Normally distributed, on the device."""
    return (torch.randn(shape, device=DEVICE) * scale).to(dtype).requires_grad_(grad)


@dataclass(frozen=True)
class Op:
    """The two ways to compute the same from the same operands."""

    ours: Callable[..., Tensor | tuple[Tensor, ...]]
    plain: Callable[..., Tensor | tuple[Tensor, ...]]
    operands: Callable[[], list[Tensor]]
    is_random: bool = False  # results have no value to compare


def plain_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Statistics in fp32; [T, D] and the sum."""
    total = x + residual
    wide = total.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)).to(x.dtype) * weight, total


def our_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """In one kernel."""
    return rms_norm(x, weight, EPS, residual=residual)


def plain_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor) -> tuple[Tensor, ...]:
    """Halves turned, for every head of q and k."""
    cos, sin = (torch.cat([table[position_ids]] * 2, -1)[:, None].to(q.dtype) for table in (cos, sin))

    def turned(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat((-second, first), -1) * sin

    return turned(q), turned(k)


def rotary_operands() -> list[Tensor]:
    """q, k, the tables and the positions."""
    angles = torch.rand(TOKENS, HEAD_DIM // 2, device=DEVICE)
    positions = torch.arange(TOKENS, device=DEVICE) % 512
    return [randn(TOKENS, HEADS, HEAD_DIM), randn(TOKENS, KV_HEADS, HEAD_DIM), angles.cos(), angles.sin(), positions]


def plain_lora(x: Tensor, *matrices: Tensor) -> tuple[Tensor, ...]:
    """q, k and v, one after the other."""
    weights, lora_as, lora_bs = matrices[:3], matrices[3:6], matrices[6:]
    return tuple(
        F.linear(x, w) + (2.0 * F.linear(F.linear(x.to(a.dtype), a), b)).to(x.dtype)
        for w, a, b in zip(weights, lora_as, lora_bs, strict=True)
    )


def our_lora(x: Tensor, *matrices: Tensor) -> tuple[Tensor, ...]:
    """q, k and v in one call."""
    return lora_linears(x, matrices[:3], matrices[3:6], matrices[6:], 2.0)


def lora_operands() -> list[Tensor]:
    """q, k and v: frozen weights, LoRA in fp32."""
    outs = [HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM]
    weights = [randn(out, HIDDEN, scale=HIDDEN**-0.5, grad=False) for out in outs]
    lora_as = [randn(RANK, HIDDEN, dtype=torch.float32, scale=HIDDEN**-0.5) for _ in outs]
    return [randn(TOKENS, HIDDEN), *weights, *lora_as, *(randn(out, RANK, dtype=torch.float32) for out in outs)]


def our_dropped_lora(x: Tensor, *matrices: Tensor) -> tuple[Tensor, ...]:
    """One mask for all three."""
    return lora_linears(x, matrices[:3], matrices[3:6], matrices[6:], 2.0, dropout_p=0.05, seed=1)


def plain_dropped_lora(x: Tensor, *matrices: Tensor) -> tuple[Tensor, ...]:
    """A mask for each projection, as PEFT draws them."""
    weights, lora_as, lora_bs = matrices[:3], matrices[3:6], matrices[6:]
    return tuple(
        F.linear(x, w) + (2.0 * F.linear(F.linear(F.dropout(x.to(a.dtype), 0.05), a), b)).to(x.dtype)
        for w, a, b in zip(weights, lora_as, lora_bs, strict=True)
    )


def attention_operands() -> list[Tensor]:
    """Grouped query heads."""
    return [randn(TOKENS, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]


def our_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Packed sequences of one length."""
    cu_seqlens = torch.arange(0, TOKENS + 1, LONG, device=DEVICE, dtype=torch.int32)
    return flash_attention(q, k, v, cu_seqlens, LONG)


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """SDPA on a batch, which sequences of one length allow."""
    q, k, v = (x.view(-1, LONG, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(0, 1)


def plain_info_nce(queries: Tensor, candidates: Tensor) -> Tensor:
    """The whole matrix of cosines in fp32."""
    cosines = F.normalize(queries.float(), dim=-1) @ F.normalize(candidates.float(), dim=-1).T
    return F.cross_entropy(20.0 * cosines, torch.arange(len(queries), device=DEVICE))


def plain_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """All logits in fp32."""
    return F.cross_entropy(F.linear(hidden, weight).float(), targets)


def cross_entropy_operands() -> list[Tensor]:
    """A frozen head."""
    targets = torch.randint(VOCAB, (TOKENS // 4,), device=DEVICE)
    return [randn(TOKENS // 4, HIDDEN), randn(VOCAB, HIDDEN, scale=HIDDEN**-0.5, grad=False), targets]


def plain_pool(hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Sums by index, in fp32."""
    sequences = torch.arange(len(cu_seqlens) - 1, device=DEVICE).repeat_interleave(cu_seqlens.diff())
    sums = torch.zeros(len(cu_seqlens) - 1, hidden.shape[1], device=DEVICE)
    sums = sums.index_add(0, sequences, hidden.float())
    return (sums / cu_seqlens.diff()[:, None]).to(hidden.dtype)


def pool_operands() -> list[Tensor]:
    """Spans of one length."""
    return [randn(TOKENS, HIDDEN), torch.arange(0, TOKENS + 1, LENGTH, device=DEVICE, dtype=torch.int32)]


def gate_and_up() -> list[Tensor]:
    """Of a feed-forward block."""
    return [randn(TOKENS, INNER), randn(TOKENS, INNER)]


OPS = {
    "rms_norm + residual": Op(
        our_rms_norm,
        plain_rms_norm,
        lambda: [randn(TOKENS, HIDDEN), randn(TOKENS, HIDDEN), randn(HIDDEN, grad=False)],
    ),
    "apply_rotary": Op(apply_rotary, plain_rotary, rotary_operands),
    "swiglu": Op(swiglu, lambda gate, up: F.silu(gate) * up, gate_and_up),
    "geglu": Op(geglu, lambda gate, up: F.gelu(gate, approximate="tanh") * up, gate_and_up),
    "lora_linears q k v": Op(our_lora, plain_lora, lora_operands),
    "lora_linears q k v, dropout": Op(our_dropped_lora, plain_dropped_lora, lora_operands, is_random=True),
    "flash_attention": Op(our_attention, plain_attention, attention_operands),
    "linear_cross_entropy": Op(linear_cross_entropy, plain_cross_entropy, cross_entropy_operands),
    "info_nce": Op(info_nce, plain_info_nce, lambda: [randn(TOKENS // 4, HIDDEN), randn(TOKENS // 4, HIDDEN)]),
    "segment_pool": Op(segment_pool, plain_pool, pool_operands),
}


def contender(op: Op, name: str) -> Callable[..., Tensor | tuple[Tensor, ...]]:
    """The function of one of ``CONTENDERS``."""
    if name == "bivec":
        return op.ours
    return op.plain if name == "torch" else torch.compile(op.plain)


def as_tuple(outs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The outputs of an op, however many they are."""
    return outs if isinstance(outs, tuple) else (outs,)


def results(function: Callable[..., Tensor | tuple[Tensor, ...]], operands: list[Tensor]) -> list[Tensor]:
    """Outputs and gradients."""
    outs = as_tuple(function(*operands))
    trained = [x for x in operands if x.requires_grad]
    return [*outs, *torch.autograd.grad(outs, trained, [torch.ones_like(out) for out in outs])]


def finished(run: Callable[[], object]) -> None:
    """Runs it to its end on the device."""
    run()
    if GPU:
        torch.cuda.synchronize()


@pytest.mark.parametrize("name", CONTENDERS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("op", OPS)
def test_op(benchmark, op: str, direction: str, name: str) -> None:
    """Checks the contender against the plain statement, then times it."""
    if name == "compile" and not HAS_COMPILER:
        pytest.skip("torch.compile needs a C++ compiler on a CPU")
    torch.manual_seed(0)
    function, operands = contender(OPS[op], name), OPS[op].operands()
    found_and_exact = zip(results(function, operands), results(OPS[op].plain, operands), strict=True)
    for found, exact in () if OPS[op].is_random else found_and_exact:  # nothing wrong is timed
        error = (found.float() - exact.float()).norm() / exact.float().norm().clamp_min(1e-12)
        if not error < (2e-2 if GPU else 1e-4):  # nor is it NaN
            pytest.fail(f"{op}: {name} is off by {error:.2g}")
    benchmark.group = f"{op} {direction}"
    if direction == "forward":
        with torch.no_grad():
            benchmark(finished, partial(function, *operands))
        return
    outs = as_tuple(function(*operands))
    trained = [x for x in operands if x.requires_grad]
    upstream = [torch.ones_like(out) for out in outs]
    backward = partial(torch.autograd.grad, outs, trained, upstream, retain_graph=True)
    benchmark(finished, backward)
