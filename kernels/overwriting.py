"""What may be overwritten where it lies, by ops that are asked to."""

from __future__ import annotations

import torch
from torch import Tensor


def _storage(x: Tensor) -> int:
    return int(x.untyped_storage()._cdata)  # noqa: SLF001 - on the meta device all addresses are 0


def check_overwritable(op: str, option: str, **operands: Tensor) -> None:
    """Refuses operands whose memory cannot be overwritten with one value for each element.

    Args:
        op: name of the public function.
        option: of its options, the one that asks for it: "inplace=True".
        operands: the tensors by name.

    Raises:
        ValueError: a leaf that requires grad, or a view of one; elements that share memory (of a broadcast tensor), or
            operands that begin at one place. Operands that overlap in another way are not found out.
    """
    if torch.compiler.is_compiling():  # nothing is overwritten there
        return
    starts = [(_storage(x), x.storage_offset()) for x in operands.values() if x.numel()]
    if len(set(starts)) < len(starts):
        raise ValueError(f"{op}: {' and '.join(operands)} are one memory; {option} cannot hold the results of all")
    for name, x in operands.items():
        owner = x if x._base is None else x._base  # noqa: SLF001 - there is no public way to ask
        if torch.is_grad_enabled() and owner.is_leaf and owner.requires_grad:
            raise ValueError(
                f"{op}: {name} is a leaf that requires grad, or a view of one; {option} would destroy its values. "
                f"Pass a computed tensor, or do without {option}"
            )
        if x.numel() and any(size > 1 and stride == 0 for size, stride in zip(x.shape, x.stride(), strict=True)):
            raise ValueError(
                f"{op}: elements of {name} share memory (shape {tuple(x.shape)}, strides {x.stride()}); "
                f"{option} needs one place for each: pass {name}.contiguous()"
            )
