"""The tuning table is complete and says what the compiler says; the choosers choose, and write one whole file."""

from __future__ import annotations

import importlib
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bivec.kernels import tuning
from bivec.kernels.tuning import ARCHITECTURES, Config

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
MODULES = ("timing", "tune_rows", "tune")


@pytest.fixture
def tune(monkeypatch):
    """benchmarks/tune.py, imported as when the script runs: its folder on the path."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module("tune")
    for name in MODULES:
        sys.modules.pop(name, None)


def report(**changes):
    fields = {"registers": 100, "spills": 0, "shared": 1000, "instructions": SimpleNamespace(tensor_core=8)}
    return SimpleNamespace(**fields | changes)


def test_the_table_has_every_row_that_a_kernel_looks_up(tune):
    wanted = {(row.kernel, row.arch, *sorted(row.key.items())): row for row in tune.rows(ARCHITECTURES)}
    table = {(r["kernel"], r["arch"], *sorted(r["key"].items())): r for r in tuning.read_table("attention")}
    assert table.keys() <= wanted.keys()
    assert all(row.length is not None for key, row in wanted.items() if key not in table)
    for key, row in table.items():
        assert tuning.config_of(row) in wanted[key].candidates
        assert row["chosen_by"] == "compiled" or row["chosen_by"].startswith("timed on ")
        assert row["compiled"]["spills"] == 0 and 0 < row["compiled"]["registers"] <= 512
        assert 0 < row["compiled"]["shared"] <= tune.aot.SHARED_LIMITS[row["arch"]]
        assert row["compiled"]["tensor_core"] > 0 or row["key"]["itemsize"] == 4
        if key[0] == "attention_short_backward":  # what decides on the path
            assert ("attention_short_forward", *key[1:]) in table
    for arch in ARCHITECTURES:  # the sizes of LLaMA and Mistral
        key = {"head_dim": 128, "itemsize": 2, "length": 64}
        assert tuning.has_config("attention", "attention_short_backward", arch, **key)


def test_architectures_without_rows_take_those_of_a_relative():
    for given, expected in (("sm_86", "sm_80"), ("sm_89", "sm_80"), ("sm_103", "sm_100"), ("sm_120", "sm_80")):
        assert tuning.table_architecture(given) == expected
    assert tuning.table_architecture("gfx950") == "gfx942"
    with pytest.raises(RuntimeError, match=r"sm_75: .*compute capability 8\.0"):
        tuning.table_architecture("sm_75")
    with pytest.raises(KeyError):
        tuning.config_for("attention", "attention_forward", "sm_90", head_dim=512, itemsize=2)


def test_overrides_end_with_their_block():
    key = {"head_dim": 64, "itemsize": 2}
    before = tuning.config_for("attention", "attention_forward", "sm_90", **key)
    other = Config({"BLOCK_M": 16, "BLOCK_N": 16}, 1, 1)
    with tuning.overriding({"attention_forward": other}):
        assert tuning.config_for("attention", "attention_forward", "sm_90", **key) is other
    assert tuning.config_for("attention", "attention_forward", "sm_90", **key) == before


def test_a_candidate_is_usable_if_none_of_its_options_spills(tune):
    row = next(row for row in tune.rows(("sm_90",)) if row.itemsize == 2)
    worst = tune.compiled(row, [report(), report(registers=200, shared=5)])
    assert worst == {"registers": 200, "spills": 0, "shared": 1000, "tensor_core": 8}
    for bad in (
        report(spills=4),
        report(shared=10**6),
        report(instructions=SimpleNamespace(tensor_core=0)),
        tune.aot.Failure("attention_forward", "sm_90", "an error"),
    ):
        assert tune.compiled(row, [report(), bad]) is None


def test_the_first_usable_candidate_is_chosen(tune, monkeypatch):
    wanted = [row for row in tune.rows(("sm_90",)) if row.kernel == "attention_forward"][:2]
    refused = [(wanted[0], config) for config in wanted[0].candidates[:2]]
    figures = {"registers": 1, "spills": 0, "shared": 1, "tensor_core": 1}
    monkeypatch.setattr(
        tune, "usable", lambda attempts, *_: [None if pair in refused else figures for pair in attempts]
    )
    first, second = tune.choose_compiled(wanted, 1)
    assert tuning.config_of(first) == wanted[0].candidates[2] and tuning.config_of(second) == wanted[1].candidates[0]
    monkeypatch.setattr(tune, "usable", lambda attempts, *_: [None] * len(attempts))
    with pytest.raises(RuntimeError, match="each of these rows needs a configuration"):
        tune.choose_compiled(wanted, 1)
    short = [row for row in tune.rows(("sm_90",)) if row.length][:1]
    assert tune.choose_compiled(short, 1) == []


def test_the_fastest_candidate_is_chosen(tune, monkeypatch):
    rows = [row for row in tune.rows(("sm_90",)) if (row.head_dim, row.itemsize) == (64, 2)]
    long, short = rows[0], next(row for row in rows if row.length == 64)
    monkeypatch.setattr(tune, "usable", lambda attempts, *_: [{"registers": 1} for _ in attempts])
    ran = []
    monkeypatch.setattr(tune.Row, "run", lambda row, problem, config: ran.append((problem, config)))

    class Meter:
        """The third candidate of a row is the fast one."""

        def time(self, run):
            run()
            fast = ran[-1][1] in (long.candidates[2], short.candidates[2])
            return sys.modules["timing"].Sample(1.0 if fast else 2.0, 0.0)

    entries = tune.choose_timed([long, short], torch.device("cpu"), "a test", Meter())
    assert [tuning.config_of(e) for e in entries] == [long.candidates[2], short.candidates[2]]
    assert entries[0]["chosen_by"].startswith("timed on a test, 20") and entries[1]["key"]["length"] == 64
    problem = ran[-1][0]
    lengths = problem.cu_seqlens.diff()
    assert lengths.max() <= 64 and lengths.min() >= 16 and 8_000 < problem.q.shape[0] < 20_000
    assert torch.equal(lengths, lengths.sort(descending=True).values)  # so that cu_seqlens is the schedule too


def test_writing_replaces_rows_and_keeps_the_others(tune, monkeypatch, tmp_path):
    table = tmp_path / "attention.json"
    monkeypatch.setattr(tune.tuning, "FOLDER", tmp_path)
    all_rows = list(tune.rows(("sm_80", "sm_90")))
    there, here = all_rows[0], next(row for row in all_rows if row.arch == "sm_90")
    short = next(row for row in all_rows if row.arch == "sm_90" and row.length)
    one, other = tune.entry(here, here.candidates[0], {}, "a"), tune.entry(there, there.candidates[0], {}, "b")
    third = tune.entry(short, short.candidates[0], {}, "c")
    tune.write("attention", [one, third, other], [here, there, short])
    assert json.loads(table.read_text()) == [other, one, third]  # by architecture
    changed = tune.entry(here, here.candidates[1], {}, "d")
    tune.write("attention", [changed], [here, short])  # nothing was found for the short one
    assert json.loads(table.read_text()) == [other, changed]
    assert [p.name for p in tmp_path.iterdir()] == ["attention.json"]


def test_the_rows_of_the_other_tables(tune):
    """All have candidates, the one in the table among them, and are launched by some case."""
    rows = list(tune.tune_rows.rows(ARCHITECTURES))
    assert {row.table for row in rows} == {path.stem for path in tuning.FOLDER.glob("*.json")} - {"attention"}
    for row in rows:
        assert tuning.config_for(row.table, row.kernel, row.arch, **row.key) in row.candidates
        other = row.candidates[-1]
        launches = row.launches(other)
        assert launches
        for launch in launches:
            if "BLOCK_TILE" in other.blocks:  # shaped by the launcher; of a long row larger, with as many more warps
                tile = math.prod(v for k, v in launch.arguments.items() if k in ("BLOCK_ROWS", "BLOCK_D", "BLOCK_HALF"))
                assert tile // launch.num_warps == other.blocks["BLOCK_TILE"] // other.num_warps
                assert launch.num_warps in (other.num_warps, 2 * other.num_warps, 4 * other.num_warps)
            else:
                assert launch.num_warps == other.num_warps
                assert other.blocks.items() <= launch.arguments.items()


def test_the_calls_that_the_other_kernels_are_timed_with(tune, monkeypatch):
    """Forward and backward of the public function, with the candidate."""
    called = []

    def call(name):
        def fake(x, *others, backend, **options):
            config = tuning.config_for(row.table, row.kernel, "sm_90", **row.key)
            called.append((name, x.dtype, backend, config))
            out = x.float().sum()
            return (out, out) if name in ("rms_norm", "apply_rotary", "lora_linears") else out

        return fake

    functions = {table.name: table.name for table in tune.tune_rows.TABLES}
    functions |= {"cross_entropy": "linear_cross_entropy", "rotary": "apply_rotary", "lora": "lora_linears"}
    for name in functions.values():
        monkeypatch.setattr(tune.tune_rows, name, call(name))
    monkeypatch.setattr(tune.tune_rows.torch, "randn", lambda *shape, **options: torch.zeros(2, 2, **options))
    for row in tune.tune_rows.rows(("sm_90",)):
        row.run(row.problem(torch.device("cpu")), row.candidates[-1])
        dtype = torch.float32 if row.key.get("itemsize") == 4 else torch.bfloat16
        assert called.pop() == (functions[row.table], dtype, "triton", row.candidates[-1])
