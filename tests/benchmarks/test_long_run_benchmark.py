"""benchmarks/long_run.py: its sentences, its readings, its judgement, and a whole run on a tiny model."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def long_run(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.delitem(sys.modules, "long_run", raising=False)
    import long_run

    yield long_run
    sys.modules.pop("long_run", None)


def test_words_become_text(long_run):
    words = ["He", "did", "n't", "say", "(", "at", "first", ")", ":", "it", "'s", "$", "5", ",", "is", "n't", "it", "?"]
    assert long_run.plain_text(words) == "He didn't say (at first): it's $5, isn't it?"


def test_sentences_are_of_all_corpora_and_different(long_run):
    found = long_run.sentences()
    assert len(found) == len(set(found)) > 10_000
    assert all(len(text.split()) >= long_run.LEAST_WORDS and "\t" not in text for text in found)
    assert found[4825:4827] == [  # behind Wikipedia's
        "From the AP comes this story:",
        (
            "President Bush on Tuesday nominated two individuals to replace retiring jurists on federal courts in the "
            "Washington area."
        ),
    ]


def test_a_process_is_read(long_run):
    memory, files, threads = long_run.read_process(os.getpid())
    assert memory > 20 and threads >= 1
    with (ROOT / "README.md").open():
        assert long_run.read_process(os.getpid())[1] == files + 1
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    assert long_run.read_process(ended.pid) is None


def test_a_line_half_written_is_no_place(long_run, tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    assert long_run.place(metrics) == ("start", 0)
    metrics.write_text('{"stage": "mntp", "step": 3}\n')
    assert long_run.place(metrics) == ("mntp", 3)
    metrics.write_text('{"stage": "mntp", "step": 3}\n{"stage": "mn')
    assert long_run.place(metrics) == ("start", 0)


def judged(long_run, memory, speed=lambda _: 300.0, processes=lambda _: 0, extra=()):
    """The drift of a stage of 100 steps, ten seconds each, with these values at each step."""
    readings = [
        long_run.Reading(10.0 * i, processes(i), "simcse", i, memory(i), 20 + i // 50, 4) for i in range(1, 101)
    ]
    metrics = [{"stage": "simcse", "step": i, "tokens_per_s": speed(i)} for i in range(1, 101)]
    other = [long_run.Reading(0.0, 0, "mntp", 1, 9e9, 9, 9)]
    all_metrics = [{"stage": "mntp", "step": 1, "tokens_per_s": 1.0}, *metrics]
    return long_run.drift("simcse", [*other, *readings, *extra], all_metrics)


def test_growth_and_drift_are_seen_and_the_settling_is_not(long_run):
    steady = judged(long_run, lambda i: 500.0 if i > 15 else 100.0, lambda i: 300.0 if i > 15 else 10.0)
    assert steady.growth_mib_per_hour == pytest.approx(0, abs=1e-6)
    assert steady.resident_mib == (500, 500) and steady.tokens_per_s == (300, 300)
    assert steady.steps == 100 and steady.minutes == pytest.approx(16.5) and steady.open_files == (20, 22)
    leaking = judged(long_run, lambda i: 500.0 + i, lambda i: 300.0 - i)
    assert leaking.growth_mib_per_hour == pytest.approx(360)  # a MiB in ten seconds
    first, last = leaking.resident_mib
    assert last - first == pytest.approx(54) and leaking.tokens_per_s[0] - leaking.tokens_per_s[1] == pytest.approx(54)


@pytest.mark.parametrize("evaluation", [100.0, 5000.0])
def test_evaluation_is_no_training(long_run, evaluation):
    """Readings behind the last step, while the sets are encoded and the model is written."""
    extra = [long_run.Reading(1000.0 + 10 * i, 0, "simcse", 100, evaluation, 99, 9) for i in range(1, 121)]
    assert judged(long_run, lambda i: 500.0 + i, extra=extra) == judged(long_run, lambda i: 500.0 + i)


def test_a_resumed_run_hides_no_leak(long_run):
    """The second process begins with little memory again."""
    found = judged(long_run, lambda i: 500.0 + 4 * (i % 50), processes=lambda i: i // 50)
    assert found.growth_mib_per_hour == pytest.approx(1440)


def test_a_log_that_was_cut_off_is_gone_on_with(long_run, tmp_path):
    log = tmp_path / "log.jsonl"
    assert long_run.read_log(log) == []
    reading = long_run.Reading(1.0, 0, "mntp", 1, 2.0, 3, 4)
    log.write_text(json.dumps(asdict(reading)) + '\n{"seconds": 1')
    assert long_run.read_log(log) == long_run.read_log(log) == [reading]


def test_too_few_readings_are_an_error(long_run):
    readings = [long_run.Reading(1.0, 0, "mntp", 1, 1.0, 1, 1)] * 2
    with pytest.raises(ValueError, match="mntp gave 1 readings"):
        long_run.drift("mntp", readings, [{"stage": "mntp", "step": 1, "tokens_per_s": 1.0}])


def test_a_run(long_run, tiny_llama_dir, tmp_path, monkeypatch, capsys):
    """Both stages on a tiny model, read often enough; then it is not begun a second time by mistake."""
    monkeypatch.setattr(long_run, "SECONDS", 0.02)
    flags = ["--model", str(tiny_llama_dir), "--set", "eval_pairs=20", "--set", "mntp.sequence_length=16"]
    for stage in ("mntp", "simcse"):
        flags += ["--set", f"{stage}.optim.steps=30", "--set", f"{stage}.optim.warmup_steps=1"]
        flags += ["--set", f"{stage}.batch_size=2"]
    command = ["long_run.py", "--run", str(tmp_path / "run"), "--results", str(tmp_path / "results"), *flags]
    monkeypatch.setattr(sys, "argv", command)
    long_run.main()
    content = json.loads((tmp_path / "results" / "long_run.json").read_text())
    assert [row["stage"] for row in content["stages"]][-1] == "bi+mntp+simcse"
    assert [(row["stage"], row["steps"]) for row in content["drift"]] == [("mntp", 30), ("simcse", 30)]
    assert len(content["metrics"]) == 60 and content["flags"] == flags and content["overlap"] == {}
    assert content["settings"]["mntp"]["sequence_length"] == 16
    assert str(tmp_path) not in json.dumps(content["settings"])
    page, table = (tmp_path / "results" / "long_run.md").read_text(), long_run.tables(content)
    assert table in capsys.readouterr().out and "| simcse | 30 |" in table
    assert page == long_run.page(content) and table in page and "hours in 1 process. torch" in page
    assert (tmp_path / "results" / "long_run.png").stat().st_size > 10_000
    with pytest.raises(SystemExit):
        long_run.main()
    assert "give --resume" in capsys.readouterr().err
