"""The benchmark of the training step on a tiny random model: both sides, what it says, and what it refuses."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bivec.engine.errors import BivecError

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
MODULES = (
    "timing",
    "attention_peers",
    "attention",
    "gemms",
    "workload",
    "padded_peer",
    "step_profile",
    "step_turns",
    "train_step",
)
CPU = torch.device("cpu")
OURS, PEER, KEPT = "bivec", "transformers + peft", "transformers + peft, kept"


@pytest.fixture
def scripts(monkeypatch):
    """The benchmark's modules; plots take seconds, so only the first test draws."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    loaded = SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # ops this small wait for their threads, many times longer where the machine is busy
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    loaded.draw = loaded.train_step.draw
    monkeypatch.setattr(loaded.train_step, "draw", lambda *_: None)
    yield loaded
    torch.set_num_threads(threads)
    for name in MODULES:
        sys.modules.pop(name, None)


def run(scripts, output, *arguments):
    """Exit status and the JSON."""
    status = scripts.train_step.main(["--shape", "tiny", "--quick", "--output", str(output), *arguments])
    return status, json.loads((output / "train_step_cpu.json").read_text(encoding="utf-8"))


def test_runs(scripts, tmp_path, monkeypatch, capsys):
    """Both stages, both sides; table, JSON and plot; equal losses where no dropout tells the sides apart."""
    monkeypatch.setattr(scripts.train_step, "draw", scripts.draw)
    status, content = run(scripts, tmp_path)
    assert status == 0 and list(content["stages"]) == ["mntp", "simcse"]
    assert content["model"] == "tiny" and content["dtype"] == "float32" and content["threads"] > 0
    assert content["peer"]["absent"] is None and set(content["peer"]["versions"]) == {"transformers", "peft"}
    for stage, found in content["stages"].items():
        assert list(found["sides"]) == [OURS, PEER, KEPT][: 3 if stage == "mntp" else 2]
        assert len(found["turns"]) == 2 and not found["peer_errors"]
        for name, side in found["sides"].items():
            ratios = sorted(turn["seconds"][name] / turn["seconds"][OURS] for turn in found["turns"])
            faster = None if name == OURS else pytest.approx(sum(ratios) / 2)
            assert side["ours_is_faster_by"] == faster and side["ours_is_smaller_by"] is None
            assert 0 < side["seconds_min"] <= side["seconds"] <= side["seconds_max"]
            assert side["of_gemms"] == pytest.approx(side["flops_per_s"] / found["gemm_flops_per_s"])
            assert side["of_peak"] is None and side["peak_bytes"] is None
        assert found["attention_dropout"] == (0.3 if stage == "simcse" else 0.0) and found["lora_dropout"] == 0.05
        losses = found["losses"]
        assert len(losses[OURS]) == len(losses[PEER]) == 4 and losses["largest_relative_difference"] < 1e-4
        assert len(set(losses[OURS])) == 4 and min(losses[OURS]) > 0.1  # it trains, and has something to learn
    assert content["stages"]["mntp"]["tokens"] == 2 * 32
    assert (tmp_path / "train_step_cpu.png").stat().st_size > 1000
    printed = capsys.readouterr().out
    assert "mntp: batch 2, 64 tokens a step" in printed and "ours is faster, smaller by" in printed


def test_without_dropout_the_timed_steps_agree_too(scripts, tmp_path):
    options = ("--attention-dropout", "0", "--lora-dropout", "0", "--peer-recompute", "both")
    _, content = run(scripts, tmp_path, "--stage", "simcse", *options)
    for turn in content["stages"]["simcse"]["turns"]:
        assert turn["losses"][OURS] == pytest.approx(turn["losses"][PEER], rel=1e-4)
        assert turn["losses"][PEER] == pytest.approx(turn["losses"][KEPT], rel=1e-4)
    _, content = run(scripts, tmp_path, "--stage", "simcse", "--peer-recompute", "on")
    for turn in content["stages"]["simcse"]["turns"]:
        assert turn["losses"][OURS] != pytest.approx(turn["losses"][PEER], rel=1e-4) and KEPT not in turn["losses"]


def test_a_causal_peer_is_found_out(scripts, tmp_path, monkeypatch, capsys):
    """The losses of another model differ by more than 1 %."""
    build = scripts.padded_peer.causal_lm

    def causal(checkpoint, dropout):
        model = build(checkpoint, dropout)
        model.config.is_causal = True
        return model

    monkeypatch.setattr(scripts.padded_peer, "causal_lm", causal)
    status, content = run(scripts, tmp_path)
    assert status == 1 and "FAILED  mntp: the losses" in capsys.readouterr().out
    for found in content["stages"].values():
        assert found["losses"]["largest_relative_difference"] > 0.01


def test_the_peer_computes_with_our_tensors(scripts):
    checkpoint = scripts.workload.random_checkpoint("tiny", torch.float32, CPU)
    ours = {parameter.data_ptr() for parameter in checkpoint.model.parameters()}
    ours.add(checkpoint.lm_head_weight.data_ptr())
    theirs = {parameter.data_ptr() for parameter in scripts.padded_peer.causal_lm(checkpoint, 0.0).parameters()}
    assert theirs == ours


def test_a_missing_peer_leaves_ours(scripts, tmp_path, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "peft" else find(name, *rest))
    status, content = run(scripts, tmp_path, "--stage", "mntp")
    found = content["stages"]["mntp"]
    assert status == 0 and set(found["sides"]) == {OURS}
    assert content["peer"]["absent"] == "not installed: peft" and "peft" not in content["peer"]["versions"]
    assert set(found["losses"]) == {"batch", OURS, "peer_errors"}
    assert "without transformers + peft: not installed: peft" in capsys.readouterr().out
    _, content = run(scripts, tmp_path, "--stage", "mntp", "--no-peer")
    assert content["peer"]["absent"] == "--no-peer"


def test_a_peer_out_of_memory_leaves_the_others(scripts, tmp_path, monkeypatch):
    step = scripts.padded_peer.PaddedPeer.step

    def fail(peer, number):
        if not peer.model.is_gradient_checkpointing:
            raise failure
        return step(peer, number)

    failure = torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
    monkeypatch.setattr(scripts.padded_peer.PaddedPeer, "step", fail)
    status, content = run(scripts, tmp_path, "--stage", "simcse", "--peer-recompute", "both")
    found = content["stages"]["simcse"]
    assert status == 0 and found["peer_errors"] == {KEPT: "OutOfMemoryError: CUDA out of memory."}
    assert set(found["sides"]) == {OURS, PEER} and len(found["turns"]) == 2 and PEER in found["losses"]
    status, content = run(scripts, tmp_path, "--stage", "simcse", "--peer-recompute", "off")
    found = content["stages"]["simcse"]
    assert status == 0 and set(found["sides"]) == {OURS} and set(found["losses"]) == {"batch", OURS, "peer_errors"}
    failure = MemoryError()
    _, content = run(scripts, tmp_path, "--stage", "simcse", "--peer-recompute", "off")
    assert content["stages"]["simcse"]["peer_errors"] == {KEPT: "MemoryError: "}
    failure = RuntimeError("shapes do not fit")  # a bug of the benchmark
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        run(scripts, tmp_path, "--stage", "simcse", "--peer-recompute", "off")


@pytest.mark.slow
def test_memory(scripts, tmp_path):
    """Each side and stage in a process of its own."""
    status, content = run(scripts, tmp_path, "--stage", "mntp", "--memory", "--mntp-batch", "8")
    assert status == 0
    sides = content["stages"]["mntp"]["sides"]
    assert list(sides) == [OURS, PEER, KEPT]
    for side in sides.values():
        assert side["peak_bytes"] > 2**20
        ratio = side["peak_bytes"] / sides[OURS]["peak_bytes"]
        assert side["ours_is_smaller_by"] == (None if side is sides[OURS] else pytest.approx(ratio))


def test_the_breakdown_tells_the_products_of_lora_from_the_others(scripts):
    """All headings of a step, and the time of a known op under its own."""
    options = scripts.train_step.parse(["--shape", "tiny", "--quick"])
    checkpoint = scripts.workload.random_checkpoint("tiny", torch.float32, CPU)
    work = scripts.step_turns.prepare("mntp", checkpoint, CPU, options)
    found = scripts.step_profile.breakdown(
        lambda: scripts.step_turns.run_turns(
            work, batch_size=2, steps=1, attention_dropout=0.0, lora_dropout=0.05, peers={}
        ),
        CPU,
        rank=16,
    )
    assert set(found) == {*scripts.step_profile.HEADINGS, scripts.step_profile.UNNAMED}
    assert all(seconds > 0.0 for name, seconds in found.items() if name != scripts.step_profile.UNNAMED)
    x = torch.randn(512, 256)
    for width, expected in ((16, "LoRA"), (32, "LoRA"), (48, "LoRA"), (1024, "GEMMs")):  # 48: q, k and v together
        weight = torch.randn(256, width)
        found = scripts.step_profile.breakdown(lambda weight=weight: x @ weight, CPU, rank=16)
        assert found[expected] > 0.0 and sum(found[name] for name in ("LoRA", "GEMMs")) == found[expected]


def test_labels_and_padding_of_the_peer(scripts):
    """Every label is the token that ours scores; sentences end where the row ends."""
    options = scripts.train_step.parse(["--shape", "tiny", "--quick"])
    checkpoint = scripts.workload.random_checkpoint("tiny", torch.float32, CPU)
    mntp, simcse = (scripts.step_turns.prepare(stage, checkpoint, CPU, options) for stage in ("mntp", "simcse"))
    objective = mntp.objective(None, 2, 0.0)
    input_ids, labels = scripts.padded_peer.mntp_rows(objective, step=0)
    rows = scripts.padded_peer.indices_for_step(len(objective.blocks), 2, options.seed, 0)
    original = torch.from_numpy(objective.blocks.input_ids[rows]).long()
    labelled = labels != -100
    assert 0 < labelled.sum() < 32 and torch.equal(labels[labelled], original[labelled])
    labelled[:, 0] = True  # a token that is hidden there has no label
    assert torch.equal(input_ids[~labelled], original[~labelled])
    objective = simcse.objective(None, 4, 0.0)
    input_ids, mask = scripts.padded_peer.simcse_rows(objective, step=0)
    rows = scripts.padded_peer.indices_for_step(len(objective.sentences), 4, options.seed, 0)
    assert mask.shape[1] == max(len(objective.sentences[row]) for row in rows)
    for ids, flags, row in zip(input_ids, mask.bool(), rows, strict=True):
        assert ids[flags].tolist() == objective.sentences[row] and flags[-1]


def test_random_sentences_have_real_lengths(scripts):
    checkpoint = scripts.workload.random_checkpoint("tiny", torch.float32, CPU)
    sentences = scripts.workload.simcse_data(checkpoint, 128, 200, is_random=True)
    assert len(sentences) == 200 and 20 < sentences.lengths.mean() < 40 and sentences.lengths.max() <= 128


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "tiny", "--model", "x"], "not allowed with"),
        (["--steps", "0"], "--steps is 0, expected at least 1"),
        (["--simcse-batch", "1"], "--simcse-batch is 1"),
        (["--attention-dropout", "1"], "--attention-dropout is 1.0, expected a probability below 1"),
        (["--lora-dropout", "-0.1"], "--lora-dropout"),
        (["--learning-rate", "0"], "--learning-rate is 0.0"),
        (["--seed", "-1"], "--seed is -1"),
        (["--device", "nowhere"], "--device nowhere: not usable here"),
        (["--stage", "supervised"], "invalid choice"),
    ],
)
def test_bad_options(scripts, arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        scripts.train_step.main(arguments)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_bad_models(scripts, tmp_path, capsys):
    assert scripts.train_step.main(["--model", str(tmp_path / "none"), "--output", str(tmp_path)]) == 2
    assert "error:" in capsys.readouterr().err
    checkpoint = scripts.workload.random_checkpoint("tiny", torch.float32, CPU)
    headless = scripts.workload.Checkpoint(checkpoint.model, None, checkpoint.tokenizer_path, checkpoint.config)
    with pytest.raises(BivecError, match="has no LM head"):
        scripts.step_turns.prepare("mntp", headless, CPU, scripts.train_step.parse(["--quick"]))


def test_the_products_have_the_rows_of_a_micro_batch(scripts):
    options = scripts.train_step.parse(["--shape", "tiny", "--quick", "--micro-batch-tokens", "70"])
    checkpoint = scripts.workload.random_checkpoint("tiny", torch.float32, CPU)
    mntp, simcse = (scripts.step_turns.prepare(stage, checkpoint, CPU, options) for stage in ("mntp", "simcse"))
    rows = scripts.train_step.tokens_of_a_forward
    assert [rows(mntp, batch_size) for batch_size in (1, 2, 3)] == [32, 64, 64]
    assert rows(simcse, 4) == 2 * round(4 * simcse.objective(None, 4, 0.0).sentences.lengths.mean())
    gemms = scripts.gemms.Gemms(checkpoint, 32, 6)
    assert {size for size in gemms.inputs if size[0] == 6} == {(6, 64), (6, 512)}


def test_the_rate_of_the_products_weighs_layers_and_head_as_a_step_does(scripts, monkeypatch):
    """Both layers at 1 GFLOP/s, the head at 4: the head's rows are more than are measured."""
    checkpoint = scripts.workload.random_checkpoint("tiny", torch.float32, CPU)
    monkeypatch.setattr(scripts.gemms, "HEAD_ROWS", 3)
    gemms = scripts.gemms.Gemms(checkpoint, 32, 6)
    assert gemms.flops_per_s(0) > 0.0

    def run(work):
        flops = sum(4.0 * rows * weight.numel() for rows, weight in work)
        return flops / (4e9 if work[0][0] == 3 else 1e9), flops

    monkeypatch.setattr(gemms, "_run", run)
    for layers in (1, 2):
        monkeypatch.setattr(scripts.gemms, "LAYERS", layers)
        of_layers = 4 * 32 * sum(p.numel() for p in checkpoint.model.layers.parameters() if p.dim() == 2)
        of_head = 4 * 6 * checkpoint.lm_head_weight.numel()
        assert gemms.flops_per_s(0) == pytest.approx((of_layers + of_head) / (of_layers / 1e9 + of_head / 4e9))
