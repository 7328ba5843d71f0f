"""The Triton backend of ``flash_attention``: its operators in torch's dispatcher, and the choice of the path.

``bivec::flash_attention`` and ``bivec::flash_attention_backward`` are opaque to ``torch.compile``, which sees their
shapes through the fake implementations; autograd is registered on the first. Saved are q, k, v and the lse, on the long
path also the output.
"""

# No `from __future__ import annotations`: torch.library reads the operators' schemas from the annotations.
from typing import Any

import torch
from torch import Tensor

from bivec.kernels.attention_long import long_forward
from bivec.kernels.attention_long_backward import long_backward
from bivec.kernels.attention_short import LENGTHS, short_backward, short_forward
from bivec.kernels.attention_tiles import Problem

LONG = 0  # the bucket of the long path
MAX_HEAD_DIM = 256


def length_bucket(max_seqlen: int) -> int:
    """The tile length of the short path for sequences of at most ``max_seqlen`` tokens, or ``LONG``.

    Only comparisons, so that torch.compile compiles again for another bucket and not for another length.
    """
    for bucket in LENGTHS:
        if max_seqlen <= bucket:
            return bucket
    return LONG


def tile_length(problem: Problem, bucket: int) -> int:
    """This GPU's smallest tile that holds the bucket, or ``LONG``: none in fp32, and where none fits the registers."""
    for length in LENGTHS:
        if bucket != LONG and length >= bucket and problem.has_config("attention_short_backward", length=length):
            return length
    return LONG


@torch.library.custom_op("bivec::flash_attention", mutates_args=())
def attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    starts: Tensor,
    order: Tensor,
    bucket: int,
    softmax_scale: float,
    softcap: float | None,
    left: int | None,
    right: int | None,
    dropout_p: float,
    seed: Tensor | None,
    sample_ids: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Output ``[T, H, Dh]`` and the lse in base 2, ``[H, T]`` fp32; the arguments are the fields of ``Problem``."""
    problem = Problem(
        q, k, v, cu_seqlens, starts, order, softmax_scale, softcap, left, right, dropout_p, seed, sample_ids
    )
    length = tile_length(problem, bucket)
    return long_forward(problem) if length == LONG else short_forward(problem, length)


@attention_op.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


@torch.library.custom_op("bivec::flash_attention_backward", mutates_args=())
def attention_backward_op(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor | None,
    lse2: Tensor,
    cu_seqlens: Tensor,
    starts: Tensor,
    order: Tensor,
    bucket: int,
    softmax_scale: float,
    softcap: float | None,
    left: int | None,
    right: int | None,
    dropout_p: float,
    seed: Tensor | None,
    sample_ids: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dQ, dK, dV; ``out`` is needed by the long path only."""
    problem = Problem(
        q, k, v, cu_seqlens, starts, order, softmax_scale, softcap, left, right, dropout_p, seed, sample_ids
    )
    length = tile_length(problem, bucket)
    if length != LONG:
        return short_backward(problem, length, lse2, d_out)
    if out is None:
        raise ValueError("flash_attention_backward: the long path needs the output of the forward")
    return long_backward(problem, out, lse2, d_out)


@attention_backward_op.register_fake
def _(_d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    q, k, v, cu_seqlens, starts, order, *options, seed, sample_ids = inputs
    ctx.options = options  # bucket, softmax_scale, softcap, left, right, dropout_p
    out, lse2 = output
    bucket, scale, softcap, left, right, dropout_p = options
    problem = Problem(q, k, v, cu_seqlens, starts, order, scale, softcap, left, right, dropout_p, seed, sample_ids)
    if tile_length(problem, bucket) != LONG:
        out = None
    ctx.save_for_backward(q, k, v, out, lse2, cu_seqlens, starts, order, seed, sample_ids)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, d_out: Tensor | None, _d_lse2: Tensor | None) -> tuple[Tensor | None, ...]:
    """The lse has no gradient: ``flash_attention`` hands it out detached."""
    if d_out is None:
        return (None,) * 14
    *tensors, seed, sample_ids = ctx.saved_tensors
    d_q, d_k, d_v = attention_backward_op(d_out, *tensors, *ctx.options, seed, sample_ids)
    return d_q, d_k, d_v, *(None,) * 11


attention_op.register_autograd(_differentiate, setup_context=_save)
