"""A sharded trunk in a group of one process: master weights, the LM head, what is put together again."""

import pytest
import torch

from bivec.engine.distributed import ALONE, process_group
from bivec.engine.sharding import attach_head, detach_head, gathered, is_sharded, shard
from bivec.kernels import linear_cross_entropy
from bivec.models import Llama, Mistral, PackedBatch, load_pretrained

SEQUENCES = [[0, 5, 9, 300, 42], [0, 17], [0, *range(100, 112)]]


@pytest.fixture(autouse=True)
def group():
    with process_group(ALONE, "cpu", of_one=True):
        yield
    assert not torch.distributed.is_initialized()


def loss_of(model, head):
    batch = PackedBatch.from_sequences(SEQUENCES)
    hidden = model(batch)
    targets = batch.input_ids.roll(-1)
    return linear_cross_entropy(hidden, head() if callable(head) else head, targets)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_gradients_are_those_of_the_plain_model(tied, trained, tiny_llama_dir):
    """Of all weights and of the head; one that is frozen has none, a tied one then only that of the embedding."""
    gradients = []
    for sharded in (False, True):
        checkpoint = load_pretrained(tiny_llama_dir, dtype=torch.float64)
        model = checkpoint.model.requires_grad_(True)
        weight = model.embed_tokens.weight if tied else checkpoint.lm_head_weight
        if sharded:
            head = attach_head(model, weight, trained=trained)
            shard(model, ALONE, "cpu")
            loss_of(model, head).backward()
            found = {name: parameter.grad for name, parameter in model.named_parameters()}
            found = {name: None if grad is None else grad.full_tensor() for name, grad in found.items()}
            detach_head(model)
            assert "lm_head_weight" not in dict(model.named_parameters())
        else:
            weight = weight if trained else weight.detach()
            loss_of(model, weight.requires_grad_(trained) if not tied else weight).backward()
            found = {name: parameter.grad for name, parameter in model.named_parameters()}
            if not tied:
                found["lm_head_weight"] = weight.grad
        gradients.append(found)
    plain, found = gradients
    assert plain.keys() == found.keys()
    for name, gradient in plain.items():
        if gradient is None:
            assert found[name] is None and name == "lm_head_weight" and not trained
        else:
            assert (found[name] - gradient).norm() <= 1e-12 * gradient.norm(), name


def test_master_weights_keep_what_bf16_would_lose(tiny_llama_dir):
    """Updates of 1e-5 of a weight vanish in bf16, whose numbers are 1/256 apart: ten of them are there in fp32."""
    checkpoint = load_pretrained(tiny_llama_dir, dtype=torch.float32)
    model = checkpoint.model.requires_grad_(True)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    shard(model, ALONE, "cpu", torch.bfloat16)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-7)
    gradients: dict[str, torch.Tensor] = {}
    for _ in range(10):
        optimizer.zero_grad()
        hidden = model(PackedBatch.from_sequences(SEQUENCES))
        assert hidden.dtype == torch.bfloat16
        hidden.float().pow(2).sum().backward()
        assert {parameter.grad.dtype for parameter in model.parameters()} == {torch.float32}
        for name, parameter in model.named_parameters():
            gradients[name] = gradients.get(name, 0) + parameter.grad.full_tensor()
        optimizer.step()
    after = {name: parameter.detach() for name, parameter in gathered(model, ALONE).named_parameters()}
    assert after.keys() == before.keys()
    for name, weight in before.items():
        update = -1e-7 * gradients[name]
        assert update.norm() > 0
        # of a sum of ten roundings to fp32; the update itself is far below a bf16 step
        assert (after[name] - weight - update).abs().max() <= 10 * 2**-24 * weight.abs().max() + 1e-13, name
        assert update.abs().max() < 2**-9 * weight.abs().max()


def test_micro_batches_add_up_in_fp32(tiny_llama_dir):
    """A hundred small gradients after a large one: in bf16 sums of them stop growing."""
    model = load_pretrained(tiny_llama_dir, dtype=torch.float32).model.requires_grad_(True)
    shard(model, ALONE, "cpu", torch.bfloat16)
    batch = PackedBatch.from_sequences(SEQUENCES)
    (100 * model(batch).float().pow(2).sum()).backward()
    large = model.norm.weight.grad.full_tensor().clone()
    for _ in range(100):
        (0.1 * model(batch).float().pow(2).sum()).backward()
    total = model.norm.weight.grad.full_tensor()
    torch.testing.assert_close(total, large * 1.1, rtol=2e-3, atol=0)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_put_together_again(family, request):
    directory = request.getfixturevalue(f"tiny_{family}_dir")
    model = load_pretrained(directory).model
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    expected = model(PackedBatch.from_sequences(SEQUENCES))
    shard(model, ALONE, "cpu")
    assert is_sharded(model)
    plain = gathered(model, ALONE)
    assert type(plain) is {"llama": Llama, "mistral": Mistral}[family] and not is_sharded(plain)
    assert all(torch.equal(parameter, before[name]) for name, parameter in plain.named_parameters())
    assert torch.equal(plain(PackedBatch.from_sequences(SEQUENCES)), expected)
    assert gathered(model, ALONE, torch.bfloat16).norm.weight.dtype == torch.bfloat16
