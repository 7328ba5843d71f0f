"""Projections of a model that keeps no graph: the same states as with one, by fewer passes."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from bivec.engine.lora import LoraConfig, add_lora
from bivec.kernels import linear_torch
from bivec.models import PackedBatch, load_pretrained
from bivec.models.families import MODEL_CLASSES
from bivec.models.projection import project, project_gated, project_onto

fused = pytest.mark.skipif(not linear_torch.available(), reason="torch has no oneDNN here")
LENGTHS = (17, 1, 0, 30, 25, 25, 40)  # 138 tokens


def batch_of(*lengths):
    generator = torch.Generator().manual_seed(0)
    return PackedBatch.from_sequences([torch.randint(1000, (n,), generator=generator).tolist() for n in lengths])


class Operators(TorchDispatchMode):
    """Counts the calls of operators by name."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func.overloadpacket)
        self.calls[name] = self.calls.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def counted(model, batch, **options):
    with torch.no_grad(), Operators() as operators:
        model(batch, **options)
    return operators.calls


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"attention_dropout": 0.3, "seed": 2}], ids=str)
@pytest.mark.parametrize("family", MODEL_CLASSES)
def test_states_are_those_of_a_graph(family, options, tiny_dir):
    model, batch = load_pretrained(tiny_dir(family)).model, batch_of(*LENGTHS)
    expected, expected_states = model(batch, output_hidden_states=True, **options)
    assert expected.requires_grad
    with torch.no_grad():
        hidden, states = model(batch, output_hidden_states=True, **options)
        again, states_again = model(batch, output_hidden_states=True, **options)
    assert len(states) == len(expected_states)
    for a, b in zip((hidden, *states), (expected, *expected_states), strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-5, atol=1e-5)  # states of size 1, another library's sums
    assert all(torch.equal(a, b) for a, b in zip((hidden, *states), (again, *states_again), strict=True))


@fused
def test_a_layer_without_a_graph_is_six_kinds_of_one_operator(tiny_llama_dir):
    model, batch = load_pretrained(tiny_llama_dir).model, batch_of(*LENGTHS)
    layers = len(model.layers)
    calls = counted(model, batch)
    assert calls["mkldnn._linear_pointwise"] == 7 * layers
    assert not {"aten.mm", "aten.addmm", "aten.silu", "aten.add"} & calls.keys()
    few = counted(model, batch_of(1))  # the same way, or a text alone would not have the vector it has in a batch
    assert few["mkldnn._linear_pointwise"] == 7 * layers and "aten.mm" not in few


@fused
@pytest.mark.parametrize("family", ["gemma", "gemma2"])
def test_geglu_is_a_pass_of_its_own(family, tiny_dir):
    model, batch = load_pretrained(tiny_dir(family)).model, batch_of(*LENGTHS)
    layers = len(model.layers)
    calls = counted(model, batch)
    assert calls["mkldnn._linear_pointwise"] == 7 * layers and calls["aten.gelu"] == layers
    assert "aten.mm" not in calls


@fused
def test_hooks_and_adapters_still_run(tiny_llama_dir):
    model, batch = load_pretrained(tiny_llama_dir).model, batch_of(*LENGTHS)
    layers, seen = len(model.layers), []
    with model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: seen.append("up")):
        # gate and up of layer 0 are plain
        assert counted(model, batch)["mkldnn._linear_pointwise"] == 7 * layers - 2
    assert seen == ["up"]
    adapter = add_lora(model, LoraConfig(rank=4, targets=("down_proj", "q_proj")))
    for layer in adapter.layers.values():
        nn.init.constant_(layer.lora_b, 0.1)
    expected = model(batch).detach()
    # q, k and v are not of one class, so each goes its own way; k, v, o, gate and up are plain
    assert counted(model, batch)["mkldnn._linear_pointwise"] == 3 * layers
    with torch.no_grad():
        torch.testing.assert_close(model(batch), expected, rtol=1e-5, atol=1e-5)


@fused
@pytest.mark.parametrize("bias", [False, True])
def test_projections_one_by_one(bias):
    torch.manual_seed(0)
    gate, up, down = nn.Linear(48, 80, bias), nn.Linear(48, 80, bias), nn.Linear(80, 48, bias)
    x = torch.randn(5, 48)
    product = nn.functional.silu(gate(x)) * up(x)
    assert project_gated(x, gate, up, backend=None) is None  # a graph is kept
    stream, update = project_onto(x, product, down, backend=None)
    assert stream is x and torch.equal(update, down(product))
    with torch.no_grad():
        for a, b in zip(project(x, gate, up, backend="torch"), (gate(x), up(x)), strict=True):
            torch.testing.assert_close(a, b)
        torch.testing.assert_close(project_gated(x, gate, up, backend=None), product)
        kept = x.clone()
        total, nothing = project_onto(x, product, down, backend=None)
        assert nothing is None and torch.equal(x, kept)
        torch.testing.assert_close(total, x + down(product))
