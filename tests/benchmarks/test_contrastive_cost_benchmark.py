"""benchmarks/contrastive_cost.py: the line, the batches, and a run of a tiny model."""

import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def cost(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.delitem(sys.modules, "contrastive_cost", raising=False)
    import contrastive_cost

    yield contrastive_cost
    sys.modules.pop("contrastive_cost", None)


def test_a_line_is_found_exactly(cost):
    tokens = [100, 200, 400, 6400]
    line = cost.fitted_line(tokens, [0.003 * t - 0.1 for t in tokens])
    assert line.fixed == pytest.approx(-0.1) and line.slope == pytest.approx(0.003)
    assert line.off == pytest.approx([0, 0, 0, 0], abs=1e-9)


def test_what_is_off_the_line_is_seen_at_any_size(cost):
    tokens = [100, 200, 400, 800, 1600, 3200, 6400]
    for index in (0, 3, 6):
        seconds = [0.003 * t for t in tokens]
        seconds[index] *= 1.5
        off = cost.fitted_line(tokens, seconds).off
        assert off[index] == max(off) > 0.1


def test_quadratic_time_is_no_line(cost):
    tokens = [100, 200, 400, 800, 1600, 3200, 6400]
    assert max(map(abs, cost.fitted_line(tokens, [t + t * t / 6400 for t in tokens]).off)) > 0.1


def test_a_line_needs_two_points(cost):
    with pytest.raises(ValueError, match="two points, got 1"):
        cost.fitted_line([1], [1])


def test_growth(cost):
    assert cost.growth([120.0, 100.0, 110.0]) == pytest.approx(0.2)


def test_batches_of_all_sizes_have_texts_of_the_same_lengths(cost):
    drawn = {count: cost.RandomTriples.draw(count, 512, 64) for count in (64, 4096)}
    means = {count: rows.of(0).lengths.sum() / count for count, rows in drawn.items()}
    assert means[64] == pytest.approx(means[4096], rel=0.02)
    rows = drawn[64].of(0)
    assert len(rows.input_ids) == len(set(rows.sample_ids)) == 192 and len(drawn[64].triples(0)) == 64
    assert rows.lengths.max() <= 64 and max(map(max, rows.input_ids)) < 512
    assert (rows.spans[:, 1] == rows.lengths).all() and not rows.spans[:, 0].any()


def test_small_batches_are_timed_more_often(cost):
    class Clock:
        def __init__(self):
            self.order = []

        def time(self, run):
            self.order.append(run())
            return type("Sample", (), {"ms": float(len(self.order))})

    clock = Clock()
    runs = {("cached", count): lambda count=count: count for count in (64, 2048, 4096)}
    found = cost.take_turns(clock, runs, turns=2)
    assert clock.order == 2 * ([64] * 8 + [2048, 4096])
    assert found["cached", 4096] == {"ms": 15.0, "ms_min": 10.0, "ms_max": 20.0, "repeats": 2}


def test_a_run_of_a_tiny_model(cost, tmp_path, capsys):
    arguments = ["--shape", "tiny", "--device", "cpu", "--turns", "1", "--micro-batch-tokens", "128"]
    assert cost.main([*arguments, "--batches", "8", "4", "--output", str(tmp_path)]) == 0
    content = json.loads((tmp_path / "contrastive_cost_cpu.json").read_text())
    small, large = content["rows"]
    assert [small["batch"], large["batch"]] == [4, 8] and small["micro_batches"] < large["micro_batches"]
    for row in content["rows"]:
        sides = row["sides"]
        assert sides["one forward"]["peak_bytes"] > sides["cached"]["peak_bytes"] > row["embedding_bytes"]
        assert row["embedding_bytes"] == 2 * 3 * row["batch"] * 64 * 4
        assert row["rest_bytes"] == sides["cached"]["peak_bytes"] - row["embedding_bytes"]
        assert sides["cached"]["ms"] > sides["loss"]["ms"] > 0
    assert content["verdict"]["line"]["off"] == pytest.approx([0, 0], abs=1e-6)  # two points
    assert (tmp_path / "contrastive_cost_cpu.png").stat().st_size > 0
    assert "off line" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", [["--batches", "64"], ["--batches", "0", "4"], ["--turns", "0"]])
def test_wrong_arguments(cost, wrong):
    with pytest.raises(SystemExit):
        cost.parse(wrong)
