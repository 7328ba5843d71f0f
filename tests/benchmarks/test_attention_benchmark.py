"""The attention benchmark and the GPU suite, on the CPU: no line of them should run first on a lent GPU."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.attention.varlen

from bivec.kernels import flash_attention

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TINY = [5, 1, 9, 16, 3]


@pytest.fixture
def scripts(monkeypatch):
    """The benchmark's modules, imported as when the script runs: its folder on the path."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    names = ("timing", "attention_peers", "attention", "gpu_suite")
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    for name in names:
        sys.modules.pop(name, None)


class WallMeter:
    """Stands in for the GPU's meter; counts what it was asked."""

    def __init__(self, timing):
        self.sample = timing.Sample
        self.calls = 0

    def time(self, run):
        self.calls += 1
        start = time.perf_counter()
        run()
        ms = (time.perf_counter() - start) * 1e3
        return self.sample(ms, ms)

    def peak_bytes(self, run):
        run()
        return 2**20


@pytest.fixture
def tiny(scripts, monkeypatch):
    """Tiny mixes, layouts with and without groups, and no flash-attn, whatever is installed."""
    for name in ("flash_attn", "flash_attn_interface", "flash_attn.cute"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(scripts.attention, "MIXES", {"tiny": TINY, "even": [4, 4]})
    monkeypatch.setattr(scripts.attention, "LAYOUTS", {"grouped": (4, 2, 16), "plain": (2, 2, 16)})
    return scripts


def options(scripts, output, *arguments):
    quick = ["--quick", "--dtype", "fp32", "--budget-ms", "1", "--repeats", "4", "--output", str(output)]
    return scripts.attention.parse([*quick, *arguments])


def test_mixes(scripts):
    mixes = scripts.attention.MIXES
    assert [len(lengths) for lengths in mixes.values()] == [128, 128, 32, 192, 1, 32]
    assert max(mixes["wikitext"]) <= 128 and 26 < sum(mixes["wikitext"]) / 128 < 31  # the sample's mean: 28.4
    assert min(mixes["short"]) >= 20 and max(mixes["short"]) <= 128 and sum(mixes["short"]) == 128 * 74
    assert max(mixes["e5"]) == 512 and 90 < sum(mixes["e5"]) / 192 < 115
    assert mixes["8k+short"].count(8192) == 1 and mixes["wikitext"] != sorted(mixes["wikitext"])
    assert all(min(lengths) >= 1 for lengths in mixes.values())
    assert mixes == importlib.reload(scripts.attention).MIXES


def test_quantiles_are_those_of_the_sample(scripts):
    """By words: the Mistral tokenizer makes 1.46 tokens of a word of these texts (and a beginning of sequence)."""
    import gzip

    with gzip.open(BENCHMARKS.parent / "recipes/data/wikipedia_sentences.txt.gz", "rt", encoding="utf-8") as lines:
        words = sorted(len(text.split()) for text in lines)
    for step, tokens in enumerate(scripts.attention.SENTENCES[:-1]):
        expected = 1.46 * words[round(step / 20 * (len(words) - 1))] + 1
        assert abs(tokens - expected) < 0.15 * expected + 2


def test_flops(scripts):
    flops = scripts.attention.flops
    assert flops([3, 1], 2, 8, False, "forward") == 4 * (9 + 1) * 2 * 8
    assert flops([3, 1], 2, 8, True, "forward") == 4 * (6 + 1) * 2 * 8
    assert flops([3], 1, 1, False, "backward") == 90
    assert flops([3], 1, 1, False, "forward+backward") == 126


def test_peaks(scripts):
    peak = scripts.attention.bf16_peak
    assert peak("NVIDIA H100 80GB HBM3", torch.bfloat16) == 989
    assert peak("NVIDIA H100 PCIe", torch.float16) == 756
    assert peak("NVIDIA A100-SXM4-80GB", torch.bfloat16) == 312
    assert peak("NVIDIA H200", torch.float32) is None and peak("another", torch.bfloat16) is None


def test_runs(tiny, tmp_path, capsys):
    """Masks, layouts, with and without dropout: all agree, all are timed; table, JSON and plot."""
    meter = WallMeter(tiny.timing)
    arguments = ["--mixes", "tiny", "even", "--layouts", "grouped", "plain", "--masks", "bidirectional", "causal"]
    chosen = options(tiny, tmp_path, *arguments, "--dropout", "0", "0.3", "--peers", "bivec", "bivec torch", "sdpa")
    assert tiny.attention.run(chosen, torch.device("cpu"), meter) == 0
    content = json.loads((tmp_path / "attention_cpu.json").read_text(encoding="utf-8"))
    rows = content["rows"]
    assert len(rows) == 2 * 2 * 2 * 2 * 3 * 3  # mixes, layouts, masks, dropouts, directions, implementations
    assert all(row["error"] is None and row["timing"]["repeats"] >= 3 for row in rows)
    assert all(row["ours_is_faster_by"] == 1.0 for row in rows if row["implementation"] == "bivec")
    unchecked = {(row["implementation"], row["dropout_p"]) for row in rows if row["relative_error"] is None}
    assert unchecked == {("sdpa", 0.3)}
    assert {row["note"] for row in rows if row["implementation"] == "sdpa" and row["mix"] == "tiny"} == {
        "2.4 x padded",
        "2.4 x padded, kv heads repeated",
    }
    assert content["versions"]["torch"] == torch.__version__ and "flash-attn 2" in content["missing"]
    assert (tmp_path / "attention_cpu.png").stat().st_size > 1000
    printed = capsys.readouterr().out
    assert "TFLOP/s" in printed and "without flash-attn 3: ModuleNotFoundError" in printed


def test_a_wrong_kernel_gets_no_speed(tiny, tmp_path, monkeypatch, capsys):
    for spoil in (lambda x: x * 1.01, lambda x: x + torch.nan):
        monkeypatch.setattr(
            tiny.attention_peers, "flash_attention", lambda *a, spoil=spoil, **k: spoil(flash_attention(*a, **k))
        )
        meter = WallMeter(tiny.timing)
        chosen = options(tiny, tmp_path, "--mixes", "even", "--layouts", "plain", "--peers", "bivec", "sdpa")
        assert tiny.attention.run(chosen, torch.device("cpu"), meter) == 1
        assert "FAILED  plain, even, bidirectional" in capsys.readouterr().out
        rows = json.loads((tmp_path / "attention_cpu.json").read_text(encoding="utf-8"))["rows"]
        ours = [row for row in rows if row["implementation"] == "bivec"]
        assert len(ours) == 1 and ours[0]["timing"] is None and ours[0]["error"].startswith("wrong: relative")
        assert all(row["ours_is_faster_by"] is None and row["timing"] for row in rows if row not in ours)


def test_a_failing_peer_leaves_the_others(tiny, tmp_path, monkeypatch):
    """At preparation, in the backward, and under the clock; no plot where there is no matplotlib."""
    sdpa = tiny.attention_peers.PEERS["sdpa"]

    def late(work):
        call = sdpa.prepare(work)
        calls = iter(range(100))

        def forward():
            if next(calls) > 0:
                raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
            return call.forward()

        return tiny.attention.replace(call, forward=forward)

    monkeypatch.setitem(tiny.attention_peers.PEERS, "sdpa", tiny.attention.replace(sdpa, prepare=late))
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name))
    chosen = options(tiny, tmp_path, "--mixes", "tiny", "--layouts", "plain", "--peers", "bivec", "sdpa", "varlen")
    assert tiny.attention.run(chosen, torch.device("cpu"), WallMeter(tiny.timing)) == 0
    rows = json.loads((tmp_path / "attention_cpu.json").read_text(encoding="utf-8"))["rows"]
    errors = {row["implementation"]: row["error"] for row in rows if row["error"]}
    assert errors["sdpa"] == "OutOfMemoryError: CUDA out of memory." and "varlen" in errors
    assert sum(row["timing"] is not None for row in rows) == 3 and not (tmp_path / "attention_cpu.png").exists()


def as_flash_attn_2(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, causal=False):
    dropout = {"dropout_p": dropout_p, "seed": 3} if dropout_p else {}
    return flash_attention(q, k, v, cu_seqlens_q, max_seqlen_q, causal=causal, backend="torch", **dropout)


def as_flash_attn_4(q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, causal=False):
    out = flash_attention(q, k, v, cu_seqlens_q, max(TINY), causal=causal, backend="torch")
    return out, None


def as_varlen_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False):
    return flash_attention(query, key, value, cu_seq_q, max_q, causal=is_causal, backend="torch")


def as_varlen_2_12(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, -1), enable_gqa=False):
    assert enable_gqa == (query.shape[1] != key.shape[1])
    return flash_attention(query, key, value, cu_seq_q, max_q, causal=window_size == (-1, 0), backend="torch")


@pytest.mark.parametrize("varlen", [as_varlen_2_10, as_varlen_2_12])
def test_adapters(tiny, tmp_path, monkeypatch, varlen):
    """Other people's functions, by their signatures."""
    for name, function in (
        ("flash_attn", as_flash_attn_2),
        ("flash_attn_interface", as_flash_attn_2),
        ("flash_attn.cute", as_flash_attn_4),
    ):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(flash_attn_varlen_func=function))
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", varlen)
    chosen = options(tiny, tmp_path, "--mixes", "tiny", "--layouts", "grouped", "--masks", "causal", "bidirectional")
    assert tiny.attention.run(chosen, torch.device("cpu"), WallMeter(tiny.timing)) == 0
    rows = json.loads((tmp_path / "attention_cpu.json").read_text(encoding="utf-8"))["rows"]
    assert {row["implementation"] for row in rows} == set(tiny.attention.PEERS) - {"bivec torch"}
    assert all(row["error"] is None and row["relative_error"] < 1e-5 for row in rows)


def test_varlen_of_this_torch_takes_our_arguments(scripts):
    """Its real function on meta tensors: shapes forward and backward, grouped heads."""
    from dataclasses import replace

    work = scripts.attention.make_work(TINY, (4, 2, 16), "causal", 0.0, torch.bfloat16, "cpu")
    on_meta = {name: getattr(work, name).to("meta") for name in ("q", "k", "v", "d_out", "cu_seqlens")}
    for name in "qkv":
        on_meta[name] = on_meta[name].detach().requires_grad_()
    call = scripts.attention_peers.varlen_call(replace(work, **on_meta))
    out = call.forward()
    assert out.shape == work.q.shape and [g.shape for g in call.backward(out)] == [x.shape for x in work_operands(work)]


def work_operands(work):
    return work.q, work.k, work.v


class Clock:
    """Time as the test says: a microsecond passes at each look, and what ``sleep`` is told."""

    now = 0.0

    def perf_counter(self):
        self.now += 1e-6
        return self.now

    def sleep(self, seconds):
        self.now += seconds


@pytest.fixture
def fake_gpu(scripts, monkeypatch):
    """torch.cuda as a CPU can play it."""
    clock, properties = Clock(), SimpleNamespace(total_memory=80 * 2**30)

    class FakeEvent:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = clock.perf_counter()

        def elapsed_time(self, end):
            return (end.at - self.at) * 1e3

    for name, value in {
        "is_available": lambda: True,
        "Event": FakeEvent,
        "synchronize": lambda device: None,
        "reset_peak_memory_stats": lambda device: None,
        "memory_allocated": lambda device: 1000,
        "max_memory_allocated": lambda device: 5000,
        "get_device_name": lambda device: "NVIDIA H100 80GB HBM3",
        "get_device_properties": lambda device: properties,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(scripts.timing, "SCRATCH_BYTES", 2**12)
    monkeypatch.setattr(scripts.timing, "time", clock)  # and so timing.time is the test's
    return scripts


def test_gpu_meter(fake_gpu):
    meter = fake_gpu.timing.GpuMeter(torch.device("cpu"))
    assert meter.fills == 200  # of 0.01 ms at least, for 2 ms
    ran = []
    sample = meter.time(lambda: ran.append(1))
    assert sample.ms == pytest.approx(3e-3) and sample.host_ms == pytest.approx(1e-3) and ran == [1]
    assert meter.peak_bytes(lambda: ran.append(1)) == 4000 and ran == [1, 1]
    naps = iter([2e-3, 2e-3, 4e-3, 3e-3])  # the first one decides how often
    runs = {"a": lambda: fake_gpu.timing.time.sleep(next(naps)), "b": lambda: None}
    timings = fake_gpu.timing.interleaved(meter, runs, 5.0, 6)
    assert timings["a"].repeats == 3 and timings["b"].repeats == 6
    assert [timings["a"].ms_min, timings["a"].ms, timings["a"].ms_max] == pytest.approx([2.003, 3.003, 4.003])


def test_gpu_is_described(fake_gpu):
    described = fake_gpu.timing.describe_run(torch.device("cuda"))
    assert described["device"] == "NVIDIA H100 80GB HBM3" and described["memory_bytes"] == 80 * 2**30
    assert described["versions"]["bivec"] and described["date"] and described["command"]


def test_main_chooses_the_gpu(fake_gpu, monkeypatch, tmp_path):
    chosen = []
    monkeypatch.setattr(fake_gpu.attention, "run", lambda *arguments: chosen.append(arguments) or 0)
    monkeypatch.setattr(fake_gpu.attention, "GpuMeter", lambda device: f"meter of {device}")
    assert fake_gpu.attention.main(["--output", str(tmp_path)]) == 0
    assert chosen[0][0].mixes == list(fake_gpu.attention.MIXES) and chosen[0][0].dropout == [0.0, 0.3]
    assert chosen[0][1:] == (torch.device("cuda"), "meter of cuda")


def run_script(script, *arguments, cache):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"BIVEC_CACHE": str(cache)}
    command = [sys.executable, str(BENCHMARKS / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the table is for machines without a GPU")
def test_without_a_gpu_there_is_the_table(tmp_path):
    pytest.importorskip("triton")
    found = run_script("attention.py", "--match", "bf16 d64 g4 L64 plain", cache=tmp_path)
    assert found.returncode == 0, found.stderr
    assert "No GPU here" in found.stdout and "attention_short_backward" in found.stdout
    assert "2 kernels of 1 cases" in found.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_suite_without_a_gpu(tmp_path):
    found = run_script("gpu_suite.py", "--output-dir", str(tmp_path / "out"), cache=tmp_path)
    assert found.returncode == 2 and "No GPU here" in found.stderr and not (tmp_path / "out").exists()


def test_suite_goes_on_after_a_failure(fake_gpu, tmp_path, monkeypatch, capfd):
    suite, output, begun = fake_gpu.gpu_suite, tmp_path / "out", tmp_path / "begun"
    chosen = ["--output-dir", str(output), "--tune", "--quick"]
    commands = suite.parts(suite.parse(chosen), tmp_path)
    assert Path(commands["tests"][0]).name == "pytest" and commands["tests"][1:] == ["-q", *suite.TESTS]
    assert all((suite.ROOT / path).is_file() for path in suite.TESTS)
    assert commands["attention"][2:] == ["--quick", "--output", str(tmp_path / "attention")]
    assert commands["train_step_mistral-7b"][2:4] == ["--shape", "mistral-7b"] and commands["tune"][-1] == "--timed"
    assert list(suite.parts(suite.parse([*chosen, "--only", "ops"]), tmp_path)) == ["ops"]
    writes = "import json, sys; open(sys.argv[1] + '/attention/a.json', 'w').write(json.dumps({'rows': []}))"
    draws = "open(sys.argv[1] + '/attention/a.png', 'w').write('plot')"
    tells = "import os; print('interpreted:', 'TRITON_INTERPRET' in os.environ)"
    hangs = "import sys, time; print('begun'); open(sys.argv[1], 'w').close(); time.sleep(600)"
    shared = []

    def shares(name, waiting, left):
        shared.append((name, *waiting))
        return 5.0 if name == "slow" else 600.0

    class Timer(threading.Timer):
        """Time is up for the slow part once it has begun, and for the others never, however loaded the machine."""

        def run(self):
            while not (self.interval == 5.0 and begun.exists()):
                if self.finished.wait(0.01):
                    return
            self.function()

    def replaced(options, folder):
        return {
            "tests": [sys.executable, "-c", "print('one failed'); raise SystemExit(3)"],
            "missing": [str(tmp_path / "no-such-command")],
            "slow": [sys.executable, "-c", hangs, str(begun)],
            "attention": [sys.executable, "-c", f"{writes}; {draws}; {tells}", str(folder)],
        }

    monkeypatch.setattr(suite, "parts", replaced)
    monkeypatch.setattr(suite, "share", shares)
    monkeypatch.setattr(suite.threading, "Timer", Timer)
    assert suite.main(chosen) == 1
    assert shared == [tuple(replaced(None, tmp_path))[i:] for i in range(4)]
    assert sorted(path.name for path in output.iterdir()) == ["attention.png", "log.txt", "results.json", "results.md"]
    parts = json.loads((output / "results.json").read_text())["parts"]
    assert [part["exit_code"] for part in parts.values()] == [3, None, -9, 0]
    assert parts["slow"]["error"] == "stopped after 5 s" and "no-such-command" in parts["missing"]["error"]
    assert parts["attention"]["result"] == {"rows": []} and str(tmp_path) not in parts["attention"]["command"]
    log = (output / "log.txt").read_text()
    assert [line for line in log.splitlines() if line.startswith("==")] == [f"== {name}" for name in parts]
    assert "begun" in log and log.rstrip().endswith("interpreted: False")
    table = re.sub(r"\| \d+ \|", "| s |", (output / "results.md").read_text())
    assert "\n| tests | s | FAILED: exit code 3 |\n" in table and "\n| attention | s | ok |\n" in table
    assert "one failed" in capfd.readouterr().out
    monkeypatch.setattr(suite, "parts", lambda options, folder: {"attention": [sys.executable, "-c", "pass"]})
    assert suite.main(chosen) == 0
    assert "one failed" not in (output / "log.txt").read_text()  # of the last run alone


def test_suite_runs_a_checkout_that_was_never_installed(fake_gpu, monkeypatch):
    suite = fake_gpu.gpu_suite
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(suite.importlib.util, "find_spec", lambda name: None if name == "bivec" else find_spec(name))
    with suite.importable() as environment:
        folder = environment["PYTHONPATH"].split(os.pathsep)[0]
        assert (Path(folder) / "bivec").resolve() == suite.ROOT and "TRITON_INTERPRET" not in environment
        code = "import bivec.kernels; print(bivec.__file__)"
        told = subprocess.run(
            [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {folder!r}); {code}"], **TEXT
        )
        assert told.stdout.strip() == str(Path(folder) / "bivec" / "__init__.py"), told.stderr
    assert not Path(folder).exists()


def test_the_time_is_shared(fake_gpu):
    """Twice as much for a part of weight 2; what one leaves is for the others."""
    share = fake_gpu.gpu_suite.share
    assert share("tests", ["losses", "ops"], 500) == 300 and share("losses", ["ops"], 400) == 200
    assert share("train_step_mistral-7b", [], 120) == 120 and share("ops", ["losses"], -5) == 1


TEXT = {"capture_output": True, "text": True}
