"""A sharded trunk in a group of one process: master weights, the LM head, what is put together again."""

import errno
from dataclasses import replace

import pytest
import torch

from bivec.engine.checkpoint import TrainState, load_checkpoint, save_checkpoint
from bivec.engine.distributed import ALONE, World, is_sharded, process_group
from bivec.engine.errors import CheckpointError
from bivec.engine.sharding import attach_head, detach_head, gathered, shard
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


def test_a_bf16_forward_is_that_of_the_plain_model(tiny_llama_dir):
    """Bit by bit; the rotary tables stay fp32."""
    batch = PackedBatch.from_sequences(SEQUENCES)
    expected = load_pretrained(tiny_llama_dir, dtype=torch.bfloat16).model(batch)
    masters = load_pretrained(tiny_llama_dir, dtype=torch.float32).model.requires_grad_(True)
    shard(masters, ALONE, "cpu", torch.bfloat16)
    assert torch.equal(masters(batch), expected)


def test_masters_are_put_together_after_an_evaluation(tiny_llama_dir):
    """Which leaves the embedding whole, in bf16."""
    model = load_pretrained(tiny_llama_dir, dtype=torch.float32).model
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    shard(model, ALONE, "cpu", torch.bfloat16)
    with torch.no_grad():
        model(PackedBatch.from_sequences(SEQUENCES))
    after = dict(gathered(model, ALONE).named_parameters())
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_trained_head_beside_an_adapter_is_a_master(dtype, tiny_llama_dir):
    checkpoint = load_pretrained(tiny_llama_dir, dtype=dtype)
    head = attach_head(checkpoint.model.requires_grad_(False), checkpoint.lm_head_weight, trained=True)
    loss_of(checkpoint.model, head).backward()
    parameter = checkpoint.model.lm_head_weight
    assert parameter.dtype == parameter.grad.dtype == torch.float32 and parameter.grad.norm() > 0
    assert head().dtype == dtype


def test_a_full_disk(tiny_llama_dir, tmp_path, monkeypatch):
    model = load_pretrained(tiny_llama_dir).model
    shard(model, ALONE, "cpu")
    state = TrainState("mntp", 1, dict(model.named_parameters()), torch.optim.AdamW(model.parameters()))
    save_checkpoint(tmp_path, state)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch.distributed.checkpoint.HuggingFaceStorageWriter, "write_data", full)
    with pytest.raises(CheckpointError, match="mntp-000002: the disk is full"):
        save_checkpoint(tmp_path, replace(state, step=2))
    assert [path.name for path in tmp_path.iterdir()] == ["mntp-000001"]


@pytest.fixture
def state(tiny_llama_dir):
    """A sharded model behind its first step, which no gradient took part in."""
    model = load_pretrained(tiny_llama_dir).model
    shard(model, ALONE, "cpu")
    return TrainState("mntp", 1, dict(model.named_parameters()), torch.optim.AdamW(model.parameters()))


def test_a_disk_that_the_ranks_do_not_share(state, tmp_path):
    """Rank 0 of two finds its own shard alone; the earlier checkpoint is still there, and nothing beside it."""
    save_checkpoint(tmp_path, state)
    message = "mntp-000002: 1 of 2 shards are there; the directory must be on a file system that all ranks share"
    with pytest.raises(CheckpointError, match=message):
        save_checkpoint(tmp_path, replace(state, step=2), World(0, 2))
    assert [path.name for path in tmp_path.iterdir()] == ["mntp-000001"]


def test_a_disk_that_cannot_be_read(state, tmp_path, monkeypatch):
    path = save_checkpoint(tmp_path, state)
    before = {name: parameter.full_tensor().clone() for name, parameter in state.parameters.items()}

    def broken(*_, **__):
        raise OSError(errno.EIO, "Input/output error")

    with torch.no_grad():
        state.parameters["norm.weight"].add_(1.0)
    with monkeypatch.context() as patch:
        patch.setattr(torch.distributed.checkpoint.HuggingFaceStorageReader, "read_data", broken)
        with pytest.raises(
            CheckpointError, match=f"{path}: not a whole checkpoint .*Input/output error.*delete it to resume"
        ):
            load_checkpoint(path, state)
    assert torch.equal(state.parameters["norm.weight"].full_tensor(), before["norm.weight"] + 1.0)  # nothing was copied
    load_checkpoint(path, state)
    assert all(torch.equal(state.parameters[name].full_tensor(), weight) for name, weight in before.items())


def test_shards_of_another_type_are_refused(state, tiny_llama_dir, tmp_path):
    path = save_checkpoint(tmp_path, state)
    model = load_pretrained(tiny_llama_dir, dtype=torch.bfloat16).model
    shard(model, ALONE, "cpu")
    half = TrainState("mntp", 1, dict(model.named_parameters()), torch.optim.AdamW(model.parameters()))
    with pytest.raises(CheckpointError, match=r"is stored as torch\.float32, this run has torch\.bfloat16"):
        load_checkpoint(path, half)


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
