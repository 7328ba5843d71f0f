"""What the planner predicts against what the allocator hands out, and the cuts that it chooses."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from bivec.engine import planner
from bivec.engine.data import BlockDataset
from bivec.engine.distributed import ALONE, process_group
from bivec.engine.errors import RunError
from bivec.engine.lora import LoraConfig, LoraLinear, add_lora
from bivec.engine.masking import MaskingConfig
from bivec.engine.objectives import MntpObjective, SimcseObjective
from bivec.engine.planner import (
    SLACK,
    MicroBatch,
    Setting,
    batch_tokens,
    free_memory,
    kept_per_token,
    lora_parameters,
    parse_memory,
    plan_contrastive,
    plan_mntp,
    predict,
)
from bivec.engine.sharding import attach_head, shard
from bivec.kernels import dropout as kernels_dropout
from bivec.models import DecoderConfig, PackedBatch, load_pretrained
from bivec.models.families import MODEL_CLASSES
from bivec.models.recompute import LEVELS, Recipes

SMALL = DecoderConfig(
    model_type="llama",
    vocab_size=2000,
    hidden_size=256,
    intermediate_size=704,
    num_layers=4,
    num_heads=8,
    num_kv_heads=4,
    head_dim=32,
    rms_norm_eps=1e-5,
    max_position_embeddings=512,
)
LARGE = replace(SMALL, vocab_size=32000, hidden_size=384, num_heads=6, num_kv_heads=2, head_dim=64, num_layers=3)
QWEN3 = replace(SMALL, model_type="qwen3")
GEMMA2 = replace(SMALL, model_type="gemma2", query_pre_attn_scalar=32, attn_logit_softcapping=50.0)
GEMMA3 = replace(SMALL, model_type="gemma3_text", query_pre_attn_scalar=32)
MISTRAL = DecoderConfig(
    model_type="mistral",
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    rms_norm_eps=1e-5,
    max_position_embeddings=32768,
)
ON_A_GPU = Setting(MISTRAL, LoraConfig(), itemsize=2, lm_head=True, device="cuda", triton=True)


def trained_model(config, lora):
    torch.manual_seed(0)
    model = MODEL_CLASSES[config.model_type](config)
    adapter = add_lora(model, lora)
    for parameter in adapter.named_parameters().values():
        parameter.grad = torch.zeros_like(parameter)  # of the resident memory
    return model, adapter


def mntp(config, lora, recompute, batch=4, length=96, probability=0.3):
    model, adapter = trained_model(config, lora)
    ids = np.random.default_rng(0).integers(5, config.vocab_size, (batch, length)).astype(np.int32)
    head = torch.randn(config.vocab_size, config.hidden_size) / 10
    blocks, masking = BlockDataset(ids, np.zeros_like(ids, bool)), MaskingConfig(3, config.vocab_size, probability)
    objective = MntpObjective(model, head, adapter, blocks, masking, batch, seed=1, recompute=recompute)
    return objective, MicroBatch(batch * length, scored=round(batch * length * probability), recompute=recompute)


def simcse(config, lora, recompute, batch=12, length=24):
    model, adapter = trained_model(config, lora)
    random = np.random.default_rng(0)
    lengths = [length - 8 + index % 17 for index in range(batch)]
    sentences = [random.integers(5, config.vocab_size, length).tolist() for length in lengths]
    objective = SimcseObjective(model, adapter, sentences, batch, seed=1, recompute=recompute)
    return objective, MicroBatch(2 * sum(lengths), sequences=2 * batch, recompute=recompute)


def cut_simcse(config, lora, recompute):
    """The same batch in three micro-batches."""
    objective, micro = simcse(config, lora, recompute)
    tokens = micro.tokens // 3 + 8
    cut = replace(micro, tokens=tokens, sequences=micro.sequences // 3, cached=micro.sequences)
    return replace(objective, micro_batch_tokens=tokens), cut


def measured_peak(objective):
    """The most memory above what was taken before, by the profiler's record of allocations and releases."""

    def step():
        for micro in objective.micro_losses(0):
            micro.loss.backward()

    step()  # the rotary tables stay
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


@pytest.mark.parametrize(
    ("make", "config", "dropout", "recompute"),
    [
        (mntp, SMALL, 0.0, "none"),
        (mntp, SMALL, 0.05, "selective"),
        (mntp, SMALL, 0.05, "layer"),
        (mntp, LARGE, 0.0, "none"),  # its peak is in the loss
        (simcse, SMALL, 0.0, "none"),
        (simcse, LARGE, 0.05, "selective"),
        (cut_simcse, LARGE, 0.05, "none"),
        (mntp, QWEN3, 0.0, "none"),
        (simcse, QWEN3, 0.05, "selective"),
        (mntp, GEMMA2, 0.0, "none"),
        (mntp, GEMMA2, 0.05, "selective"),
        (simcse, GEMMA2, 0.05, "layer"),
        (mntp, GEMMA3, 0.0, "none"),
        (simcse, GEMMA3, 0.05, "layer"),
    ],
)
@pytest.mark.parametrize("rows_of_dropout", [16, 1 << 10])
def test_the_peak_is_predicted_within_a_tenth(make, config, dropout, recompute, rows_of_dropout, monkeypatch):
    """Dropout in blocks of few rows, as in large batches, and in one block."""
    monkeypatch.setattr(kernels_dropout, "CPU_BLOCK", rows_of_dropout * config.intermediate_size)
    lora = LoraConfig(rank=8, dropout=dropout)
    objective, micro = make(config, lora, recompute)
    predicted = predict(Setting(config, lora, 4, lm_head=make is mntp), micro)
    assert predicted.kept + predicted.temporaries == pytest.approx(measured_peak(objective), rel=0.1)


@pytest.mark.parametrize(
    ("make", "config", "recompute"),
    [(mntp, SMALL, "none"), (mntp, SMALL, "layer"), (mntp, LARGE, "none"), (cut_simcse, LARGE, "selective")],
)
def test_the_peak_of_full_weight_training_is_predicted_within_a_tenth(make, config, recompute):
    """Beyond what stays, sixteen bytes a weight: whole weights and their gradients, as they are fetched and made."""
    with process_group(ALONE, "cpu", of_one=True):
        objective, micro = make(config, LoraConfig(), recompute)
        model, head = objective.model, make is mntp
        for name in [name for name, module in model.named_modules() if isinstance(module, LoraLinear)]:
            model.set_submodule(name, model.get_submodule(name).base)
        model.requires_grad_(True)
        objective = replace(objective, adapter=None)
        if head:
            objective = replace(objective, lm_head_weight=attach_head(model, objective.lm_head_weight, trained=False))
        shard(model, ALONE, "cpu")
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        measured = measured_peak(objective)
    predicted = predict(Setting(config, LoraConfig(), 4, lm_head=head, full=True, shards=1), micro)
    weights = config.num_parameters()
    stays = 16 * weights + 4 * (config.num_parameters(lm_head=head) - weights)
    assert predicted.total - stays == pytest.approx(measured, rel=0.1)


def test_resident_memory():
    lora = LoraConfig(rank=4)
    model, adapter = trained_model(SMALL, lora)
    parameters = adapter.named_parameters()
    optimizer = torch.optim.AdamW(parameters.values())
    optimizer.step()
    states = [x for state in optimizer.state.values() for x in state.values() if x.dim()]
    held = [*model.parameters(), *(p.grad for p in parameters.values()), *states]
    predicted = predict(Setting(SMALL, lora, 4, lm_head=False), MicroBatch(1)).resident
    assert predicted == sum(x.numel() * x.element_size() for x in held)
    assert lora_parameters(SMALL, lora) == sum(p.numel() for p in parameters.values())


def saved_bytes(model, batch, recompute):
    """Bytes of the storages that the graph holds, parameters and what is of the batch aside, each once."""
    saved = {}
    pack_recipes = Recipes._pack

    def note(tensor):
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = (storage.nbytes(), tensor)  # kept alive: an address must not be used again
        return tensor

    def note_what_recipes_leave(self, tensor):
        packed = pack_recipes(self, tensor)
        if hasattr(packed, "tensor") and isinstance(packed.tensor, torch.Tensor):
            note(packed.tensor)
        return packed

    with pytest.MonkeyPatch.context() as patch, torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        patch.setattr(Recipes, "_pack", note_what_recipes_leave)  # its hooks are the ones that count
        model(batch, recompute=recompute)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    own |= {x.untyped_storage().data_ptr() for x in vars(batch).values() if isinstance(x, torch.Tensor)}
    return sum(size for pointer, (size, _) in saved.items() if pointer not in own)


@pytest.mark.parametrize("recompute", ["none", "selective"])
@pytest.mark.parametrize(
    ("family", "backend", "dtype"),
    [
        ("llama", "torch", torch.float32),
        ("mistral", "torch", torch.float32),
        ("llama", "torch", torch.bfloat16),
        ("llama", "triton", torch.bfloat16),
        ("mistral", "triton", torch.float32),
        *itertools.product(["qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"], ["torch"], [torch.float32]),
        ("qwen3", "triton", torch.bfloat16),
        ("gemma2", "triton", torch.float32),
        ("gemma3_text", "torch", torch.bfloat16),
        ("smollm3", "torch", torch.float32),
    ],
)
def test_a_layer_keeps_what_the_table_says(family, backend, dtype, recompute, tiny_dir, monkeypatch):
    """Bytes a token and layer: from models of 2 and 1 layers, so that what is outside of the layers drops out."""
    if backend == "triton":
        pytest.importorskip("triton")
    monkeypatch.setenv("BIVEC_BACKEND", backend)
    lora = LoraConfig(rank=4)
    counted = []
    for layers in (2, 1):
        model = load_pretrained(tiny_dir(family), dtype=dtype).model
        del model.layers[layers:]
        if model.config.sliding_window is not None:  # a window that hides something adds torch's own copy of the mask
            model.config = replace(model.config, sliding_window=4096)
        add_lora(model, lora)
        ids = [list(range(64)), list(range(3, 51))]
        batch = PackedBatch.from_sequences(ids)
        counted.append(saved_bytes(model, batch, recompute) / batch.num_tokens)
    setting = Setting(model.config, lora, dtype.itemsize, lm_head=False, triton=backend == "triton")
    per_sequence = 64  # cu_seqlens and the like
    # what the table counts and these do not have: the fused kernel's lse and second output, under a softcap; the rotary
    # rows of the second layer
    heads, head_dim = model.config.num_heads, model.config.head_dim
    less = {"gemma2": 4 * heads * (head_dim + 1), "smollm3": 4 * head_dim}.get(family, 0) if backend == "torch" else 0
    assert counted[0] - counted[1] == pytest.approx(
        kept_per_token(setting, recompute, mixed_lengths=True) - less, abs=per_sequence / 16
    )


def test_the_triton_backend_keeps_half_types_as_they_are():
    """q, k, v and the output in bf16, no rotary rows: only the lse, rstd and LoRA's products are fp32."""
    d, inner, kv, r = 4096, 14336, 1024, 16
    half = 4 * d + 3 * inner + 2 * d + 2 * kv
    assert kept_per_token(ON_A_GPU) == 2 * half + 4 * (32 + 2 + 7 * r)
    assert kept_per_token(ON_A_GPU, "selective") == kept_per_token(ON_A_GPU) - 2 * (2 * d + inner)
    assert kept_per_token(ON_A_GPU, "layer") == 2 * d


GIB = 1 << 30


@pytest.mark.parametrize(
    ("gib", "tokens", "recompute"),
    [(160, 16384, "none"), (80, 8192, "none"), (24, 1536, "none"), (20, 1024, "selective"), (18, 5632, "layer")],
)
def test_less_memory_means_smaller_parts_and_more_recomputation(gib, tokens, recompute):
    plan = plan_mntp(ON_A_GPU, 32, 512, 0.2, gib * GIB)
    assert (plan.micro_batch_tokens, plan.recompute) == (tokens, recompute)
    assert plan.accumulation * plan.micro_batch_tokens >= 32 * 512 > (plan.accumulation - 1) * plan.micro_batch_tokens
    assert plan.predicted.total <= gib * GIB * (1 - SLACK)
    assert f"micro-batches of {tokens:,} tokens, recomputation {recompute!r}" in str(plan).replace(
        "batch of", "batches of"
    )


def test_a_plan_is_the_largest_that_fits():
    """Just below what a plan needs, the next one is smaller."""
    plan = plan_mntp(ON_A_GPU, 8, 512, 0.2, 400 * GIB)
    sizes = []
    while plan.micro_batch_tokens > 512 or plan.recompute != "layer":
        sizes.append((LEVELS.index(plan.recompute), -plan.micro_batch_tokens))
        plan = plan_mntp(ON_A_GPU, 8, 512, 0.2, int(plan.predicted.total / (1 - SLACK)) - 2)
    assert len(sizes) > 3 and len(set(sizes)) == len(sizes)
    with pytest.raises(RunError, match=r"--memory: mntp needs .* GiB at least .*shorten mntp.sequence_length"):
        plan_mntp(ON_A_GPU, 8, 512, 0.2, 10 * GIB)


def test_a_contrastive_step_is_cut_last():
    """Recomputation first: it costs no more than gradient caching, and the products stay large."""
    setting = replace(ON_A_GPU, lm_head=False)
    for gib, recompute in ((80, "none"), (40, "selective"), (20, "layer")):
        plan = plan_contrastive(setting, "simcse", 7680, 256, 128, gib * GIB)
        assert (plan.accumulation, plan.micro_batch_tokens, plan.recompute) == (1, 7680, recompute)
    sizes = []
    for gib in (17, 15.8, 15.5, 15.2):
        plan = plan_contrastive(setting, "simcse", 7680, 256, 128, int(gib * GIB))
        assert plan.accumulation == -(-7680 // plan.micro_batch_tokens) > 1
        cached = MicroBatch(plan.micro_batch_tokens, 0, -(-256 // plan.accumulation), plan.recompute, cached=256)
        assert plan.predicted == predict(setting, cached) and plan.predicted.total <= gib * GIB * (1 - SLACK)
        sizes.append((LEVELS.index(plan.recompute), -plan.micro_batch_tokens))
    assert sizes == sorted(set(sizes))
    with pytest.raises(RunError, match=r"--memory: simcse needs .*, there are 12; .*lower simcse.max_length"):
        plan_contrastive(setting, "simcse", 7680, 256, 128, 12 * GIB)


def test_tokens_of_a_batch():
    lengths = np.random.default_rng(0).integers(5, 60, 20_000)
    drawn = [lengths[i : i + 100].sum() for i in range(0, 20_000, 100)]
    assert max(drawn) <= batch_tokens(lengths, 100) < 1.25 * np.mean(drawn)


@pytest.mark.parametrize(
    ("text", "size"),
    [("auto", None), ("24GiB", 24 * GIB), ("1.5 gib", 3 * GIB // 2), ("500MB", 500_000_000), ("4096", 4096)],
)
def test_sizes(text, size):
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["", "much", "24 parsecs", "-1GiB", "0", "1,5GiB"])
def test_what_is_no_size(text):
    with pytest.raises(RunError, match="expected auto, or a size such as 24GiB"):
        parse_memory(text)


def test_free_memory_of_this_machine_and_of_a_container(monkeypatch, tmp_path):
    here = free_memory(torch.device("cpu"))
    assert 64 << 20 < here < 1 << 45
    monkeypatch.setattr(planner, "CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("100000000\n")
    (tmp_path / "memory.current").write_text("70000000\n")
    (tmp_path / "memory.stat").write_text("anon 40000000\nactive_file 10000000\ninactive_file 20000000\n")
    assert free_memory(torch.device("cpu")) == 60_000_000
    (tmp_path / "own").write_text("0::/job/step\n")
    monkeypatch.setattr(planner, "OWN_CGROUP", tmp_path / "own")
    (tmp_path / "job" / "step").mkdir(parents=True)
    for place, limit in (("job", "50000000\n"), ("job/step", "max\n")):
        (tmp_path / place / "memory.max").write_text(limit)
        (tmp_path / place / "memory.current").write_text("10000000\n")  # without a memory.stat
    assert free_memory(torch.device("cpu")) == 40_000_000
    (tmp_path / "job" / "memory.max").write_text("max\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory(torch.device("cpu")) > 100_000_000
