"""What a run leaves in merged/ beside the weights: a folder for other libraries, its card and its record."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import yaml

from bivec import Encoder
from bivec.engine.errors import CheckpointError

TEXTS = ["A lobster is blue.", "The red colour only appears after cooking, which takes some time.", "x"]


def test_merged(recipe, execute, tmp_path):
    from sentence_transformers import SentenceTransformer

    run = tmp_path / "run"
    execute(recipe, run, "--stages", "bi,mntp,simcse,supervised")
    text = (run / "merged" / "README.md").read_text(encoding="utf-8")
    fields = yaml.safe_load(text.split("---\n")[1])
    assert fields["library_name"] == "sentence-transformers"
    assert "# tiny\n" in text and "| base model | llama |" in text and str(tmp_path) not in text
    assert "Data: mntp.txt (" in text and "Data: simcse.txt (" in text and "Data: triples.jsonl (" in text
    assert "| optim.learning_rate | 0.01 |" in text and "| lora.rank | 4 |" in text and "save_every" not in text
    stages = json.loads((run / "results.json").read_text())["stages"]
    for stage in stages:
        scores = f"{stage['sts_dev_spearman']:.1f} | {stage['sts_test_spearman']:.1f}"
        assert f"| {stage['stage']} | {stage['pooling']} | {scores} |" in text
    encoder = Encoder.from_pretrained(run)
    assert encoder.config.pool_bos is False
    model = SentenceTransformer(str(run / "merged"), device="cpu")
    np.testing.assert_allclose(model.encode(TEXTS), encoder.encode(TEXTS), rtol=0, atol=1e-4)
    assert [one.name for one in encoder.origin.adapters] == ["mntp", "simcse", "supervised"]
    for name in ("mntp", "simcse", "supervised"):
        with pytest.raises(CheckpointError, match=f"is in the weights already: {name} was merged"):
            Encoder.from_pretrained(run, adapters=[run / name])
    # the adapters on the decoder, in their order, are the same encoder
    adapters = [run / name for name in ("mntp", "simcse", "supervised")]
    again = Encoder.from_pretrained(recipe.model, adapters=adapters)
    assert again.config == encoder.config
    np.testing.assert_allclose(again.encode(TEXTS), encoder.encode(TEXTS), rtol=0, atol=1e-4)
    assert again.origin.adapters == encoder.origin.adapters


def test_a_stage_that_trained_all_weights(recipe, execute, tmp_path):
    """Its folder is an encoder of its own, and the next stage's adapter goes onto it."""
    run = tmp_path / "run"
    execute(recipe, run, "--stages", "bi,mntp,simcse", "--set", "mntp.tuning=full")
    whole, mntp = Encoder.from_pretrained(run), Encoder.from_pretrained(run / "mntp")
    assert mntp.config == whole.config and mntp.config.pool_bos is False and mntp.origin.base_model == "llama"
    both = Encoder.from_pretrained(run / "mntp", adapters=[run / "simcse"])
    assert both.config == whole.config
    np.testing.assert_allclose(both.encode(TEXTS), whole.encode(TEXTS), rtol=0, atol=1e-4)
    assert [(one.name, one.whole) for one in whole.origin.adapters] == [("mntp", True), ("simcse", False)]
    assert "In the weights, in this order: mntp (all weights), simcse." in (run / "merged" / "README.md").read_text()
    for model, adapters in ((recipe.model, [run / "simcse"]), (run / "simcse", [])):
        with pytest.raises(CheckpointError, match="trained on weights that hold mntp") as error:
            Encoder.from_pretrained(model, adapters=adapters)
        assert f"Encoder.from_pretrained('{run / 'mntp'}', adapters=['{run / 'simcse'}'])" in str(error.value)
    shutil.copytree(run / "mntp", tmp_path / "copy")
    copied = Encoder.from_pretrained(tmp_path / "copy", adapters=[run / "simcse"])
    np.testing.assert_allclose(copied.encode(TEXTS), whole.encode(TEXTS), rtol=0, atol=1e-4)


def test_the_bos_of_training_goes_with_an_adapter(recipe, execute, tmp_path):
    """A decoder whose tokenizer adds none gets one here; who opens the adapter has it too."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    decoder, run = tmp_path / "decoder", tmp_path / "run"
    shutil.copytree(recipe.model, decoder)
    tokenizer = AutoTokenizer.from_pretrained(decoder)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A", special_tokens=[])
    tokenizer.save_pretrained(decoder)
    execute(replace(recipe, model=str(decoder)), run, "--stages", "bi,simcse")
    whole = Encoder.from_pretrained(run)
    assert whole.tokenizer("x").input_ids[0] == 0
    for encoder in (
        Encoder.from_pretrained(run / "simcse"),
        Encoder.from_pretrained(decoder, adapters=[run / "simcse"]),
    ):
        assert encoder.tokenizer(TEXTS).input_ids == whole.tokenizer(TEXTS).input_ids
        assert encoder.config == whole.config
        np.testing.assert_allclose(encoder.encode(TEXTS), whole.encode(TEXTS), rtol=0, atol=1e-4)


def test_training_on_keeps_what_no_recipe_says(recipe, execute, tmp_path):
    """Somebody's encoder: its tokenizer without a BOS, unit vectors, prompts, length; and its adapter is its own."""
    from tokenizers.processors import TemplateProcessing

    from bivec.engine.encoder_config import EncoderConfig
    from bivec.engine.tokenizer import load_tokenizer

    base = Encoder.from_pretrained(recipe.model)
    base.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A", special_tokens=[])
    config = EncoderConfig(normalize=True, similarity="dot", max_length=77, skip_instruction=False)
    given = Encoder(base.model, base.tokenizer, config, prompts={"q": "Q:"})
    given.save_pretrained(tmp_path / "theirs")
    run = tmp_path / "run"
    execute(replace(recipe, model=str(tmp_path / "theirs")), run, "--stages", "bi,simcse")
    trained = Encoder.from_pretrained(run)
    assert trained.config == config and trained.prompts == {"q": "Q:"}
    assert trained.tokenizer("x").input_ids == load_tokenizer(recipe.model)("x").input_ids[1:]
    again = Encoder.from_pretrained(tmp_path / "theirs", adapters=[run / "simcse"])
    assert replace(again.config, pool_bos=True) == config  # nothing is in front, pooled or not
    np.testing.assert_allclose(again.encode(TEXTS), trained.encode(TEXTS), rtol=0, atol=1e-4)


def test_an_adapter_of_the_recipe_that_does_not_fit(recipe, execute, fails, tmp_path):
    """One that is in the weights already, or belongs on others, is told of before anything is trained."""
    run, target = tmp_path / "run", tmp_path / "other"
    execute(recipe, run, "--stages", "bi,mntp,simcse")
    flags = ("--stages", "bi,simcse", "--adapters")
    error = fails(replace(recipe, model=str(run)), target, *flags, run / "mntp")
    assert "is in the weights already: mntp was merged" in error
    error = fails(recipe, target, *flags, run / "simcse")
    assert "was trained on weights that hold mntp" in error and not target.exists()


def test_a_run_that_clips_no_gradient_ends_and_goes_on(execute, recipe, tmp_path):
    """Its run.json holds an Infinity, which is no plain JSON."""
    flags = ["--stages", "bi,simcse", "--set", "simcse.optim.max_grad_norm=inf"]
    execute(recipe, tmp_path / "run", *flags)
    assert "Infinity" in (tmp_path / "run" / "run.json").read_text()
    assert (tmp_path / "run" / "merged" / "README.md").is_file()
    execute(recipe, tmp_path / "run", *flags, "--resume")
