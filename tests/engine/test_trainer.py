"""The training loop: resuming repeats an uninterrupted run bit for bit, clipping, intervals, and the stop at a NaN."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from bivec.engine.checkpoint import list_checkpoints
from bivec.engine.data import BlockDataset
from bivec.engine.errors import RunError
from bivec.engine.lora import LoraConfig, add_lora
from bivec.engine.masking import MaskingConfig
from bivec.engine.objectives import MicroLoss, MntpObjective, SimcseObjective
from bivec.engine.optim import OptimConfig, learning_rate_at
from bivec.engine.trainer import Intervals, train
from bivec.models import load_pretrained

STEPS = 6
OPTIM = OptimConfig(learning_rate=1e-2, steps=STEPS, horizon=9, warmup_steps=1, max_grad_norm=0.5)


def mntp(checkpoint, adapter):
    """12 blocks in batches of 4: the run crosses an epoch; micro-batches of 3 and 1 blocks."""
    ids = np.random.default_rng(0).integers(2, 1000, (12, 16)).astype(np.int32)
    return MntpObjective(
        checkpoint.model,
        checkpoint.lm_head_weight,
        adapter,
        BlockDataset(ids, ids < 100),
        MaskingConfig(mask_token_id=64, vocab_size=1000, probability=0.3),
        batch_size=4,
        seed=7,
        micro_batch_tokens=48,
        attention_dropout=0.1,
    )


def simcse(checkpoint, adapter):
    random = np.random.default_rng(1)
    sentences = [[0, *random.integers(2, 1000, 4 + i % 5).tolist()] for i in range(10)]
    return SimcseObjective(checkpoint.model, adapter, sentences, batch_size=4, seed=7)


def run(directory, make_objective, optim=OPTIM, raise_at=None, **options):
    """Trains from the same start; returns the metrics by step, and the trained tensors."""
    checkpoint = load_pretrained(directory)
    adapter = add_lora(checkpoint.model, LoraConfig(rank=4, dropout=0.1), seed=1)
    metrics = {}

    def log(line):
        metrics[line.step] = (line.loss, line.lr, line.grad_norm, line.tokens)
        if line.step == raise_at:
            raise KeyboardInterrupt

    try:
        objective = make_objective(checkpoint, adapter)
        train("stage", objective, adapter.named_parameters(), optim, log=log, progress=False, **options)
    except KeyboardInterrupt:
        assert max(metrics) == raise_at
    return metrics, {name: p.detach().clone() for name, p in adapter.named_parameters().items()}


@pytest.mark.parametrize("make_objective", [mntp, simcse])
def test_resume_is_bit_identical(make_objective, tiny_llama_dir, tmp_path):
    whole, final = run(tiny_llama_dir, make_objective)
    assert sorted(whole) == list(range(1, STEPS + 1)) and len(set(whole.values())) == STEPS
    assert run(tiny_llama_dir, make_objective)[0] == whole  # and so is a second run
    for stop in range(1, STEPS):
        options = {"checkpoints": tmp_path / str(stop), "intervals": Intervals(save=2)}
        before, _ = run(tiny_llama_dir, make_objective, raise_at=stop, **options)
        after, resumed = run(tiny_llama_dir, make_objective, resume=True, **options)
        saved = (stop - 1) // 2 * 2  # the interrupt comes before the save of its own step
        assert sorted(after) == list(range(saved + 1, STEPS + 1))
        assert {**before, **after} == whole
        assert all(torch.equal(resumed[name], final[name]) for name in final)


def test_a_shorter_run_with_the_same_horizon_goes_on(tiny_llama_dir, tmp_path):
    whole, final = run(tiny_llama_dir, mntp)
    first, _ = run(tiny_llama_dir, mntp, replace(OPTIM, steps=2), checkpoints=tmp_path)
    rest, resumed = run(tiny_llama_dir, mntp, checkpoints=tmp_path, resume=True)
    assert {**first, **rest} == whole and sorted(rest) == [3, 4, 5, 6]
    assert all(torch.equal(resumed[name], final[name]) for name in final)
    assert run(tiny_llama_dir, mntp, checkpoints=tmp_path, resume=True)[0] == {}  # nothing is left to do


class Toy:
    """loss = sum(v · w) in two micro-batches; optionally NaN or with a broken gradient at one step."""

    def __init__(self, parameter, *, nan_at=None, break_at=None):
        self.parameter, self.nan_at, self.break_at = parameter, nan_at, break_at

    def micro_losses(self, step):
        w = self.parameter
        yield MicroLoss((3.0 * w[0]) * (math.nan if step == self.nan_at else 1.0), 2)
        root = (w[1] * 0.0).sqrt() if step == self.break_at else 0.0  # loss 0, gradient NaN
        yield MicroLoss(4.0 * w[1] + root, 5)


def toy(tmp_path=None, **options):
    """(parameter, the list that is logged into, a function that starts the training)."""
    parameter = torch.nn.Parameter(torch.ones(2))
    objective = Toy(parameter, **{name: options.pop(name) for name in ("nan_at", "break_at") if name in options})
    optim = options.pop("optim", OptimConfig(learning_rate=0.1, steps=5))
    lines = []
    arguments = {"checkpoints": tmp_path, "log": lines.append, "progress": False, **options}
    return parameter, lines, lambda: train("toy", objective, {"w": parameter}, optim, **arguments)


@pytest.mark.parametrize(("bound", "expected"), [(1.0, 1.0), (2.5, 2.5), (100.0, 5.0), (math.inf, 5.0)])
def test_clipping(bound, expected):
    optim = OptimConfig(learning_rate=0.1, steps=1, max_grad_norm=bound)
    parameter, lines, start = toy(optim=optim)
    start()
    assert lines[0].grad_norm == pytest.approx(5.0)  # logged before clipping: |(3, 4)|
    assert parameter.grad.norm().item() == pytest.approx(expected, rel=1e-5)
    assert (parameter.grad[0] / parameter.grad[1]).item() == pytest.approx(0.75)


def test_metrics_and_intervals(tmp_path):
    evaluated = []
    optim = OptimConfig(learning_rate=0.1, steps=5, horizon=10)
    intervals = Intervals(log=2, evaluate=2, save=3)
    _, lines, start = toy(tmp_path, optim=optim, intervals=intervals, evaluate=evaluated.append)
    state = start()
    assert state.step == 5 and evaluated == [2, 4]
    assert [line.step for line in lines] == [2, 4, 5]
    assert [line.lr for line in lines] == [learning_rate_at(step, optim) for step in (1, 3, 4)]
    assert lines[0].loss == pytest.approx(3 * 0.9 + 4 * 0.9, rel=1e-5)  # AdamW's first step is the learning rate
    assert all(line.stage == "toy" and line.tokens == 7 and line.tokens_per_s > 0 for line in lines)
    assert all(line.peak_memory_bytes > 10 << 20 for line in lines)
    assert [path.name for path in list_checkpoints(tmp_path, "toy")] == ["toy-000003", "toy-000005"]


def test_no_checkpoints_and_no_log():
    parameter, lines, start = toy(log=None, intervals=Intervals(log=0, save=0))
    start()
    assert lines == [] and (parameter < 1).all()


@pytest.mark.parametrize(
    ("breakage", "message"), [("nan_at", "the loss is nan"), ("break_at", "the gradient norm nan")]
)
def test_a_nan_stops_the_run(breakage, message, tmp_path):
    parameter, lines, start = toy(tmp_path, intervals=Intervals(save=1), **{breakage: 3})
    with pytest.raises(RunError, match=rf"toy, step 4: .*{message}.*Last good checkpoint: .*toy-000003\.") as error:
        start()
    assert str(tmp_path) in str(error.value)
    assert [line.step for line in lines] == [1, 2, 3]
    assert torch.isfinite(parameter).all()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert [path.name for path in list_checkpoints(tmp_path, "toy")] == ["toy-000002", "toy-000003"]
    # resumed with the same damage it stops again and still writes nothing; without it, it ends well
    _, _, again = toy(tmp_path, resume=True, **{breakage: 3})
    with pytest.raises(RunError, match="step 4"):
        again()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    mended, lines, start = toy(tmp_path, resume=True)
    start()
    undisturbed, _, start = toy()
    start()
    assert [line.step for line in lines] == [4, 5] and torch.equal(mended, undisturbed)


def test_a_nan_in_the_first_step(tmp_path):
    parameter, lines, start = toy(tmp_path, intervals=Intervals(save=1), nan_at=0)
    with pytest.raises(RunError, match=r"toy, step 1: the loss is nan.*Last good checkpoint: none yet"):
        start()
    assert lines == [] and torch.equal(parameter, torch.ones(2)) and list(tmp_path.iterdir()) == []


def test_an_earlier_run_is_not_mixed_in(tmp_path):
    toy(tmp_path)[2]()
    with pytest.raises(RunError, match=r"holds an earlier run of this stage \(toy-000005\)"):
        toy(tmp_path)[2]()


class Cramped:
    """An objective that runs out of memory in a micro-batch of a step, while its micro-batches are large."""

    def __init__(self, objective, fits, error, count=1):
        self.objective, self.fits, self.error, self.count = objective, fits, error, count

    def micro_losses(self, step):
        for count, micro in enumerate(self.objective.micro_losses(step)):
            if count >= self.count and not self.fits(self.objective):
                raise self.error
            yield micro

    def with_less_memory(self):
        smaller = self.objective.with_less_memory()
        return None if smaller is None else Cramped(smaller, self.fits, self.error, self.count)

    def memory_setting(self):
        return self.objective.memory_setting()


GPU_ERROR = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore lines")
CPU_ERROR = RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: 12 bytes")
DRIVER_ERROR = RuntimeError("Triton Error [CUDA]: out of memory")
CUBLAS_ERROR = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")


@pytest.mark.parametrize(
    "error", [GPU_ERROR, CPU_ERROR, DRIVER_ERROR, CUBLAS_ERROR], ids=["gpu", "cpu", "driver", "cublas"]
)
def test_out_of_memory_halves_the_micro_batch_and_goes_on(error, tiny_llama_dir, capsys):
    def cramped(checkpoint, adapter):
        return Cramped(mntp(checkpoint, adapter), lambda o: o.micro_batch_tokens <= 16, error)

    whole, final = run(tiny_llama_dir, mntp)
    halved, other = run(tiny_llama_dir, cramped)
    assert sorted(halved) == sorted(whole)
    for step, (loss, lr, norm, tokens) in whole.items():
        assert halved[step][1] == lr and halved[step][3] == tokens  # the effective batch is the same
        assert halved[step][0] == pytest.approx(loss, rel=1e-4) and halved[step][2] == pytest.approx(norm, rel=1e-3)
    assert all(torch.allclose(other[name], final[name], atol=1e-3) for name in final)
    told = capsys.readouterr().out
    assert (
        told.count("going on") == 1 and "stage, step 1: out of memory (" in told
    )  # 48 to 16 tokens, and it stays there
    assert "going on with micro-batches of 16 tokens, recomputation 'none'" in told and "more lines" not in told


def test_memory_is_given_back_before_the_step_is_tried_again(tiny_llama_dir, monkeypatch):
    """What torch's allocator keeps of the attempt is in pieces of its sizes; the gradients are gone by then."""
    checkpoint = load_pretrained(tiny_llama_dir)
    adapter = add_lora(checkpoint.model, LoraConfig(rank=4))
    parameters, seen = adapter.named_parameters(), []
    objective = Cramped(mntp(checkpoint, adapter), lambda o: o.micro_batch_tokens <= 16, GPU_ERROR)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: seen.append([p.grad for p in parameters.values()]))
    train("stage", objective, parameters, OptimConfig(1e-3, steps=2), progress=False)
    assert seen == [[None] * len(parameters)]


def test_the_objective_that_goes_on_is_handed_over_once(tiny_llama_dir):
    checkpoint = load_pretrained(tiny_llama_dir)
    adapter = add_lora(checkpoint.model, LoraConfig(rank=4))
    objective = Cramped(mntp(checkpoint, adapter), lambda o: o.micro_batch_tokens <= 16, GPU_ERROR)
    cuts, parameters = [], adapter.named_parameters()
    train("stage", objective, parameters, OptimConfig(1e-3, steps=3), cut=cuts.append, progress=False)
    assert [found.objective.micro_batch_tokens for found in cuts] == [16]


def test_out_of_memory_at_one_block_recomputes_more_and_then_gives_up(tiny_llama_dir, capsys):
    def cramped(checkpoint, adapter):
        return Cramped(mntp(checkpoint, adapter), lambda o: o.recompute == "layer", GPU_ERROR)

    halved, _ = run(tiny_llama_dir, cramped)
    assert len(halved) == STEPS and "recomputation 'layer'" in capsys.readouterr().out
    with pytest.raises(torch.OutOfMemoryError):
        run(tiny_llama_dir, lambda c, a: Cramped(mntp(c, a), lambda o: False, GPU_ERROR))


def test_simcse_recomputes_where_memory_ends_and_then_cuts_its_batch(tiny_llama_dir):
    def cramped(checkpoint, adapter):
        return Cramped(simcse(checkpoint, adapter), lambda o: o.micro_batch_tokens is not None, GPU_ERROR, count=0)

    whole, _ = run(tiny_llama_dir, simcse)
    cut, _ = run(tiny_llama_dir, cramped)
    for step, (loss, _, norm, tokens) in whole.items():
        assert cut[step][0] == pytest.approx(loss, rel=1e-4) and cut[step][2] == pytest.approx(norm, rel=1e-3)
        assert cut[step][3] == tokens


def test_other_errors_are_not_taken_for_it(tiny_llama_dir):
    with pytest.raises(RuntimeError, match="shapes"):
        run(tiny_llama_dir, lambda c, a: Cramped(mntp(c, a), lambda o: False, RuntimeError("shapes do not fit")))
    _, _, start = toy()  # without a way to take less memory
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Toy, "micro_losses", lambda *_: (_ for _ in ()).throw(GPU_ERROR))
        with pytest.raises(torch.OutOfMemoryError):
            start()
