"""Activations that are made again in the backward instead of being kept.

Three levels, all with the same losses and gradients:

    none        everything that a backward reads is kept
    selective   what is cheap to make is made again: the outputs of the norms (inputs of q, k, v and of gate, up) and
                the gated product (input of down_proj); no matrix product runs twice. Rotated q and k replace the
                unrotated ones in place, so there is nothing to win from them
    layer       of a layer only its input is kept; the layer runs forward twice

Operators know nothing of this: between an operator and what it saves stand torch's saved-tensor hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

if TYPE_CHECKING:
    from typing_extensions import Self  # typing has it from Python 3.11 on

LEVELS = ("none", "selective", "layer")


def _version(x: Tensor) -> int:
    return x._version  # noqa: SLF001 - autograd's own counter of what has been written to x; there is no public one


@dataclass(frozen=True)
class _Saved:
    """A tensor and its version, as autograd keeps them: with hooks around, torch leaves the comparison to them."""

    tensor: Tensor
    version: int

    def unchanged(self) -> Tensor:
        if _version(self.tensor) != self.version:
            raise RuntimeError(
                "an activation needed for the backward has been modified by an inplace operation; a model's graph can "
                "be walked backward once, as the backward reuses the memory of what it has read"
            )
        return self.tensor


class _Recipe:
    """Stands for a saved tensor."""

    def __init__(self, make: Callable[[], Tensor], reads: Sequence[Tensor]):
        self._make, self._uses = make, 0
        self._made: Tensor | None = None
        self._reads = [_Saved(x, _version(x)) for x in reads]

    def saved(self) -> _Recipe:
        self._uses += 1
        return self

    def tensor(self) -> Tensor:
        """Makes it at the first of its uses, and lets go of it at the last."""
        made = self._made
        if made is None:
            for read in self._reads:
                read.unchanged()
            with torch.no_grad():
                made = self._make()
        self._uses -= 1
        self._made = made if self._uses > 0 else None
        return made


class Recipes:
    """Replaces chosen tensors, where an operator inside the ``with`` block saves them, by how to make them again.

    Args:
        active: False does nothing at all.
    """

    def __init__(self, active: bool):
        self._active = active
        self._hooks = saved_tensors_hooks(self._pack, self._unpack)
        self._known: dict[int, tuple[Tensor, _Recipe]] = {}  # by address, of tensors that are kept alive here

    def add(self, tensor: Tensor, make: Callable[..., Tensor], *reads: Tensor) -> None:
        """From now on ``make(*reads)``, called without autograd, stands for ``tensor``.

        ``reads`` are kept instead: tensors that some operator saves anyway.
        """
        if self._active and tensor.numel():
            reads = tuple(x.detach() for x in reads)
            self._known[tensor.data_ptr()] = (tensor, _Recipe(partial(make, *reads), reads))

    def forget(self) -> None:
        """Lets go of the tensors added so far; what has been saved of them stays replaced."""
        self._known.clear()

    def __enter__(self) -> Self:
        if self._active:
            self._hooks.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self.forget()
        if self._active:
            self._hooks.__exit__(*exception)

    def _pack(self, tensor: Tensor) -> _Saved | _Recipe:
        if tensor.data_ptr() in self._known:
            known, recipe = self._known[tensor.data_ptr()]
            if (tensor.shape, tensor.stride(), tensor.dtype) == (known.shape, known.stride(), known.dtype):
                return recipe.saved()
        return _Saved(tensor, _version(tensor))

    @staticmethod
    def _unpack(saved: _Saved | _Recipe) -> Tensor:
        return saved.tensor() if isinstance(saved, _Recipe) else saved.unchanged()
