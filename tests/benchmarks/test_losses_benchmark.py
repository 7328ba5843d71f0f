"""The benchmark of the losses, on the CPU: what it says of ours, of peers that fail, and of peers that are wrong."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from bivec.kernels import info_nce, linear_cross_entropy

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
MODULES = ("timing", "cpu_meter", "loss_peers", "losses")
PEER_MODULES = (
    "liger_kernel",
    "liger_kernel.transformers",
    "liger_kernel.transformers.fused_linear_cross_entropy",
    "cut_cross_entropy",
    "memeff",
    "sentence_transformers",
    "sentence_transformers.losses",
)
CPU = torch.device("cpu")


@pytest.fixture
def scripts(monkeypatch):
    """The benchmark's modules, tiny sizes, and no peer, whatever is installed."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    for name in PEER_MODULES:
        monkeypatch.setitem(sys.modules, name, None)
    loaded = SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
    tiny = {"linear_cross_entropy": ((9, 8, 21), (12, 8, 30)), "info_nce": ((9, 8, 9), (12, 8, 12))}
    monkeypatch.setattr(loaded.losses, "SIZES", {"small": tiny, "full": tiny})
    monkeypatch.setattr(loaded.losses, "ERROR_SIZES", {"linear_cross_entropy": (24, 64, 40), "info_nce": (24, 256, 24)})
    loaded.draw = loaded.losses.draw  # seconds: the first test draws, and no other
    monkeypatch.setattr(loaded.losses, "draw", lambda *_: None)
    yield loaded
    for name in MODULES:
        sys.modules.pop(name, None)


def run(scripts, output, *arguments):
    """Exit status and the JSON."""
    chosen = ["--size", "small", "--dtype", "fp32", "--budget-ms", "1", "--repeats", "3", "--output", str(output)]
    options = scripts.losses.parse([*chosen, *arguments])
    status = scripts.losses.run(options, CPU, scripts.cpu_meter.CpuMeter())
    return status, json.loads((output / "losses_cpu.json").read_text(encoding="utf-8"))


def test_runs(scripts, tmp_path, monkeypatch, capsys):
    """All losses, dtypes, batches and scales; table, JSON and plot."""
    monkeypatch.setattr(scripts.losses, "draw", scripts.draw)
    status, content = run(scripts, tmp_path)
    assert status == 0
    rows, errors = content["rows"], content["errors"]
    assert len(rows) == 4 * 2 * 3  # losses, sizes, implementations
    assert all(row["timing"]["repeats"] == 3 and row["peak_bytes"] > 0 for row in rows)
    assert all(row["ours_is_faster_by"] == row["ours_is_smaller_by"] == 1.0 for row in rows if is_ours(row))
    assert len(errors) == (3 + 3 + 4 + 4) * 2 * 2 * 2  # scales, batches, dtypes, implementations
    assert all(row["error"] is None for row in (*rows, *errors))
    assert set(content["missing"]) == set(scripts.loss_peers.PEERS) - {"bivec", "torch", "GEMMs alone"}
    assert content["missing"]["torch.compile"] == "only on a GPU"
    assert (tmp_path / "losses_cpu.png").stat().st_size > 1000
    printed = capsys.readouterr().out
    assert "info_nce symmetric: 12 rows, D = 8, 12 columns, fp32" in printed and "without memeff:" in printed
    solved = {
        (row["implementation"], row["loss"]): row["gradient_error"]
        for row in errors
        if (row["batch"], row["scale"], row["dtype"]) == ("solved", 100.0, "fp32")
    }
    for loss in ("info_nce", "info_nce symmetric"):  # what the benchmark is there to show
        assert solved["bivec", loss] < 1e-5 and solved["torch", loss] > 1e-3
    worst = dict.fromkeys(("bivec", "torch"), 0.0)
    for row in errors:
        if row["loss"].startswith("linear") and row["dtype"] == "fp32":
            worst[row["implementation"]] = max(worst[row["implementation"]], row["gradient_error"])
    assert worst["bivec"] < 1e-4 and worst["torch"] > 1e-3


def is_ours(row):
    return row["implementation"] == "bivec"


def test_the_head_is_frozen_unless_asked(scripts):
    make = scripts.losses.make_work
    frozen = make("linear_cross_entropy", (9, 8, 21), torch.float32, CPU)
    trained = make("linear_cross_entropy", (9, 8, 21), torch.float32, CPU, train_head=True)
    assert [len(work.leaves) for work in (frozen, trained)] == [1, 2]
    assert len(make("info_nce", (9, 8, 9), torch.float32, CPU).leaves) == 2
    (gradient,) = scripts.loss_peers.reference(frozen)
    assert gradient.dtype == torch.float64 and gradient.shape == (9, 8) and frozen.x.grad is None
    assert torch.equal(frozen.x, trained.x) and frozen.targets.max() < 21


def test_only_every_fifth_row_has_a_target(scripts):
    work = scripts.losses.make_work("linear_cross_entropy of 20 %", (9, 8, 21), torch.float32, CPU)
    assert work.x.shape == (45, 8) and work.rows.shape == (9, 8)
    for gradient in (scripts.loss_peers.reference(work)[0], *steps_gradients(scripts, work)):
        scored = gradient.abs().sum(1) > 0
        assert scored[::5].all() and scored.sum() == 9


def steps_gradients(scripts, work):
    peers = scripts.loss_peers
    return [peers.gradients(step(work), work)[0] for step in (peers.bivec_step, peers.plain_step)]


def test_the_products_alone_are_those_of_the_loss(scripts, monkeypatch):
    """One for the logits and one for each gradient, in every chunk."""
    flops = []
    for loss in scripts.loss_peers.LOSSES:
        work = scripts.losses.make_work(loss, (9, 8, 9), torch.float32, CPU)
        monkeypatch.setattr(scripts.loss_peers, "GEMM_BYTES", 4 * 9 * 4)  # four rows
        with FlopCounterMode(display=False) as counter:
            scripts.loss_peers.products_step(work)()
        flops.append(counter.get_total_flops())
    assert flops == [2 * 2 * 9 * 8 * 9] * 2 + [3 * 2 * 9 * 8 * 9] * 2


def test_solved_batches_are_solved(scripts):
    for loss, size in (("info_nce", (64, 256, 64)), ("linear_cross_entropy", (64, 256, 100))):
        values = []
        for batch in ("random", "solved"):
            work = scripts.losses.make_work(loss, size, torch.float32, CPU, batch=batch, scale=50.0)
            if loss == "info_nce":
                values.append(info_nce(work.x, work.y, scale=50.0).item())
            else:
                values.append(linear_cross_entropy(work.x, work.y, work.targets).item())
        assert values[0] > 3.0 and values[1] < 1e-3


class FakeLiger:
    def __call__(self, lin_weight, _input, target):
        return F.cross_entropy(_input @ lin_weight.T, target)


def fake_cut(e, c, targets, ignore_index=-100):
    return F.cross_entropy(e @ c.T, targets)


class FakeMemeff:
    def __init__(self, temperature=0.07, normalized_inputs=False, stable=True):
        assert not stable and not normalized_inputs
        self.scale = 1.0 / temperature

    def __call__(self, image_features, text_features):
        return info_nce(image_features, text_features, scale=self.scale, symmetric=True)


class FakeSentenceTransformers:
    def __init__(self, model, scale=20.0, mini_batch_size=32, directions=("query_to_doc",), partition_mode="joint"):
        assert (partition_mode == "per_direction") == (len(directions) == 2) and mini_batch_size == 32
        model[0]  # its constructor looks for a static embedding
        self.scale, self.symmetric = scale, len(directions) == 2

    def calculate_loss(self, reps, labels=None, *, with_backward=False):
        loss = info_nce(*(torch.cat(parts) for parts in reps), scale=self.scale, symmetric=self.symmetric)
        assert with_backward
        loss.backward()
        return loss.detach()


def install(monkeypatch, **changes):
    """Other people's modules, by their signatures."""
    functions = {
        "LigerFusedLinearCrossEntropyLoss": FakeLiger,
        "linear_cross_entropy": fake_cut,
        "MemoryEfficientCLIPLoss": FakeMemeff,
        "CachedMultipleNegativesRankingLoss": FakeSentenceTransformers,
    }
    for name in PEER_MODULES:
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**(functions | changes)))


def test_adapters(scripts, tmp_path, monkeypatch):
    install(monkeypatch)
    status, content = run(scripts, tmp_path, "--train-head")
    assert status == 0 and set(content["missing"]) == {"torch.compile"}
    found = {(row["loss"], row["implementation"]) for row in content["rows"] if row["error"] is None}
    for name, peer in scripts.loss_peers.PEERS.items():
        assert {loss for loss, other in found if other == name} == (set(peer.losses) if not peer.needs_gpu else set())
    mild = [row for row in content["errors"] if (row["dtype"], row["scale"]) == ("fp32", 1.0)]
    assert len(mild) > 10 and all(row["gradient_error"] < 1e-5 for row in mild)


def test_a_peer_that_fails_is_shown(scripts, tmp_path, monkeypatch, capsys):
    """At every call, and only once the batch is large; the others are timed."""

    def large(e, c, targets):
        if len(e) == 12:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
        return fake_cut(e, c, targets)

    def never(*_):
        raise TypeError("fp32 is not for us")

    install(monkeypatch, linear_cross_entropy=large, LigerFusedLinearCrossEntropyLoss=lambda: never)
    status, content = run(scripts, tmp_path, "--losses", "linear_cross_entropy")
    assert status == 0
    reasons = {(r["implementation"], r["rows"]): r["error"] for r in content["rows"] if r["error"]}
    assert reasons == {
        ("liger", 9): "TypeError: fp32 is not for us",
        ("liger", 12): "TypeError: fp32 is not for us",
        ("cut-cross-entropy", 12): "OutOfMemoryError: CUDA out of memory.",
    }
    assert sum(row["timing"] is not None for row in content["rows"]) == 2 * 3 + 1
    assert "failed" in capsys.readouterr().out


def test_wrong_gradients_get_no_time(scripts, tmp_path, monkeypatch, capsys):
    """Of a peer, and of ours, which fails the run; NaN is wrong, too."""
    for spoil in (1.01, torch.nan):
        install(monkeypatch, linear_cross_entropy=lambda *x, spoil=spoil: spoil * fake_cut(*x))
        status, content = run(scripts, tmp_path, "--losses", "linear_cross_entropy")
        wrong = [row for row in content["rows"] if row["implementation"] == "cut-cross-entropy"]
        assert status == 0 and all(row["error"].startswith("wrong: gradient error") for row in wrong)
    monkeypatch.setattr(scripts.loss_peers, "info_nce", lambda *x, **o: 1.01 * info_nce(*x, **o))
    status, content = run(scripts, tmp_path, "--losses", "info_nce", "--peers", "bivec", "torch")
    assert status == 1 and "FAILED  info_nce: wrong" in capsys.readouterr().out
    assert all(row["timing"] is None for row in content["rows"] if is_ours(row))


def test_compiled_torch_is_plain_torch(scripts):
    """Its adapter, with a compiler that needs no GPU."""
    for loss in scripts.loss_peers.LOSSES:
        work = scripts.losses.make_work(loss, (9, 8, 9), torch.float32, CPU)
        eager = scripts.loss_peers.gradients(scripts.loss_peers.plain_step(work), work)
        with torch.compiler.set_stance("force_eager"):
            compiled = scripts.loss_peers.gradients(scripts.loss_peers.plain_step(work, compiled=True), work)
        assert all(torch.equal(a, b) for a, b in zip(eager, compiled, strict=True))


def test_the_command_of_a_run_names_no_folder_of_the_machine(scripts):
    script = str(BENCHMARKS / "losses.py")
    command = scripts.timing.described_command
    assert command([script, "--size", "small", "--output", "/x/y"]) == "python benchmarks/losses.py --size small"
    assert command([script, "--output=/x/y", "--huge"]) == "python benchmarks/losses.py --huge"
    assert command(["/elsewhere/run.py"]) == "python run.py"


def test_cpu_meter(scripts):
    """Peaks are of what is held at once, above what was there."""
    meter = scripts.cpu_meter.CpuMeter()

    def one_after_the_other():
        for _ in range(3):
            torch.empty(1000)

    def together():
        return [torch.empty(1000) for _ in range(3)]

    assert meter.peak_bytes(one_after_the_other) == 4000
    assert meter.peak_bytes(together) == 12000
    assert meter.peak_bytes(lambda: None) == 0
    assert meter.time(one_after_the_other).ms > 0.0


def test_huge(scripts, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scripts.losses, "HUGE", (600, 16))
    assert scripts.losses.main(["--huge", "--output", str(tmp_path)]) == 0
    content = json.loads((tmp_path / "losses_huge.json").read_text(encoding="utf-8"))
    assert content["rows"] == 600 and content["gradients_finite"] and content["peak_bytes"] > 2 * 600 * 16 * 4
    assert "B = N = 600, D = 16" in capsys.readouterr().out
