"""Levels of recomputation: the same losses and gradients bit for bit, and less kept for backward."""

import gc

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from bivec.engine.lora import LoraConfig, add_lora
from bivec.models import PackedBatch, load_pretrained
from bivec.models.families import MODEL_CLASSES
from bivec.models.projection import project
from bivec.models.recompute import LEVELS, Recipes

DROPOUT = {"attention_dropout": 0.3, "seed": 9}


def batch_of(*lengths):
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(1000, (length,), generator=generator).tolist() for length in lengths]
    return PackedBatch.from_sequences(texts, sample_ids=range(50, 50 + len(texts)))


def trained(directory, train_base):
    model = load_pretrained(directory).model
    if train_base:
        return model, dict(model.named_parameters()), None
    adapter = add_lora(model, LoraConfig(rank=4, dropout=0.1))
    for name, parameter in adapter.named_parameters().items():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    return model, adapter.named_parameters(), adapter


def states_and_gradients(model, parameters, adapter, batch, **options):
    if adapter is not None:
        adapter.set_noise(5, batch.token_ids())
    hidden, states = model(batch, output_hidden_states=True, **options)
    weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad((hidden * weights).sum(), list(parameters.values()))
    return [hidden.detach(), *(state.detach() for state in states), *gradients]


@pytest.mark.parametrize("train_base", [False, True], ids=["lora", "all weights"])
@pytest.mark.parametrize("mode", [{}, {"causal": True}, DROPOUT], ids=["plain", "causal", "dropout"])
@pytest.mark.parametrize("family", MODEL_CLASSES)
def test_no_level_changes_a_bit(family, mode, train_base, tiny_dir):
    model, parameters, adapter = trained(tiny_dir(family), train_base)
    batch = batch_of(17, 1, 0, 30)
    kept, *others = (
        states_and_gradients(model, parameters, adapter, batch, recompute=level, **mode) for level in LEVELS
    )
    assert any(x.count_nonzero() for x in kept[-len(parameters) :])
    for level, results in zip(LEVELS[1:], others, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(kept, results, strict=True)), level


def kept_bytes(model, batch, recompute):
    """What is left in memory of a forward pass, its output included."""
    gc.collect()  # what an earlier graph held is not to be given back meanwhile
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        hidden = model(batch, recompute=recompute)
    events = recorded.profiler.kineto_results.events()
    assert hidden.requires_grad
    return sum(event.nbytes() for event in events if event.name() == "[memory]")


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma"])
def test_each_level_keeps_less(family, tiny_dir):
    model, _, _ = trained(tiny_dir(family), False)
    batch = batch_of(100, 156)
    config, tokens = model.config, batch.num_tokens
    model(batch)  # makes the rotary tables, which stay
    by_level = {level: kept_bytes(model, batch, level) for level in LEVELS}
    # two norms' outputs and the gated product of each layer; but the embedding, frozen, is kept for the first norm only
    # where that is made again
    saved = 4 * tokens * (config.num_layers * (2 * config.hidden_size + config.intermediate_size) - config.hidden_size)
    assert by_level["none"] - by_level["selective"] == pytest.approx(saved, rel=0.001)
    # of a layer its input only; beside that the last norm's input and output, and a few numbers a token
    inputs = 4 * tokens * config.hidden_size * config.num_layers
    assert by_level["layer"] == pytest.approx(inputs + 8 * tokens * config.hidden_size, rel=0.1)


@pytest.mark.parametrize("recompute", LEVELS)
def test_a_second_backward_is_an_error_and_not_a_wrong_gradient(recompute, tiny_llama_dir):
    model, parameters, adapter = trained(tiny_llama_dir, False)
    adapter.set_noise(None)
    loss = model(batch_of(7, 12), recompute=recompute).square().sum()
    loss.backward(retain_graph=True)
    first = [parameter.grad.clone() for parameter in parameters.values()]
    if recompute != "layer":
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    else:  # where the layer has been run again, what it overwrites is new
        loss.backward()
        grads = [parameter.grad for parameter in parameters.values()]
        assert all(torch.allclose(now, 2 * before) for now, before in zip(grads, first, strict=True))


def test_what_a_recipe_reads_must_be_as_it_was():
    x, w = torch.randn(3, 3, requires_grad=True), torch.randn(3, 3, requires_grad=True)
    source = x * 2
    with Recipes(True) as recipes:
        y = source.sin()
        recipes.add(y, torch.sin, source)
        out = (y @ w).sum()
    source.detach().mul_(0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def test_evaluation_keeps_nothing_whatever_the_level(tiny_llama_dir):
    model, _, _ = trained(tiny_llama_dir, False)
    batch = batch_of(5, 9)
    with torch.no_grad():
        plain, *others = (model(batch, recompute=level) for level in LEVELS)
    assert all(torch.equal(plain, other) and not other.requires_grad for other in others)


def test_an_unknown_level_is_refused(tiny_llama_dir):
    model, _, _ = trained(tiny_llama_dir, False)
    with pytest.raises(ValueError, match="recompute is 'some', expected one of none, selective, layer"):
        model(batch_of(3), recompute="some")


def test_recipes_replace_the_tensor_itself_only():
    calls = []
    x = torch.randn(4, 6, requires_grad=True)
    w = torch.randn(6, 6, requires_grad=True)

    def make(source):
        calls.append(1)
        return source.sin()

    with Recipes(True) as recipes:
        y = x.sin()
        recipes.add(y, make, x)
        once, twice = y @ w, y @ w.T  # both save y
        part = y[:, :3] @ w[:3]  # saves a view, which no recipe makes
        recipes.forget()
    (once + twice + part).sum().backward()
    assert len(calls) == 1  # made once for both
    dx, dw = x.grad.clone(), w.grad.clone()
    x.grad = w.grad = None
    y = x.sin()
    (y @ w + y @ w.T + y[:, :3] @ w[:3]).sum().backward()
    assert torch.equal(dx, x.grad) and torch.equal(dw, w.grad)


def test_inactive_recipes_and_empty_tensors_do_nothing():
    x = torch.randn(3, 3, requires_grad=True)
    with Recipes(False) as recipes:
        y = x.exp()
        recipes.add(y, lambda: pytest.fail("not to be made again"))
        (y * y).sum().backward()
    with Recipes(True) as recipes:
        y = x[:0].exp()
        recipes.add(y, lambda: pytest.fail("not to be made again"))
        (y * y).sum().backward()


class Doubling(nn.Module):
    """A wrapper that computes all projections of an input at once."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, x):
        return 2 * self.base(x)

    @staticmethod
    def project_jointly(x, modules, backend):
        assert backend == "triton"
        return tuple(2 * module.base(x) + 1 for module in modules)


def test_project_takes_the_joint_way_only_for_one_class():
    x, (a, b) = torch.randn(3, 4), (nn.Linear(4, 5), nn.Linear(4, 2))
    wrapped = Doubling(a), Doubling(b)
    for got, expected in (
        (project(x, a, b, backend=None), (a(x), b(x))),
        (project(x, wrapped[0], b, backend=None), (2 * a(x), b(x))),
    ):
        assert all(torch.equal(g, e) for g, e in zip(got, expected, strict=True))
    joint = project(x, *wrapped, backend="triton")
    assert all(torch.equal(g, 2 * base(x) + 1) for g, base in zip(joint, (a, b), strict=True))
