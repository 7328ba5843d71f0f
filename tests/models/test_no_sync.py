"""On the Triton path nothing in models, kernels and losses reads a value of a device tensor: a GPU would stall for it.

The tensors are on the "meta" device, which has no values, inside ``recording``, which notes the launches instead of
making them; a dispatch mode refuses what would wait for a GPU, whatever the device.
"""

from contextlib import nullcontext

import pytest
import torch
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from bivec.engine.lora import LoraConfig, add_lora
from bivec.engine.masking import MntpBatch
from bivec.engine.objectives import mntp_loss, simcse_loss
from bivec.kernels.launch import recording
from bivec.models import PackedBatch, load_pretrained
from bivec.models.families import MODEL_CLASSES
from bivec.models.recompute import LEVELS

META = torch.device("meta")
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "item", "equal", "is_nonzero"}


class NoSync(TorchDispatchMode):
    """Refuses, on meta tensors, operators that need a value on the host, and copies to it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        if name in OPDEFS:  # of ours: what it does on a GPU, where meta tensors would be given the fake result
            with self:
                return OPDEFS[name]._init_fn(*args, **kwargs)
        tensors = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if any(x.device.type == "meta" for x in tensors):
            # repeat_interleave is one of them unless it is told how long its result is
            unsized = name == "repeat_interleave" and kwargs.get("output_size") is None
            assert name not in WAITING and not unsized, f"{name} waits for the device"
            to_host = {x.device.type for x in args[:1]} if name == "copy_" else {str(kwargs.get("device", "meta"))}
            assert to_host <= {"meta", "None"}, f"{name} copies from the device to {to_host}"
        return func(*args, **kwargs)


def batch_of(*lengths):
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(900, (length,), generator=generator).tolist() for length in lengths]
    return PackedBatch.from_sequences(texts, device=META)


def trained(directory):
    """The tiny model, its weights on no device, with an adapter."""
    model = load_pretrained(directory).model.to(META)
    return model, add_lora_on_meta(model)


def add_lora_on_meta(model):
    adapter = add_lora(model, LoraConfig(rank=4, dropout=0.1))
    assert all(p.device.type == "meta" for p in adapter.named_parameters().values())
    return adapter


def losses(model, adapter, recompute):
    views = batch_of(5, 40, 17, 5, 40, 17)
    adapter.set_noise(torch.zeros(1, dtype=torch.int64, device=META), views.token_ids())
    seed = torch.zeros(1, dtype=torch.int64, device=META)
    yield simcse_loss(model, views, skip_prefix=1, seed=seed, recompute=recompute, backend="triton")
    blocks = batch_of(64, 64)
    index = torch.arange(20, device=META)
    adapter.set_noise(torch.zeros(1, dtype=torch.int64, device=META), blocks.token_ids())
    head = torch.empty(1000, model.config.hidden_size, device=META)
    masked = MntpBatch(blocks, index, torch.empty(20, dtype=torch.int64, device=META))
    yield mntp_loss(model, head, masked, normalizer=20.0, recompute=recompute, backend="triton")


@pytest.mark.parametrize("recompute", LEVELS)
@pytest.mark.parametrize("family", MODEL_CLASSES)
def test_forward_and_backward_read_nothing(family, recompute, tiny_dir, monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # it knows no meta device
    model, adapter = trained(tiny_dir(family))
    assert type(model) is MODEL_CLASSES[family]
    with recording("sm_90") as launches, NoSync():
        for loss in losses(model, adapter, recompute):
            loss.backward()
    names = {launch.kernel.__name__ for launch in launches}
    assert {"attention_forward", "rms_norm_backward", "lora_gradient", "rotary", "gated_unit_backward"} <= names
    assert {"info_nce_scores", "cross_entropy_rows", "segment_pool_backward"} <= names
    assert all(p.grad is not None for p in adapter.named_parameters().values())


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).any()),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.cpu(),
        lambda x: x.tolist(),
        lambda x: torch.repeat_interleave(x.long()),
        lambda x: torch.empty(4).copy_(x),
    ],
)
def test_the_mode_refuses_what_waits(read):
    x = torch.ones(4, device=META)
    with NoSync():
        torch.repeat_interleave(x, torch.ones(4, dtype=torch.int64, device=META), output_size=4)
        x.to(torch.float64).sum()
        torch.ones(4, device=META).copy_(x)
        read(torch.ones(4))  # on the host nobody waits
    refused = (AssertionError, NotImplementedError)  # the latter by torch, which looks for what a mask selects before
    with pytest.raises(refused, match=r"waits for the device|copies from the device|nonzero"), NoSync():
        read(x)
