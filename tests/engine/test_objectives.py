"""MNTP and SimCSE losses against plain torch, and the objectives that feed them (METHOD 14.3, 14.6)."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bivec.engine import objectives
from bivec.engine.data import BlockDataset
from bivec.engine.distributed import World
from bivec.engine.lora import LoraConfig, add_lora
from bivec.engine.masking import MaskingConfig, MntpBatch, mask_batch
from bivec.engine.objectives import MntpObjective, SimcseObjective, mntp_loss, simcse_loss
from bivec.models import PackedBatch, load_pretrained

SENTENCES = [[0, 5, 9, 300, 42], [0, 17], [0, *range(100, 112)], [0, 3, 3, 3, 3, 3]]


class Fixed(nn.Module):
    """A "model" whose hidden states are given."""

    def __init__(self, hidden):
        super().__init__()
        self.hidden = nn.Parameter(hidden)

    def forward(self, batch, **_):
        return self.hidden


class Spy(nn.Module):
    """Passes everything on to a model and keeps its last batch and hidden states."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, batch, **options):
        self.batch, self.hidden = batch, self.model(batch, **options)
        return self.hidden


def test_mntp_reads_the_row_before():
    """Head = identity, so the hidden states are the logits."""
    vocabulary, lengths = 11, (4, 3)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, vocabulary, generator=generator)
    sequences = [[1, 2, 3, 4], [5, 6, 7]]
    specials = [[True, False, False, False], [False, False, False]]
    config = MaskingConfig(mask_token_id=9, vocab_size=vocabulary, probability=1.0, style="all_mask")
    batch = mask_batch(sequences, specials, config, seed=0, sample_ids=[0, 1])
    assert batch.batch.input_ids.tolist() == [1, 9, 9, 9, 9, 9, 9]  # the special one stays, position 0 of the other not
    model = Fixed(logits)
    loss = mntp_loss(model, torch.eye(vocabulary), batch)
    # token i is scored at row i - 1; the token 5 at position 0 has no row and no loss
    expected = -logits.double().log_softmax(-1)[[0, 1, 2, 4, 5], [2, 3, 4, 6, 7]].mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    loss.backward()
    touched = model.hidden.grad.abs().sum(1) > 0
    assert touched.tolist() == [
        True,
        True,
        True,
        False,
        True,
        True,
        False,
    ]  # the last row of a sequence predicts nothing
    assert sum(lengths) == len(touched)


@pytest.fixture
def kernel_calls(monkeypatch):
    """The positional arguments of every call that an objective makes of a kernel, by its name."""
    calls = {}

    def noting(name, kernel):
        def call(*arguments, **options):
            calls.setdefault(name, []).append(arguments)
            return kernel(*arguments, **options)

        return call

    for name in ("linear_cross_entropy", "info_nce", "segment_pool"):
        monkeypatch.setattr(objectives, name, noting(name, getattr(objectives, name)))
    return calls


def test_mntp_scores_the_masked_rows_and_never_forms_all_logits(kernel_calls):
    vocabulary, length = 5000, 400
    config = MaskingConfig(mask_token_id=9, vocab_size=vocabulary, probability=0.2, style="all_mask")
    batch = mask_batch([list(range(10, 10 + length))], [[False] * length], config, seed=0, sample_ids=[0])
    model, head = Fixed(torch.randn(length, 4)), torch.randn(vocabulary, 4)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        mntp_loss(model, head, batch).backward()
    ((hidden, weight, _, index),) = kernel_calls["linear_cross_entropy"]
    assert hidden.shape == (length, 4) and weight is head and 40 < len(index) == len(batch.targets) < 140
    sizes = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert 4 * vocabulary * len(index) <= max(sizes) < 4 * vocabulary * length / 2


def test_simcse_pools_with_segment_pool(kernel_calls):
    batch = views()
    simcse_loss(Fixed(torch.randn(len(batch.input_ids), 4)), batch).backward()
    ((hidden, bounds),) = kernel_calls["segment_pool"]
    assert len(hidden) == len(batch.input_ids) and bounds is batch.cu_seqlens
    assert [x.shape for x in kernel_calls["info_nce"][0]] == [((len(bounds) - 1) // 2, 4)] * 2


def test_mntp_of_one_masked_token():
    logits = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    packed = PackedBatch.from_sequences([[1, 2, 3, 4]])
    batch = MntpBatch(packed, torch.tensor([1]), torch.tensor([3]))  # position 2 is masked
    loss = mntp_loss(Fixed(logits), torch.eye(6), batch)
    for row in range(4):
        other = logits.clone()
        other[row] += torch.arange(6)
        assert (mntp_loss(Fixed(other), torch.eye(6), batch) == loss).item() == (row != 1)
    halved = mntp_loss(Fixed(logits), torch.eye(6), batch, normalizer=torch.tensor(2.0))
    assert halved.item() == pytest.approx(loss.item() / 2)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_mntp_equals_transformers(family, tiny_dir, tmp_path):
    """The labels through the causal-LM shift of transformers: -100 everywhere but at the masked tokens."""
    from transformers import AutoModelForCausalLM

    # before transformers 5.21 "sdpa" leaves out the cap on Gemma 2's attention scores
    attention = {"attn_implementation": "eager"} if family == "gemma2" else {}
    theirs = AutoModelForCausalLM.from_pretrained(tiny_dir(family), dtype=torch.float32, **attention)
    theirs.config.is_causal = False
    if family == "gemma2":
        theirs.config.final_logit_softcapping = 2.0  # nearer to what the scores are
    theirs.save_pretrained(tmp_path)
    checkpoint = load_pretrained(tmp_path)
    softcap = checkpoint.config.final_logit_softcapping
    assert (softcap is None) == (family == "llama")
    originals = [list(range(50 + 20 * row, 66 + 20 * row)) for row in range(3)]
    config = MaskingConfig(mask_token_id=64, vocab_size=1000, probability=0.4)
    batch = mask_batch(originals, np.zeros((3, 16), bool), config, seed=3, sample_ids=range(3))
    labels = torch.full((48,), -100)
    labels[batch.index + 1] = batch.targets
    expected = theirs(input_ids=batch.batch.input_ids.view(3, 16), labels=labels.view(3, 16)).loss
    loss = mntp_loss(checkpoint.model, checkpoint.lm_head_weight, batch, softcap=softcap)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    if softcap:
        uncapped = mntp_loss(checkpoint.model, checkpoint.lm_head_weight, batch)
        assert abs(uncapped.item() - expected.item()) > 0.01


def test_the_objective_hands_the_cap_on(tiny_dir, monkeypatch):
    caps = []
    monkeypatch.setattr(objectives, "mntp_loss", lambda *_, softcap, **__: caps.append(softcap) or torch.zeros(()))
    for family in ("gemma2", "llama"):
        next(iter(mntp_objective(tiny_dir(family), None).micro_losses(0)))
    assert caps == [30.0, None]


def mntp_objective(directory, micro_batch_tokens, lora_dropout=0.1, attention_dropout=0.1):
    checkpoint = load_pretrained(directory)
    adapter = add_lora(checkpoint.model, LoraConfig(rank=4, dropout=lora_dropout), seed=1)
    for parameter in adapter.named_parameters().values():  # B = 0 would hide the gradient of A
        parameter.data.uniform_(-0.1, 0.1, generator=torch.Generator().manual_seed(len(parameter)))
    ids = np.random.default_rng(0).integers(2, 1000, (6, 16)).astype(np.int32)
    ids[:, 0] = 0
    return MntpObjective(
        checkpoint.model,
        checkpoint.lm_head_weight,
        adapter,
        BlockDataset(ids, ids == 0),
        MaskingConfig(mask_token_id=64, vocab_size=1000, probability=0.3),
        batch_size=5,
        seed=7,
        micro_batch_tokens=micro_batch_tokens,
        attention_dropout=attention_dropout,
    )


def loss_and_gradients(objective, step=2):
    total, sizes = 0.0, []
    for micro in objective.micro_losses(step):
        micro.loss.backward()
        total, sizes = total + micro.loss.item(), [*sizes, micro.tokens]
    return total, sizes, [p.grad for p in objective.adapter.named_parameters().values()]


def test_micro_batches_change_nothing(tiny_llama_dir):
    """Dropout is on: its bits belong to the samples, not to the micro-batches."""
    loss, sizes, gradients = loss_and_gradients(mntp_objective(tiny_llama_dir, None))
    assert sizes == [80]
    for tokens, expected_sizes in ((35, [32, 32, 16]), (1, [16] * 5)):
        other_loss, sizes, other_gradients = loss_and_gradients(mntp_objective(tiny_llama_dir, tokens))
        assert sizes == expected_sizes
        assert other_loss == pytest.approx(loss, rel=1e-5)
        for one, other in zip(gradients, other_gradients, strict=True):
            assert (one - other).norm() <= 1e-5 * one.norm()


class Apart(World):
    """One of several ranks, without the others: its sums are its own, and another has two micro-batches more."""

    def sums(self, *numbers):
        return list(numbers)

    def max(self, number):
        return number + 2


def test_ranks_share_the_blocks_of_a_step(tiny_llama_dir, monkeypatch):
    met = []
    monkeypatch.setattr(
        objectives, "mntp_loss", lambda model, head, micro, **_: met.append(micro.batch) or torch.ones(())
    )

    def rows_of(world):
        met.clear()
        list(replace(mntp_objective(tiny_llama_dir, 32), world=world).micro_losses(step=3))
        ids = torch.cat([batch.sample_ids for batch in met]).tolist()
        return list(zip(ids, torch.cat([batch.input_ids for batch in met]).view(-1, 16).tolist(), strict=True))

    whole = rows_of(World())
    assert [sample for sample, _ in whole] == list(range(15, 20))
    assert rows_of(Apart(0, 2)) + rows_of(Apart(1, 2)) == whole


@pytest.mark.parametrize("probability", [0.3, 1e-9])  # with labels, and without: then every loss is 0
def test_a_sharded_rank_goes_on_as_long_as_the_slowest(tiny_llama_dir, monkeypatch, probability):
    """What it runs beyond its own batches is worth nothing, and gives no gradient."""
    objective = mntp_objective(tiny_llama_dir, 32)
    objective = replace(objective, masking=replace(objective.masking, probability=probability))
    own = [(micro.loss.item(), micro.tokens) for micro in objective.micro_losses(2)]
    assert (own[-1][0] > 0) == (probability > 0.1)
    monkeypatch.setattr(objectives, "is_sharded", lambda model: True)
    *_, before_last, last = found = list(replace(objective, world=Apart()).micro_losses(2))
    assert [(micro.loss.item(), micro.tokens) for micro in found] == [*own, (0.0, 0), (0.0, 0)]
    (before_last.loss + last.loss).backward()
    gradients = [parameter.grad for parameter in objective.adapter.named_parameters().values()]
    assert gradients and all(gradient is not None and not gradient.any() for gradient in gradients)


def test_the_defaults_are_the_papers():
    """METHOD 4: bidirectional, attention dropout 0.3, the mean, temperature 0.05."""
    plain = SimcseObjective(torch.nn.Identity(), None, SENTENCES, batch_size=4, seed=7)
    assert (plain.causal, plain.attention_dropout, plain.pooling, plain.scale) == (False, 0.3, "mean", 20.0)


def test_each_dropout_is_in_the_loss(tiny_llama_dir):
    losses = {
        loss_and_gradients(mntp_objective(tiny_llama_dir, None, lora, attention))[0]
        for lora in (0.0, 0.1)
        for attention in (0.0, 0.1)
    }
    assert len(losses) == 4
    assert loss_and_gradients(mntp_objective(tiny_llama_dir, None), step=0)[0] not in losses


def views(sample_ids=None):
    return PackedBatch.from_sequences(SENTENCES * 2, sample_ids)


def plain_simcse(hidden, skip=0):
    """The loss in float64 from packed hidden states of both views."""
    rows = hidden.detach().double().split([len(sentence) for sentence in SENTENCES * 2])
    pooled = torch.stack([row[skip:].mean(0) for row in rows])
    first, second = F.normalize(pooled[: len(SENTENCES)]), F.normalize(pooled[len(SENTENCES) :])
    return F.cross_entropy(20.0 * first @ second.T, torch.arange(len(SENTENCES))).item()


@pytest.mark.parametrize("skip", [0, 1])
def test_simcse_equals_plain_torch(tiny_llama_dir, skip):
    spy = Spy(load_pretrained(tiny_llama_dir).model)
    loss = simcse_loss(spy, views(), skip_prefix=skip, seed=5)
    assert loss.item() == pytest.approx(plain_simcse(spy.hidden, skip), abs=1e-5)
    assert abs(loss.item() - plain_simcse(spy.hidden, 1 - skip)) > 1e-4


@pytest.mark.parametrize("causal", [False, True])
def test_simcse_gradient(tiny_llama_dir, causal):
    """Against autograd through the same statement."""
    model = load_pretrained(tiny_llama_dir).model
    adapter = add_lora(model, LoraConfig(rank=2))
    simcse_loss(model, views(), causal=causal, seed=5).backward()
    gradients = [p.grad.clone() for p in adapter.named_parameters().values()]
    model.zero_grad()
    hidden = model(views(), causal=causal, attention_dropout=0.3, seed=5)
    pooled = torch.stack([row.mean(0) for row in hidden.split([len(sentence) for sentence in SENTENCES * 2])])
    first, second = F.normalize(pooled).chunk(2)
    F.cross_entropy(20.0 * first @ second.T, torch.arange(len(SENTENCES))).backward()
    for ours, parameter in zip(gradients, adapter.named_parameters().values(), strict=True):
        assert (ours - parameter.grad).norm() <= 1e-4 * parameter.grad.norm()


def test_simcse_is_the_mean_over_the_sentences():
    embeddings = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    objective = SimcseObjective(torch.nn.Identity(), None, SENTENCES, batch_size=4, seed=7, scale=3.0)
    first, second = F.normalize(embeddings).chunk(2)
    expected = F.cross_entropy(3.0 * first @ second.T, torch.arange(4))
    torch.testing.assert_close(objective.loss_of(embeddings), expected)


def simcse_objective(directory, *, attention_dropout=0.3, lora_dropout=0.05, batch_size=4):
    model = load_pretrained(directory).model
    adapter = add_lora(model, LoraConfig(rank=4, dropout=lora_dropout), seed=1)
    for parameter in adapter.named_parameters().values():
        parameter.data.uniform_(-0.1, 0.1, generator=torch.Generator().manual_seed(len(parameter)))
    return SimcseObjective(Spy(model), adapter, SENTENCES, batch_size, seed=7, attention_dropout=attention_dropout)


@pytest.mark.parametrize(("attention", "lora"), [(0.3, 0.0), (0.0, 0.05), (0.0, 0.0)])
def test_views_differ_by_dropout_alone(tiny_llama_dir, attention, lora):
    objective = simcse_objective(tiny_llama_dir, attention_dropout=attention, lora_dropout=lora)
    (micro,) = objective.micro_losses(0)
    first, second = objective.model.hidden.chunk(2)
    assert micro.tokens == 2 * sum(map(len, SENTENCES)) == 2 * len(first)
    if attention or lora:
        # no token of the second view is what it was in the first (the BOS alone would still see other keys)
        assert ((first - second).abs().amax(1) > 1e-4).all()
    else:
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5)


def test_steps_draw_other_noise_and_repeat_exactly(tiny_llama_dir):
    def losses(steps):
        objective = simcse_objective(tiny_llama_dir)
        return [float(micro.value) for step in steps for micro in objective.micro_losses(step)]

    first, second, third = losses([0, 1, 2])
    assert len({first, second, third}) == 3  # the same four sentences every time, other order and other noise
    assert losses([2, 0]) == [third, first]


def test_no_sample_id_comes_twice(tiny_llama_dir):
    """A sentence or block met again in another epoch, and the second view, have noise of their own."""
    contrastive, masked = simcse_objective(tiny_llama_dir), mntp_objective(tiny_llama_dir, 32)
    masked = replace(masked, model=Spy(masked.model))
    for objective, per_step in ((contrastive, 2 * len(SENTENCES)), (masked, 5)):
        met = [i for step in range(3) for _ in objective.micro_losses(step) for i in objective.model.batch.sample_ids]
        assert len(set(map(int, met))) == len(met) == 3 * per_step


def test_no_noise_outside_the_steps(tiny_llama_dir):
    """An evaluation between two steps, or after an error in one, runs without dropout."""
    for objective in (simcse_objective(tiny_llama_dir), mntp_objective(tiny_llama_dir, 16)):
        for _ in objective.micro_losses(0):
            assert objective.adapter.noise.seed is not None
        assert objective.adapter.noise.seed is None
        losses = objective.micro_losses(0)
        next(losses)
        losses.close()
        assert objective.adapter.noise.seed is None


def ways_with_less_memory(objective):
    """The settings on the way, in words."""
    found = []
    while objective is not None:
        found.append(objective.memory_setting())
        objective = objective.with_less_memory()
    return found


def test_mntp_with_less_memory(tiny_llama_dir):
    """Five blocks of 16 tokens: two at a time, then one, then more recomputation."""
    assert ways_with_less_memory(mntp_objective(tiny_llama_dir, None)) == [
        "micro-batches of 80 tokens, recomputation 'none'",
        "micro-batches of 32 tokens, recomputation 'none'",
        "micro-batches of 16 tokens, recomputation 'none'",
        "micro-batches of 16 tokens, recomputation 'selective'",
        "micro-batches of 16 tokens, recomputation 'layer'",
    ]


def test_simcse_with_less_memory(tiny_llama_dir):
    """More recomputation, then half the tokens, never fewer than the longest of the sentences has."""
    tokens, longest = 2 * sum(map(len, SENTENCES)), max(map(len, SENTENCES))
    expected = [f"recomputation {level!r}" for level in ("none", "selective", "layer")]
    while (tokens := tokens // 2) >= longest:
        expected.append(f"micro-batches of {tokens} tokens, recomputation 'layer'")
    assert ways_with_less_memory(simcse_objective(tiny_llama_dir)) == expected and len(expected) == 5
