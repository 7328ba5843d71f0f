"""benchmarks/roofline.py: its sums against counts by hand, and what it prints beside them."""

import json
import runpy
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
D, INNER, KV, LAYERS, T, R = 4096, 14336, 1024, 32, 16384, 16  # Mistral-7B, 32 x 512


@pytest.fixture
def roofline(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in ("roofline", "workload", "attention", "attention_peers", "timing"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import roofline

    yield roofline
    for name in ("roofline", "workload", "attention", "attention_peers", "timing"):
        sys.modules.pop(name, None)


def figures(roofline, tmp_path, *arguments):
    file = tmp_path / "out.json"
    assert roofline.main([*arguments, "--output", str(file)]) == 0
    content = json.loads(file.read_text())
    return content, {op["name"]: op for op in content["ops"]}


def test_the_step_of_mistral(roofline, tmp_path, capsys):
    content, ops = figures(roofline, tmp_path)
    weights = D * (D + 2 * KV) + D * D + 3 * D * INNER
    gemms = sum(op["flops"] for name, op in ops.items() if name.endswith(" GEMM"))
    assert gemms == 4 * T * LAYERS * weights  # forward, and the gradient of the input
    lora = sum(op["flops"] for name, op in ops.items() if name.endswith(" LoRA"))
    ins_and_outs = 3 * D + (D + 2 * KV) + 2 * D + 2 * D + 2 * INNER + INNER + D
    assert lora == 6 * T * LAYERS * R * ins_and_outs
    assert ops["attention"]["flops"] == 3.5 * 4 * T * 512 * D * LAYERS
    assert ops["loss GEMMs"]["flops"] == pytest.approx(4 * 0.8 * T * D * 32000)
    assert ops["rotary"]["bytes"] == 2 * 2 * 2 * T * (D + KV) * LAYERS  # q and k, read and written, each way
    assert ops["SwiGLU"]["bytes"] == 2 * (3 + 5) * T * INNER * LAYERS
    gpu = content["gpu"]
    for name, op in ops.items():
        compute, memory = op["flops"] / gpu["flops_per_s"], op["bytes"] / gpu["bytes_per_s"]
        assert op["seconds"] == max(compute, memory) and (op["bound"] == "compute") == (compute > memory), name
    told = capsys.readouterr().out
    rate = T / sum(op["seconds"] for op in ops.values())
    assert f"at most {rate:,.0f} tokens/s" in told and 18_000 < rate < 28_000
    assert "measured: nothing yet on this card" in told


def test_recomputation_costs_a_forward(roofline, tmp_path):
    _, none = figures(roofline, tmp_path)
    _, selective = figures(roofline, tmp_path, "--recompute", "selective")
    _, layer = figures(roofline, tmp_path, "--recompute", "layer")
    for name in none:
        cheap = name in ("norms", "SwiGLU")
        assert (selective[name]["bytes"] > none[name]["bytes"]) == cheap == selective[name]["recomputed"]
    assert layer["down GEMM"]["flops"] == 1.5 * none["down GEMM"]["flops"]
    assert layer["loss GEMMs"] == none["loss GEMMs"]


def test_simcse_and_smaller_micro_batches(roofline, tmp_path):
    content, ops = figures(roofline, tmp_path, "--stage", "simcse", "--shape", "llama-1.3b", "--gpu", "A100")
    assert content["step"]["tokens"] == 2 * 128 * content["step"]["length"] and "pooling, InfoNCE" in ops
    _, whole = figures(roofline, tmp_path, "--micro-batch-tokens", "16384")
    _, parts = figures(roofline, tmp_path, "--micro-batch-tokens", "4096")
    more = parts["down GEMM"]["bytes"] - whole["down GEMM"]["bytes"]
    assert more == 3 * 2 * 2 * D * INNER * LAYERS  # the weights are read three times more, each way


def test_measured_steps_are_printed_beside(roofline, tmp_path, monkeypatch, capsys):
    run = tmp_path / "h100"
    run.mkdir()
    sides = {"sides": {"bivec": {"tokens_per_s": 20123.4}}}
    content = {"device": "NVIDIA H100 80GB HBM3", "model": "mistral-7b", "stages": {"mntp": sides}}
    (run / "train_step_x.json").write_text(json.dumps(content))
    monkeypatch.setattr(roofline, "RESULTS", tmp_path)
    assert roofline.main([]) == 0
    assert "measured: 20,123 tokens/s (h100/train_step_x.json)" in capsys.readouterr().out
    (run / "results.json").write_text(json.dumps({"parts": {"tests": {}, "train_step": {"result": content}}}))
    assert roofline.main([]) == 0
    assert "20,123 tokens/s (h100/results.json)" in capsys.readouterr().out
    assert roofline.main(["--gpu", "A100"]) == 0
    assert "measured: nothing yet" in capsys.readouterr().out


@pytest.mark.parametrize(("flag", "value"), [("--rank", "0"), ("--scored", "-1"), ("--batch", "0")])
def test_bad_values_are_refused(roofline, flag, value, capsys):
    with pytest.raises(SystemExit):
        roofline.main([flag, value])
    assert f"{flag} must be positive" in capsys.readouterr().err


def test_it_runs_as_a_script(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["roofline.py", "--shape", "tiny"])
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(BENCHMARKS / "roofline.py"), run_name="__main__")
    assert stop.value.code == 0 and "tokens/s" in capsys.readouterr().out
