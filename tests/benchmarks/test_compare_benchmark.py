"""benchmarks/compare.py: what got worse is named, what a slower machine does to both sides is not."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
COMMITTED = BENCHMARKS / "results" / "losses_cpu.json"


@pytest.fixture
def compare(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.delitem(sys.modules, "compare", raising=False)
    import compare

    yield compare
    sys.modules.pop("compare", None)


def changed(tmp_path, change):
    content = json.loads(COMMITTED.read_text())
    change(content["rows"])
    path = tmp_path / "new.json"
    path.write_text(json.dumps(content))
    return path


def test_a_committed_run_is_no_worse_than_itself(compare, capsys):
    assert compare.main([str(COMMITTED), str(COMMITTED)]) == 0
    told = capsys.readouterr().out
    rows = json.loads(COMMITTED.read_text())["rows"]
    peers = [row for row in rows if row["implementation"] != "bivec"]
    count = sum(row[key] is not None for row in peers for key in ("ours_is_faster_by", "ours_is_smaller_by"))
    assert f"{count} ratios compared, none got worse" in told and count > 20


def test_what_got_worse_is_named(compare, tmp_path, capsys):
    def slower(rows):
        index = next(i for i, row in enumerate(rows) if row["implementation"] != "bivec" and row["ours_is_faster_by"])
        rows[index]["ours_is_faster_by"] *= 0.88
        rows[index]["timing"]["ms"] *= 3  # of a slower machine: no news
        rows[index + 1]["peak_bytes"] = 1

    path = changed(tmp_path, slower)
    assert compare.main([str(path), str(COMMITTED)]) == 1
    told = capsys.readouterr().out.splitlines()
    assert [line.startswith("WORSE  new.json: linear_cross_entropy 256 576 8192") for line in told] == [True, False]
    assert "time: " in told[0] and "(12 % worse)" in told[0]
    assert compare.main([str(path), str(COMMITTED), "--tolerance", "0.2"]) == 0
    assert compare.main([str(COMMITTED), str(path)]) == 0  # better


def test_a_ratio_of_one_run_only_is_named(compare, tmp_path, capsys):
    def without_one(rows):
        del rows[next(i for i, row in enumerate(rows) if row["implementation"] != "bivec")]

    path = changed(tmp_path, without_one)
    assert compare.main([str(path), str(COMMITTED)]) == 0
    assert capsys.readouterr().out.count("only in the old run") == 2  # its time and its memory


def step(faster, share):
    peer = {"ours_is_faster_by": faster, "ours_is_smaller_by": None, "of_gemms": 0.4 / share}
    return {"stages": {"mntp": {"sides": {"bivec": {"seconds": 1.0, "of_gemms": share}, "peer": peer}}}}


def encoding(faster):
    return {"workloads": {"one call": {"ours_is_faster_by": faster, "sides": {}}}}


def test_folders_of_training_steps_and_encoding(compare, tmp_path, capsys):
    for name, contents in (
        ("old", {"train_step_x.json": step(2.0, 0.8), "encode_x.json": encoding(2.0)}),
        ("new", {"train_step_x.json": step(1.9, 0.6), "encode_x.json": encoding(1.0)}),
    ):
        (tmp_path / name).mkdir()
        for file, content in (contents | {"summary.json": {"pages": 3}}).items():
            (tmp_path / name / file).write_text(json.dumps(content))
    (tmp_path / "new" / "other.json").write_text("{}")
    assert compare.main([str(tmp_path / "new"), str(tmp_path / "old")]) == 1
    told = capsys.readouterr().out
    assert "encode one call, time: 2.00 x before, 1.00 x now (50 % worse)" in told
    assert "mntp bivec, share of the GEMMs' rate: 0.80 x before, 0.60 x now" in told and "mntp peer" not in told
    assert "summary.json: left out" in told and "other.json" not in told and "3 ratios compared" in told


def test_runs_of_the_gpu_suite(compare, tmp_path, capsys):
    losses = json.loads(COMMITTED.read_text())
    for name, faster in (("old", 3.0), ("new", 2.0)):
        medians = {"torch": faster, "bivec": 1.0}
        ops = [{"group": "swiglu forward", "implementation": who, "median_s": s} for who, s in medians.items()]
        parts = {"tests": {"exit_code": 0}, "ops": {"result": {"ops": ops}}, "losses": {"result": losses}}
        content = {"parts": parts | {"train_step_mistral-7b": {"result": step(faster, 0.8)}}}
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    assert compare.main([str(tmp_path / "new.json"), str(tmp_path / "old.json")]) == 1
    told = capsys.readouterr().out
    assert "train_step_mistral-7b: mntp peer, time: 3.00 x before" in told and told.count("WORSE") == 2
    assert "ops: swiglu forward torch, time: 3.00 x before, 2.00 x now" in told


def test_runs_of_ops(compare, tmp_path, capsys):
    """As pytest-benchmark writes them."""
    for name, median in (("old", 3.0), ("new", 1.0)):
        rows = [
            {"group": "swiglu forward", "params": {"name": who, "op": "swiglu"}, "stats": {"median": seconds}}
            for who, seconds in (("bivec", 1.0), ("torch", median), ("compile", 2.0))
        ]
        (tmp_path / f"{name}.json").write_text(json.dumps({"benchmarks": rows}))
    assert compare.main([str(tmp_path / "new.json"), str(tmp_path / "old.json")]) == 1
    told = capsys.readouterr().out
    assert "swiglu forward torch, time: 3.00 x before, 1.00 x now" in told and "2 ratios compared" in told


def test_what_cannot_be_compared(compare, tmp_path, capsys):
    (tmp_path / "a.json").write_text('{"other": 1}')
    (tmp_path / "empty").mkdir()
    for new, old, message in (
        (tmp_path / "a.json", COMMITTED, "neither the rows of"),
        (tmp_path / "none.json", COMMITTED, "No such file"),
        (tmp_path / "empty", tmp_path, "no file of the same name"),
    ):
        assert compare.main([str(new), str(old)]) == 2
        assert message in capsys.readouterr().err


def test_it_runs_as_a_script():
    command = [sys.executable, str(BENCHMARKS / "compare.py"), str(COMMITTED), str(COMMITTED)]
    assert subprocess.run(command, capture_output=True, text=True).returncode == 0
