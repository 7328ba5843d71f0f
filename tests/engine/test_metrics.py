"""The logs of a run: whole lines only, and cut back to a checkpoint on resume."""

import json

import pytest

from bivec.engine.errors import RunError
from bivec.engine.metrics import Evaluation, StepLog, losses_by_stage
from bivec.engine.trainer import StepMetrics


def line(stage, step, loss=1.0):
    return StepMetrics(stage, step, loss, 1e-3, 0.5, 64, 1000.0, 1 << 20)


@pytest.fixture
def log(tmp_path):
    log = StepLog(tmp_path / "metrics.jsonl", StepMetrics)
    for stage in ("mntp", "simcse"):
        for step in (1, 2, 3):
            log.append(line(stage, step, step / 3))
    return log


def test_round_trip(log):
    assert log.read() == [line(stage, step, step / 3) for stage in ("mntp", "simcse") for step in (1, 2, 3)]
    first = json.loads(log.path.read_text().splitlines()[0])
    assert first == {
        "stage": "mntp",
        "step": 1,
        "loss": 1 / 3,
        "lr": 1e-3,
        "grad_norm": 0.5,
        "tokens": 64,
        "tokens_per_s": 1000.0,
        "peak_memory_bytes": 1 << 20,
    }
    assert losses_by_stage(log.read()) == {stage: [(s, s / 3) for s in (1, 2, 3)] for stage in ("mntp", "simcse")}


def test_nothing_yet(tmp_path):
    log = StepLog(tmp_path / "none.jsonl", StepMetrics)
    log.truncate("mntp", 0)
    assert log.read() == [] and losses_by_stage([]) == {} and not log.path.exists()


def test_truncate_spares_the_other_stage(log):
    log.truncate("simcse", 1)
    assert [(m.stage, m.step) for m in log.read()] == [("mntp", 1), ("mntp", 2), ("mntp", 3), ("simcse", 1)]
    log.truncate("mntp", 0)
    assert [(m.stage, m.step) for m in log.read()] == [("simcse", 1)]
    assert [path.name for path in log.path.parent.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("tail", ["{", '{"stage": "simcse", "st', "[1]", "null", '{"stage": "simcse"}', "\ufffd"])
def test_a_last_line_cut_short(log, tail):
    whole = log.read()
    with log.path.open("a", encoding="utf-8") as file:
        file.write(tail)
    assert log.read() == whole
    log.truncate("simcse", 3)  # what a resumed run does first: the stump goes, the next line starts fresh
    log.append(line("simcse", 4))
    assert log.read() == [*whole, line("simcse", 4)]


@pytest.mark.parametrize("bad", [b"not json\n", b"[]\n", b'{"step": 1}\n', b"\xff\xfe\n"])
def test_a_bad_line_in_the_middle(log, bad):
    lines = log.path.read_bytes().splitlines(keepends=True)
    log.path.write_bytes(b"".join([*lines[:2], bad, *lines[2:]]))
    with pytest.raises(RunError, match=r"metrics\.jsonl, line 3: not a line of this log"):
        log.read()


def test_evaluations(tmp_path):
    log = StepLog(tmp_path / "evaluations.jsonl", Evaluation)
    for step in (2, 4):
        log.append(Evaluation("mntp", step, 10.0 * step))
    log.truncate("mntp", 3)
    assert log.read() == [Evaluation("mntp", 2, 20.0)]


def test_it_cannot_be_written(tmp_path):
    log = StepLog(tmp_path / "missing" / "metrics.jsonl", StepMetrics)
    with pytest.raises(RunError, match=r"metrics\.jsonl: cannot be written \(No such file"):
        log.append(line("mntp", 1))
