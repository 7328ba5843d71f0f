"""benchmarks/mutation.py: which mutants a file has, what their tests say of them, and how survivors are counted."""

from __future__ import annotations

import ast
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2]
SOURCE = '''"""A module — with more than ASCII."""
from __future__ import annotations


def clipped(numbers: list[int] | None, limit: int | None = 3) -> list[int] | None:
    """At most ``limit`` each."""
    kept = []
    for number in numbers:
        kept.append(min(number, limit))  # … at most
    return kept


class Counter:
    @property
    def count(self) -> int:
        return 1 + 1

    def _hidden(self) -> int:
        return 2
'''
TEST = """from thing import Counter, clipped


def test_clipped():
    assert clipped([1, 5, 3]) == [1, 3, 3]
"""


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import mutation
    import mutation_sites

    yield mutation, mutation_sites
    for name in ("mutation", "mutation_sites"):
        sys.modules.pop(name, None)


def test_our_own_operators(scripts):
    _, sites = scripts
    found = [*sites._removed_sites(SOURCE), *sites._zeros_sites(SOURCE)]
    assert [(site.operator, site.line, site.name) for site in found] == [
        ("removed", 9, ""),
        ("zeros", 5, "clipped"),
        ("zeros", 15, "Counter.count"),
    ]
    removed = sites.mutated(SOURCE, found[0])
    assert sites.diff_of(SOURCE, removed) == ("kept.append(min(number, limit)) # … at most", "pass # … at most")
    assert not sites.same_program(SOURCE, removed) and sites.same_program(SOURCE, SOURCE + "# more\n")
    names: dict = {}
    exec(compile(sites.mutated(SOURCE, found[1]), "thing", "exec"), names)
    assert names["clipped"]([1, 5]) == [0, 0] and names["Counter"]().count == 2
    exec(compile(sites.mutated(SOURCE, found[2]), "thing", "exec"), names)
    assert names["clipped"]([1, 5]) == [1, 3] and names["Counter"]().count == 0


def test_annotations_are_no_mutants(scripts):
    pytest.importorskip("cosmic_ray", reason="pip install cosmic-ray==8.7.0")
    _, sites = scripts
    found = sites.sites_of(SOURCE)
    assert {site.line for site in found} == {5, 8, 9, 14, 15, 16, 19}
    sources = [sites.mutated(SOURCE, site) for site in found]
    assert len(set(sources)) == len(sources) and all(ast.parse(source) for source in sources)
    assert not any(site.line == 5 and "Binary" in site.operator for site in found)  # of the "|" in annotations
    assert any("limit: int | None = 4" in source for source in sources)


def test_overloads_are_no_mutants(scripts):
    """Nothing runs their signatures."""
    pytest.importorskip("cosmic_ray", reason="pip install cosmic-ray==8.7.0")
    _, sites = scripts
    begin = "from typing import overload\n\n\n@overload\ndef f(x: int, n: int = 3) -> int: ...\n"
    source = f"{begin}def f(x, n=3):\n    return x\n"
    assert {site.line for site in sites.sites_of(source)} == {6}


@dataclass(frozen=True)
class Pair:
    first: torch.Tensor
    second: tuple[int, str]

    def __post_init__(self):
        assert self.second[0] > 0


def test_zeros_have_the_structure_of_the_result(scripts):
    _, sites = scripts
    x = torch.ones(3, requires_grad=True)
    loss = sites.zeroed(torch.sum)(x)
    loss.backward()
    assert loss == 0 and torch.equal(x.grad, torch.zeros(3))
    pair = sites.zeroed(lambda: Pair(torch.ones(2, dtype=torch.int64), (5, "five")))()
    assert torch.equal(pair.first, torch.zeros(2, dtype=torch.int64)) and pair.second == (0, "")
    order = np.arange(3)
    order.setflags(write=False)
    zeros = sites.zeroed(lambda: order)()
    assert zeros.tolist() == [0, 0, 0] and not zeros.flags.writeable and order.tolist() == [0, 1, 2]
    assert list(sites.zeroed(lambda: (i for i in (1, 2.5)))()) == [0, 0.0]
    assert sites.zeroed(object)() is None and sites.zeroed(lambda: True)() is False


def test_a_worker_tells_dead_mutants_from_living_ones(scripts, tmp_path):
    """Of a file with one change: a test fails, nothing notices, the process ends."""
    mutation, _ = scripts
    thing = tmp_path / "site" / "thing.py"
    (tmp_path / "repository").mkdir()
    thing.parent.mkdir()
    thing.write_text(SOURCE, encoding="utf-8")
    (tmp_path / "repository" / "test_thing.py").write_text(TEST, encoding="utf-8")
    sources = [None, SOURCE.replace("= 3", "= 4"), SOURCE.replace("1 + 1", "1 - 1"), SOURCE + "raise SystemExit(3)\n"]
    jobs = [{"file": str(thing), "tests": ["test_thing.py"], "source": source} for source in sources]
    found = list(mutation.run_jobs(jobs, tmp_path))
    assert [one["outcome"] for one in found] == ["survived", "killed", "survived", "killed"]
    assert found[1]["by"] == "test_thing.py::test_clipped"
    assert thing.read_text(encoding="utf-8") == SOURCE


def mutant(outcome, **more):
    return {"operator": "core/X", "line": 1, "before": "a", "after": "b", "outcome": outcome, "by": ""} | more


def test_survivors_are_of_a_report(scripts, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["mutation.py", "--again", "--output", str(tmp_path)])
    with pytest.raises(SystemExit):
        scripts[0].main()
    assert "--again: there is no report" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_survivors_are_counted_by_their_reason(scripts):
    mutation, _ = scripts
    known = [
        {"file": "f.py", "before": "a", "after": ["b", "c"], "kind": "equivalent", "reason": "no difference"},
        {"file": "f.py", "before": "x", "after": ["y"], "kind": "left", "reason": "speed alone"},
        {"file": "f.py", "before": "x", "after": ["z"], "kind": "tested since", "reason": "test_y"},
    ]
    mutants = [
        mutant("survived"),
        mutant("survived", after="c"),
        mutant("survived", after="d"),
        mutant("survived", before="x", after="y"),
        mutant("survived", before="x", after="z"),
        mutant("killed"),
        mutant("timeout"),
    ]
    found = mutation.explained("f.py", mutants, known)
    assert [one.get("kind") for one in found] == [
        *["equivalent"] * 2,
        "unexplained",
        "left",
        "tested since",
        None,
        None,
    ]
    counts = mutation.counts_of(found)
    assert counts == {"equivalent": 2, "unexplained": 1, "left": 1, "tested since": 1, "killed": 1, "timeout": 1}
    assert mutation.kill_rate(counts) == 40.0  # of five that can be told apart, one of them stopped by its time
    assert [one.get("kind") for one in mutation.explained("g.py", mutants, known)][:1] == ["unexplained"]


def test_the_committed_report_follows_from_its_json(scripts):
    """Every survivor has its reason there, and every public function's zeros are noticed or explained."""
    mutation, _ = scripts
    results = ROOT / "benchmarks" / "results"
    document = json.loads((results / "mutation.json").read_text(encoding="utf-8"))
    assert set(document["parts"]) == set(mutation.PARTS)
    assert mutation.markdown(document) == (results / "mutation.md").read_text(encoding="utf-8")
    known = json.loads(mutation.SURVIVORS.read_text(encoding="utf-8"))
    for part in document["parts"].values():
        for file, found in part["files"].items():
            assert mutation.explained(file, found["mutants"], known) == found["mutants"]
            assert not mutation.counts_of(found["mutants"])["unexplained"], file
            assert not [one for one in found["mutants"] if one["operator"] == "zeros" and one["outcome"] == "survived"]
