"""Our RMSNorm, gated MLP and rotary embedding on a live transformers model, one module at a time.

Only instances change: a module of the model gets a ``forward`` of its own that stands in front of its class's.
Parameters, names, hooks and classes stay as they are, so state dicts, PEFT adapters and other models notice nothing,
and taking the attribute away restores the module.

Attention layers keep their class's own ``forward``, whatever the family does in it (biases, q/k norms, caches): it
runs with one name exchanged, ``apply_rotary_pos_emb``, in a copy of its globals.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from bivec.engine.errors import ConfigError
from bivec.kernels import apply_rotary, geglu, rms_norm, swiglu
from bivec.models.families import MODEL_CLASSES

# Prefix of the class names, by module (transformers.models.<key>.modeling_<key>): our classes are called so too.
FAMILIES = {model_type.removesuffix("_text"): one.__name__ for model_type, one in sorted(MODEL_CLASSES.items())}
Forward = Callable[..., Any]

KINDS = {"RMSNorm": "rms_norm", "MLP": "mlp", "Attention": "rotary"}


@dataclass(frozen=True)
class AppliedKernels:
    """What :func:`apply_kernels` changed."""

    model: nn.Module
    rms_norm: int  # modules of each kind that run our kernel now
    mlp: int
    rotary: int

    def remove(self) -> None:
        """Restores the model; as :func:`remove_kernels`."""
        remove_kernels(self.model)


def family_of(module: nn.Module) -> tuple[str, str] | None:
    """(family, kind) of a module of transformers, e.g. ("llama", "RMSNorm"); None for all others."""
    path, name = type(module).__module__, type(module).__name__
    for family, prefix in FAMILIES.items():
        if path == f"transformers.models.{family}.modeling_{family}" and name.startswith(prefix):
            return family, name.removeprefix(prefix)
    return None


def apply_kernels(model: nn.Module, *, rms_norm: bool = True, mlp: bool = True, rotary: bool = True) -> AppliedKernels:
    """Runs the norms, gated MLPs and rotary embeddings of a transformers model with our kernels.

    Args:
        model: a model of transformers, PEFT or sentence-transformers, or any module around one; changed in place.
        rms_norm: whether its RMSNorms are.
        mlp: whether its SwiGLU / GeGLU blocks are.
        rotary: whether its attention layers are.

    Returns:
        How many modules run our kernels now, with ``remove()``; those of an earlier call count too.

    Raises:
        ConfigError: no module is of a known family, a module has a ``forward`` of its own already (accelerate's hooks,
            other kernels), or an activation is neither SiLU nor tanh-GELU.

    Example:
        >>> applied = apply_kernels(model)  # doctest: +SKIP
        >>> applied.remove()  # doctest: +SKIP
    """
    wanted = {"rms_norm": rms_norm, "mlp": mlp, "rotary": rotary}
    found: dict[str, dict[nn.Module, Forward]] = {kind: {} for kind in wanted}
    for name, module in model.named_modules():
        family, suffix = family_of(module) or ("", "")
        kind = KINDS.get(suffix)
        if kind is not None and wanted[kind]:
            found[kind][module] = _replacement(name, module, family, kind)
    if not any(found.values()):
        raise ConfigError(
            f"apply_kernels: no layer of a known family in this {type(model).__name__}; known are the models of "
            f"transformers for {', '.join(FAMILIES)}"
        )
    for modules in found.values():  # after all were checked: an error leaves the model as it was
        for module, forward in modules.items():
            module.forward = types.MethodType(forward, module)
    return AppliedKernels(model, **{kind: len(modules) for kind, modules in found.items()})


def remove_kernels(model: nn.Module) -> None:
    """Takes back what :func:`apply_kernels` changed in a model; nothing where it changed nothing."""
    for module in model.modules():
        if _is_ours(module):
            del module.forward


def _is_ours(module: nn.Module) -> bool:
    own = module.__dict__.get("forward")
    return getattr(getattr(own, "__func__", None), "bivec_kernel", False)


def _replacement(name: str, module: nn.Module, family: str, kind: str) -> Forward:
    if "forward" in module.__dict__ and not _is_ours(module):
        raise ConfigError(
            f"apply_kernels: {name} has a forward of its own already ({module.__dict__['forward']!r}); apply our "
            "kernels first, before accelerate dispatches the model, or take the other ones off"
        )
    if kind == "rms_norm":
        return _gemma_norm_forward if family.startswith("gemma") else _norm_forward
    if kind == "rotary":
        return _rotary_forward(cast(types.FunctionType, type(module).forward))  # defined with def: it has globals
    activation = type(module.act_fn).__name__
    if activation not in GATED:
        raise ConfigError(
            f"apply_kernels: {name} has the activation {activation}, our gated MLPs are {' and '.join(sorted(GATED))}; "
            "call apply_kernels(model, mlp=False)"
        )
    return GATED[activation]


def _ours(forward: Forward) -> Forward:
    vars(forward)["bivec_kernel"] = True
    return forward


@_ours
def _norm_forward(self: Any, hidden_states: Tensor) -> Tensor:
    # transformers multiplies by the weight last: an fp32 one widens the result (norms kept in fp32, autocast)
    wide = torch.promote_types(hidden_states.dtype, self.weight.dtype)
    return rms_norm(hidden_states.to(wide), self.weight, self.variance_epsilon)


@_ours
def _gemma_norm_forward(self: Any, hidden_states: Tensor) -> Tensor:
    return rms_norm(hidden_states, self.weight, self.eps, weight_offset=1.0)


@_ours
def _swiglu_forward(self: Any, x: Tensor) -> Tensor:
    projected: Tensor = self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))
    return projected


@_ours
def _geglu_forward(self: Any, x: Tensor) -> Tensor:
    projected: Tensor = self.down_proj(geglu(self.gate_proj(x), self.up_proj(x)))
    return projected


# By the class of the activation; GELUTanh is the tanh form.
GATED = {"SiLU": _swiglu_forward, "SiLUActivation": _swiglu_forward, "GELUTanh": _geglu_forward}


def _rotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """``apply_rotary_pos_emb`` of transformers: q [B, H, L, Dh], k [B, Hkv, L, Dh], cos and sin [B or 1, L, Dh]."""
    batch, _, length, width = q.shape
    if unsqueeze_dim != 1 or cos.shape[-1] != width:
        raise ConfigError(
            f"apply_kernels: rotation of {cos.shape[-1]} of {width} dimensions, along dimension {unsqueeze_dim}, is "
            "not ours; call apply_kernels(model, rotary=False)"
        )
    # transformers has gathered the angles already, doubled in width: its rows are the table
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    cos, sin = (table[..., : width // 2].flatten(0, 1).to(wide) for table in (cos, sin))  # [B * L or L, Dh / 2]
    rows = torch.arange(batch * length, device=q.device) % len(cos)
    turned = apply_rotary(q.transpose(1, 2).flatten(0, 1), k.transpose(1, 2).flatten(0, 1), cos, sin, rows)
    q, k = (x.view(batch, length, *x.shape[1:]).transpose(1, 2) for x in turned)
    return q, k


@functools.cache
def _rotary_forward(forward: types.FunctionType) -> Forward:
    return _ours(_with_global(forward, "apply_rotary_pos_emb", _rotated))


def _with_global(function: types.FunctionType, name: str, value: object) -> types.FunctionType:
    """A copy of a function that reads ``value`` under a global name; decorators around it are copied too."""
    inner = getattr(function, "__wrapped__", None)
    if inner is None:
        if name not in function.__code__.co_names:
            raise ConfigError(
                f"apply_kernels: {function.__qualname__} of this version of transformers does not call {name}; call "
                "apply_kernels(model, rotary=False)"
            )
        scope, closure, like = {**function.__globals__, name: value}, function.__closure__, function
    else:
        like = _with_global(inner, name, value)
        cells = function.__closure__ or ()
        closure = tuple(types.CellType(like) if cell.cell_contents is inner else cell for cell in cells)
        scope = function.__globals__
    copy = types.FunctionType(function.__code__, scope, function.__name__, function.__defaults__, closure)
    copy.__kwdefaults__ = function.__kwdefaults__
    if inner is not None:
        functools.update_wrapper(copy, like)
    return copy
