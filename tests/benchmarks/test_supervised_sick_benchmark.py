"""benchmarks/supervised_sick.py: the bootstrap, the overlap, and the flags that it gives to the recipe."""

import runpy
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr

from bivec.engine.data import STSPair
from bivec.engine.recipe import SupervisedStage, as_dict
from bivec.engine.recipe_arguments import parse_arguments

ROOT = Path(__file__).parents[2]


@pytest.fixture
def sick(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.delitem(sys.modules, "supervised_sick", raising=False)
    import supervised_sick

    yield supervised_sick
    sys.modules.pop("supervised_sick", None)


def models(count, noise, seed):
    """Scores with ties as people give them, and the cosines of two models that share half of their noise."""
    generator = np.random.default_rng(seed)
    scores = generator.integers(0, 6, count).astype(float)
    shared, one, other = generator.normal(size=(3, count))
    return scores, scores + noise[0] * (shared + one), scores + noise[1] * (shared + other)


def test_spearman_is_scipys_row_by_row(sick):
    generator = np.random.default_rng(0)
    first, second = generator.normal(size=(3, 50)), generator.integers(0, 4, (3, 50))
    expected = [100 * spearmanr(a, b).statistic for a, b in zip(first, second, strict=True)]
    assert sick.spearman(first, second) == pytest.approx(expected)


@pytest.mark.parametrize("resamples", [20, 510])
def test_the_bootstrap_draws_pairs_for_both_models(sick, resamples):
    scores, new, old = models(60, (1.0, 2.0), seed=1)
    found = sick.paired_bootstrap(new, old, scores, resamples=resamples, seed=3)
    generator = np.random.default_rng(3)
    differences = []
    for count in (min(resamples, 500), max(resamples - 500, 0)):
        for drawn in generator.integers(0, 60, (count, 60)):
            ours, theirs = (spearmanr(model[drawn], scores[drawn]).statistic for model in (new, old))
            differences.append(100 * (ours - theirs))
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(differences, [2.5, 97.5])))
    assert found.points == pytest.approx(100 * (spearmanr(new, scores).statistic - spearmanr(old, scores).statistic))


def test_equal_models_differ_by_nothing(sick):
    scores, new, _ = models(40, (1.0, 1.0), seed=2)
    assert sick.paired_bootstrap(new, 3 * new + 1, scores, resamples=50) == sick.Difference(0.0, 0.0, 0.0)


def test_the_interval_holds_the_truth_as_often_as_it_says(sick):
    """Two models of the same quality: in 100 data sets the interval misses 0 about five times."""
    missed = 0
    for seed in range(100):
        scores, new, old = models(150, (1.0, 1.0), seed)
        found = sick.paired_bootstrap(new, old, scores, resamples=200, seed=seed)
        missed += not found.low <= 0 <= found.high
    assert 1 <= missed <= 12  # outside with a probability below 1 %


def test_a_better_model_is_told(sick):
    scores, new, old = models(300, (0.5, 3.0), seed=5)
    found = sick.paired_bootstrap(new, old, scores, resamples=200)
    assert 0 < found.low < found.points < found.high


def test_overlap_is_counted_with_and_without_punctuation(sick):
    triples = [
        {"query": "A man sings", "positive": "A person sings", "negatives": ["Nobody sings"]},
        {"query": "The dog's bowl is red", "positive": "A bowl is red", "negatives": []},
    ]
    pairs = [
        STSPair("A man  sings.", "a person sings", 5.0),  # a query and its positive
        STSPair("A man sings", "Nobody SINGS!", 1.0),
        STSPair("The dogs bowl is red", "A cat sleeps", 0.0),
        STSPair("Rain", "The dog's bowl is red.", 0.0),
    ]
    assert sick.overlap(triples, pairs) == {
        "sentences": 8,
        "in_the_triples_as_they_stand": 1,
        "in_the_triples_without_case_and_punctuation": 5,
        "pairs": 4,
        "pairs_with_a_sentence_in_the_triples": 3,
        "pairs_that_are_a_query_and_its_positive": 1,
    }
    assert sick.unseen(triples, pairs).tolist() == [False, False, True, False]


def flags_of(sick, start, tmp_path):
    """The recipe that recipes/supervised.py makes of the flags, and the stage of the small recipe."""
    small = runpy.run_path(str(ROOT / "recipes" / "llm2vec_smollm2.py"))["RECIPE"]
    plain = as_dict(replace(small, supervised=SupervisedStage()))["supervised"]
    stage = sick.settings(as_dict(small)["supervised"], plain, "supervised")
    base = {"model": "a-decoder", "pool_bos": True, "bos_token": "<|endoftext|>"}
    flags = sick.command(start, tmp_path, base, stage, tmp_path / "triples.jsonl")
    recipe = runpy.run_path(str(ROOT / "recipes" / "supervised.py"))["RECIPE"]
    return parse_arguments(recipe, None, flags)[0], small.supervised


def test_every_start_gets_the_small_recipes_stage(sick, tmp_path):
    uni, mntp, simcse = (flags_of(sick, start, tmp_path) for start in sick.STARTS)
    for (recipe, expected), causal, pooling in (
        (uni, True, "weighted_mean"),
        (mntp, False, "mean"),
        (simcse, False, "mean"),
    ):
        assert recipe.supervised == replace(expected, causal=causal, pooling=pooling, save_every=0)
    assert (uni[0].model, uni[0].adapters, uni[0].bos_token, uni[0].pool_bos) == (
        "a-decoder",
        (),
        "<|endoftext|>",
        True,
    )
    assert mntp[0].model == "a-decoder" and mntp[0].adapters == (str(tmp_path / "mntp"),) and mntp[0].pool_bos is True
    assert (simcse[0].model, simcse[0].adapters, simcse[0].pool_bos) == (str(tmp_path), (), None)  # as its folder says


def test_settings_name_what_differs(sick):
    default = {"rate": 1.0, "inner": {"rank": 4, "on": True}, "dims": [], "epochs": 3}
    stage = {"rate": 2.0, "inner": {"rank": 4, "on": False}, "dims": [64, 32], "epochs": None}
    assert sick.settings(stage, default, "s") == ["s.rate=2.0", "s.inner.on=False", "s.dims=64,32", "s.epochs=None"]


def test_missing_files_are_named(sick, tmp_path, capsys):
    with pytest.raises(SystemExit):
        sick.main(["--base", str(tmp_path / "run"), "--sick", str(tmp_path)])
    assert "run.json: not there" in capsys.readouterr().err
