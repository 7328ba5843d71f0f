"""Gradient caching: a step in micro-batches has the loss and the gradients of the step in one forward."""

from dataclasses import FrozenInstanceError, dataclass, replace

import numpy as np
import pytest
import torch

from bivec.engine import grad_cache
from bivec.engine.distributed import World
from bivec.engine.grad_cache import Embedder, PackedRows, loss_workspace, micro_batches
from bivec.engine.lora import LoraConfig, add_lora
from bivec.engine.micro_loss import lora_noise
from bivec.engine.objectives import ATTENTION_SITE, SimcseObjective, simcse_loss
from bivec.engine.optim import OptimConfig
from bivec.engine.trainer import train
from bivec.kernels import fold_seed
from bivec.models import PackedBatch, load_pretrained

SENTENCES = [[0, 5, 9, 300, 42], [0, 17], [0, *range(100, 112)], [0, 3, 3, 3, 3, 3], [0, 8, 700], [0, 2, 4, 6, 8, 10]]
TOKENS = 2 * sum(map(len, SENTENCES))
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def simcse(directory, dtype=torch.float64, **options):
    model = load_pretrained(directory, dtype=dtype).model
    adapter = add_lora(model, LoraConfig(rank=4, dropout=0.1), seed=1)
    for number, parameter in enumerate(adapter.named_parameters().values()):
        values = torch.rand(parameter.shape, generator=torch.Generator().manual_seed(number))
        parameter.data = (0.2 * values - 0.1).to(dtype)  # an adapter is fp32, whatever the model
    return SimcseObjective(model, adapter, SENTENCES, batch_size=len(SENTENCES), seed=7, skip_prefix=1, **options)


def step(objective, number=3):
    """Loss, gradients, micro-batches and tokens of a step."""
    parameters = objective.adapter.named_parameters().values()
    for parameter in parameters:
        parameter.grad = None
    loss, tokens, count = 0.0, 0, 0
    for micro in objective.micro_losses(number):
        micro.loss.backward()
        loss, tokens, count = loss + float(micro.value), tokens + micro.tokens, count + 1
    return loss, [parameter.grad.clone() for parameter in parameters], count, tokens


def assert_equal_steps(found, expected, dtype):
    assert found[0] == pytest.approx(expected[0], rel=TOLERANCE[dtype])
    for ours, theirs in zip(found[1], expected[1], strict=True):
        assert theirs.norm() > 0 and (ours - theirs).norm() <= TOLERANCE[dtype] * theirs.norm()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("budget", "count"), [(1, 12), (16, 6), (30, 3), (TOKENS, 1)])
def test_micro_batches_change_nothing(tiny_llama_dir, dtype, budget, count):
    whole = step(simcse(tiny_llama_dir, dtype))
    cached = step(simcse(tiny_llama_dir, dtype, micro_batch_tokens=budget))
    assert whole[2] == 1 and cached[2] == count and whole[3] == cached[3] == TOKENS
    assert_equal_steps(cached, whole, dtype)


@pytest.mark.parametrize("recompute", ["selective", "layer"])
def test_with_recomputation(tiny_llama_dir, recompute):
    whole = step(simcse(tiny_llama_dir))
    assert_equal_steps(step(simcse(tiny_llama_dir, micro_batch_tokens=20, recompute=recompute)), whole, torch.float64)


def test_one_forward_is_the_plain_loss(tiny_llama_dir):
    """Against the public loss function on the same views, its gradient by autograd through everything."""
    objective = simcse(tiny_llama_dir)
    found = step(objective)
    rows = objective.rows(3)
    views = PackedBatch.from_sequences(rows.input_ids, rows.sample_ids)
    parameters = objective.adapter.named_parameters().values()
    for parameter in parameters:
        parameter.grad = None
    with lora_noise(objective.adapter, objective.seed, views):
        loss = simcse_loss(objective.model, views, skip_prefix=1, seed=fold_seed(objective.seed, ATTENTION_SITE))
        loss.backward()
    assert_equal_steps(found, (loss.item(), [parameter.grad for parameter in parameters]), torch.float64)


def test_dropout_is_on_in_both_forwards(tiny_llama_dir):
    """Without the noise of the first forward the gradients would be those of another loss."""
    objective = simcse(tiny_llama_dir, micro_batch_tokens=16)
    assert step(objective, 3)[0] != pytest.approx(step(replace(objective, attention_dropout=0.0), 3)[0], rel=1e-6)
    seen = []
    forward = objective.model.forward

    def noting(batch, **options):
        hidden = forward(batch, **options)
        seen.append((tuple(batch.sample_ids.tolist()), objective.adapter.noise.seed, hidden.detach().clone()))
        return hidden

    objective.model.forward = noting
    step(objective)
    first, second = seen[:5], seen[6:]  # of the sixth micro-batch the graph is kept
    assert len(second) == 5
    for (ids, seed, hidden), (again, other, repeated) in zip(first, second, strict=True):
        assert ids == again and seed == other is not None and torch.equal(hidden, repeated)


def test_training_is_the_same(tiny_llama_dir):
    """Losses and gradient norms of three steps of the trainer."""
    lines = {}
    for budget in (None, 25):
        lines[budget] = []
        objective = simcse(tiny_llama_dir, micro_batch_tokens=budget)
        parameters, optim = objective.adapter.named_parameters(), OptimConfig(1e-2, steps=3)
        train("simcse", objective, parameters, optim, log=lines[budget].append, progress=False)
    for whole, cached in zip(*lines.values(), strict=True):
        assert cached.loss == pytest.approx(whole.loss, rel=1e-9) and cached.tokens == whole.tokens
        assert cached.grad_norm == pytest.approx(whole.grad_norm, rel=1e-9)


def test_less_memory_ends(tiny_llama_dir):
    """More recomputation, then halves, until a micro-batch is a sequence; every setting is another one."""
    objective, settings = simcse(tiny_llama_dir), []
    while objective is not None:
        settings.append(objective.memory_setting())
        objective = objective.with_less_memory()
    assert settings == [
        "recomputation 'none'",
        "recomputation 'selective'",
        "recomputation 'layer'",
        "micro-batches of 35 tokens, recomputation 'layer'",
        "micro-batches of 17 tokens, recomputation 'layer'",
    ]


def test_micro_batches_hold_every_sequence_once():
    lengths = np.array([5, 2, 13, 6])
    assert micro_batches(lengths, None) == micro_batches(lengths, 26) == micro_batches(lengths, 99) == [[0, 1, 2, 3]]
    found = micro_batches(lengths, 12)
    assert sorted(i for group in found for i in group) == [0, 1, 2, 3] and found[0] == [2]


@dataclass(frozen=True)
class Slower(World):
    """Another rank has so many micro-batches more than this one."""

    more: int = 0

    def max(self, number):
        return number + self.more


@pytest.mark.parametrize("budget", [16, TOKENS])
@pytest.mark.parametrize("sharded", [True, False])
def test_ranks_of_a_sharded_model_run_as_many_micro_batches(tiny_llama_dir, monkeypatch, budget, sharded):
    """The last one again, for nothing: its gradients are those of this rank alone; the last backward exchanges them."""
    expected = step(simcse(tiny_llama_dir, micro_batch_tokens=budget))
    told, forwards = [], []
    monkeypatch.setattr(grad_cache, "is_sharded", lambda model: sharded)
    monkeypatch.setattr(grad_cache, "sync_gradients", lambda model, last: told.append(last))
    objective = simcse(tiny_llama_dir, micro_batch_tokens=budget, world=Slower(more=3))
    forward = objective.model.forward

    def noting(batch, **options):
        forwards.append(batch.sample_ids.tolist())
        return forward(batch, **options)

    objective.model.forward = noting
    found = step(objective)
    more = 3 if sharded else 0
    assert found[2] == expected[2] + more and found[3] == expected[3]
    assert_equal_steps(found, expected, torch.float64)
    assert told == [False] * (found[2] - 1) + [True]
    losses = []
    for micro in simcse(tiny_llama_dir, micro_batch_tokens=budget, world=objective.world).micro_losses(3):
        losses.append(micro.loss.item())
        micro.loss.backward()
    assert losses[expected[2] :] == [0.0] * more
    own = expected[2] - 1  # those run twice; between them the one whose graph is kept
    assert len(forwards) == 2 * (own + more) + 1
    first, kept, second = forwards[: own + more], forwards[own + more], forwards[own + more + 1 :]
    assert first == second and first[own:] == [first[own - 1] if own else kept] * more


def test_the_embedder_has_no_dropout_by_default(tiny_llama_dir):
    objective = simcse(tiny_llama_dir)
    plain = Embedder(objective.model, None, seed=7)
    packed = PackedRows.of(objective.rows(3), [0, 2, 4])
    found = []
    for embedder in (plain, replace(plain, attention_dropout=0.0), replace(plain, attention_dropout=0.5)):
        with embedder.embed(packed) as (pooled, places):
            assert places.tolist() == [0, 2, 4]
            found.append(pooled.detach())
    assert torch.equal(found[0], found[1]) and not torch.allclose(found[0], found[2])
    with pytest.raises(FrozenInstanceError):
        plain.seed = 8
    with pytest.raises(FrozenInstanceError):
        objective.rows(3).spans = None
    with pytest.raises(FrozenInstanceError):
        packed.places = None


def test_the_loss_takes_little_memory_on_a_cpu_alone():
    assert loss_workspace("cpu") == 16 << 20 and loss_workspace("cuda") is loss_workspace(torch.device("meta")) is None
