"""The variants of a run score as the run itself said, also where a stage was causal or trained all weights."""

import json
from dataclasses import replace

import numpy as np
import pytest

from bivec.engine.data import load_sts
from bivec.engine.encoder import Encoder
from bivec.engine.errors import ConfigError, RunError
from bivec.engine.evaluation import sts_spearman
from bivec.engine.evaluation.variants import decoder_variants, named_variants, run_variants
from bivec.engine.evaluation.word_tasks import read_as_paper
from bivec.engine.recipe import SimcseStage
from bivec.models import PackedBatch


def results(directory):
    return json.loads((directory / "results.json").read_text())["stages"]


def check_scores(directory, recipe):
    pairs = load_sts(recipe.sts_dev)[: recipe.eval_pairs]
    by_name = {variant.name: variant for variant in run_variants(directory)}
    scored = {}
    for result in results(directory):
        encoder = by_name[result["stage"].split(" ")[0]].load(pooling=result["pooling"])
        scored[result["stage"]] = sts_spearman(encoder.encode, pairs)
        assert scored[result["stage"]] == pytest.approx(result["sts_dev_spearman"], abs=1e-6), result
    assert len({round(score, 6) for score in scored.values()}) == len(scored), "the stages make no difference to see"
    return list(by_name)


def test_variants_of_a_run(execute, recipe, tmp_path):
    execute(recipe, tmp_path, "--stages", "bi,mntp,simcse,supervised")
    names = check_scores(tmp_path, recipe)
    assert names == ["uni", "bi", "bi+mntp", "bi+mntp+simcse", "bi+mntp+simcse+supervised"]
    variants = run_variants(tmp_path)
    assert [read_as_paper(variant.name) for variant in variants] == 2 * ["same_token"] + 3 * ["next_token"]
    last = variants[-1].load().encode(["Some words.", "a"])
    np.testing.assert_allclose(last, Encoder.from_pretrained(tmp_path).encode(["Some words.", "a"]), atol=1e-5)
    assert [one.name for one in named_variants(variants, ["bi+mntp", "uni"])] == ["bi+mntp", "uni"]
    with pytest.raises(RunError, match="no variant 'bi\\+simcse', only uni, bi, bi\\+mntp"):
        named_variants(variants, ["bi+simcse"])


def test_causal_simcse(execute, recipe, tmp_path):
    """Uni+SimCSE of the paper's Table 5: trained and used with the decoder's own mask."""
    causal = replace(recipe, simcse=replace(recipe.simcse, causal=True, pooling="weighted_mean"))
    execute(causal, tmp_path, "--stages", "bi,simcse")
    last = results(tmp_path)[-1]
    assert (last["stage"], last["pooling"]) == ("uni+simcse", "weighted_mean")
    assert check_scores(tmp_path, recipe) == ["uni", "bi", "uni+simcse"]
    assert run_variants(tmp_path)[-1].load().config.pooling == "weighted_mean"
    encoder = Encoder.from_pretrained(tmp_path)
    assert encoder.config.causal and encoder.config.pooling == "weighted_mean"
    batch = PackedBatch.from_sequences([[0, 5, 6, 7], [0, 5, 6, 8]])
    hidden = encoder.model(batch, causal=encoder.config.causal)
    assert (hidden[:3] - hidden[4:7]).abs().max() < 1e-5 < (hidden[3] - hidden[7]).abs().max()


def test_the_mask_of_simcse_counts_in_training(execute, recipe, tmp_path):
    for name in ("causal", "both"):
        stage = replace(recipe.simcse, causal=name == "causal")
        execute(replace(recipe, simcse=stage), tmp_path / name, "--stages", "bi,simcse")
    first = [json.loads((tmp_path / x / "metrics.jsonl").read_text().splitlines()[0]) for x in ("causal", "both")]
    assert first[0]["loss"] != pytest.approx(first[1]["loss"], rel=1e-4)
    with pytest.raises(ConfigError, match="'eos_token': SimCSE's rows end without an EOS"):
        SimcseStage(pooling="eos_token")
    with pytest.raises(ConfigError, match="pooling is 'max'"):
        SimcseStage(pooling="max")


def test_a_run_that_goes_on_with_adapters(execute, recipe, tmp_path):
    execute(recipe, tmp_path / "first", "--stages", "bi,mntp")
    execute(recipe, tmp_path / "second", "--stages", "bi,simcse", "--adapters", tmp_path / "first" / "mntp")
    variants = run_variants(tmp_path / "second")
    assert [variant.name for variant in variants] == ["uni+mntp", "bi+mntp", "bi+mntp+simcse"]
    assert all(read_as_paper(variant.name) == "next_token" for variant in variants)
    first = run_variants(tmp_path / "first")[-1].load().encode("Some words.")
    np.testing.assert_allclose(variants[1].load().encode("Some words."), first, atol=1e-6)
    last = Encoder.from_pretrained(tmp_path / "second").encode("Some words.")
    np.testing.assert_allclose(variants[2].load().encode("Some words."), last, atol=1e-5)


def test_a_mask_that_changes_between_stages(execute, recipe, tmp_path):
    """The test set is read with the mask of each stage, and so are the variants."""
    mixed = replace(recipe, simcse=replace(recipe.simcse, causal=True))
    execute(mixed, tmp_path, "--stages", "bi,simcse,supervised")
    assert check_scores(tmp_path, recipe)[2:] == ["uni+simcse", "bi+simcse+supervised"]


def test_all_weights(execute, recipe, tmp_path):
    full = replace(recipe, simcse=replace(recipe.simcse, tuning="full"))
    execute(full, tmp_path, "--set", "simcse.optim.learning_rate=1e-3")
    assert check_scores(tmp_path, recipe) == ["uni", "bi", "bi+mntp", "bi+mntp+simcse"]
    whole = run_variants(tmp_path)[-1]
    assert whole.model == str(tmp_path / "simcse") and whole.adapters == ()


def test_the_first_token_is_pooled_as_in_the_run(execute, recipe, tmp_path):
    """pool_bos None: the run asks the model's folder, which says nothing here, and leaves the BOS out."""
    execute(replace(recipe, pool_bos=None), tmp_path, "--stages", "bi,supervised")
    check_scores(tmp_path, recipe)
    variants = run_variants(tmp_path)
    assert [variant.load().config.pool_bos for variant in variants] == [False, False, False]
    last, whole = variants[-1].load().config, Encoder.from_pretrained(tmp_path).config
    assert replace(last, max_length=whole.max_length) == whole
    (tmp_path / "merged" / "bivec_config.json").unlink()
    with pytest.raises(RunError, match="the run has not been finished"):
        run_variants(tmp_path)
    run = json.loads((tmp_path / "run.json").read_text())
    run["recipe"]["adapters"] = [1]
    (tmp_path / "run.json").write_text(json.dumps(run))
    with pytest.raises(RunError, match=r"run\.json: not the run\.json of a run of this version"):
        run_variants(tmp_path)


def test_other_places(recipe, tmp_path):
    assert run_variants(recipe.model) == decoder_variants(recipe.model)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(RunError, match=r"not the run\.json of a run of this version"):
        run_variants(tmp_path)
