"""Weights spread over the ranks: trunks that do not fit on one device, and full-weight training.

FSDP2 (torch's ``fully_shard``) keeps 1/ranks of every parameter, gradient and optimiser state on each rank and fetches
the weights of a layer as it runs. For full-weight training in bf16 the sharded parameters are fp32, the master weights;
a layer computes in a bf16 copy, gradients are reduced and added up in fp32. One process trains all weights in the same
way, as a group of one, so that there is one path.

Source: Zhao et al. 2023 (PyTorch FSDP); Micikevicius et al. 2018 (master weights).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from bivec.engine.distributed import World, whole
from bivec.models import Llama

HEAD = "lm_head_weight"  # an LM head of its own, as a parameter of the trunk while it is sharded or trained


def attach_head(model: Llama, weight: Tensor, *, trained: bool) -> Callable[[], Tensor]:
    """Puts an LM head under the engine that shards or reduces the trunk.

    Args:
        model: the trunk.
        weight: [V, D]; the embedding parameter itself means tied.
        trained: whether scores have a gradient for it. Of a tied head that is frozen, the embedding is trained by its
            use as an input alone.

    Returns:
        What gives the weight between the forward of the model and its backward.
    """
    if weight is model.embed_tokens.weight:
        return lambda: model.embed_tokens.weight if trained else model.embed_tokens.weight.detach()
    weight = weight.detach()
    if trained and weight.itemsize < 4:  # a master, as all that is trained
        weight = weight.float()
    model.register_parameter(HEAD, nn.Parameter(weight, requires_grad=trained))
    return lambda: getattr(model, HEAD).to(model.embed_tokens.weight.dtype)


def detach_head(model: Llama) -> None:
    """The trunk as it was, with the head out of its parameters."""
    if hasattr(model, HEAD):
        delattr(model, HEAD)


def shard(model: Llama, world: World, device: torch.device | str, compute_dtype: torch.dtype | None = None) -> None:
    """Spreads the model's parameters over the ranks, layer by layer, in place. Optimisers are made afterwards.

    Args:
        model: a trunk in host memory or on ``device``, adapters and LM head included.
        world: all ranks of the process group.
        device: of this rank.
        compute_dtype: of the layers' weights and activations, where it is not the parameters'; gradients are reduced in
            the parameters' dtype.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(torch.device(device).type, (world.size,))
    dtype = next(model.parameters()).dtype
    mixed = {}
    if compute_dtype is not None and compute_dtype != dtype:
        mixed = {"param_dtype": compute_dtype, "reduce_dtype": dtype}
    # inputs are left alone: the rotary tables among them are fp32, and the embedding's output is of the right dtype
    policy = MixedPrecisionPolicy(**mixed, cast_forward_inputs=False)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    # embedding, last norm and head stay whole from the forward to the backward: a tied or attached head is read there
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)


def gathered(model: Llama, world: World) -> Llama | None:
    """The trunk put together in the host memory of rank 0, one parameter after the other; None on the other ranks.

    Every rank must call it.
    """
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):  # what the last forward has left whole is in the dtype of the computation
            module.reshard()
    with torch.device("meta"):
        plain = type_of(model)(model.config)
    tensors = {}
    for name, parameter in model.named_parameters():
        if name == HEAD:
            continue
        tensor = whole(parameter.detach())
        if world.is_main:
            tensors[name] = nn.Parameter(tensor.to("cpu", copy=True), requires_grad=False)
    if not world.is_main:
        return None
    plain.load_state_dict(tensors, assign=True)
    return plain


def type_of(model: Llama) -> type[Llama]:
    """The model's own class: ``fully_shard`` puts one of its own in front."""
    return next(cls for cls in type(model).__mro__ if cls.__module__.startswith("bivec."))
