"""The model card: what it says, that its code runs, and that nobody else's README.md is lost."""

import json
import os
import re
import shutil
import warnings
from dataclasses import replace

import numpy as np
import pytest
import yaml

from bivec import Encoder
from bivec.engine.encoder_config import EncoderConfig
from bivec.engine.errors import BivecError, ConfigError, RunError
from bivec.engine.export import rewrite_card
from bivec.engine.model_card import ModelCard, card_of_run, is_ours
from bivec.engine.origin import Origin

TEXTS = ["A man plays the guitar.", "Someone makes music."]
LIBRARIES = ["bivec", "sentence_transformers", "transformers"]
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)


def front_matter(text):
    return yaml.safe_load(text.split("---\n")[1])


def save(encoder, folder, **options):
    encoder.save_pretrained(folder, **options)
    return (folder / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"pool_bos": False},
        {"pooling": "weighted_mean"},
        {"pooling": "last_token"},
        {"pooling": "eos_token"},
        {"template": "query:\n{text}"},
        {"template": "query:\n{text}", "pool_bos": False, "normalize": True},
        {"template": "query:\n{text}", "skip_instruction": False},
        {"template": "query:\n{text}", "pooling": "last_token"},
        {"template": "[INST] {text} [/INST]"},
        {"template": "[INST] {text} [/INST]", "pool_tail": False},
        {"template": "[INST] {text} [/INST]", "pooling": "weighted_mean"},
    ],
    ids=str,
)
def test_its_code_runs_and_gives_our_vectors(settings, tiny_llama_dir, tmp_path, monkeypatch):
    base = Encoder.from_pretrained(tiny_llama_dir)
    encoder = Encoder(base.model, base.tokenizer, EncoderConfig(**settings))
    said = settings.get("template", "{text}").endswith("{text}")  # what sentence-transformers can say
    with warnings.catch_warnings():
        warnings.simplefilter("error" if said else "ignore")
        card = save(encoder, tmp_path / "my-encoder")
    assert ("is a default prompt, which sentence-transformers alone puts before texts" in card) == (
        said and "template" in settings
    )
    blocks = BLOCK.findall(card)
    monkeypatch.chdir(tmp_path)
    done = []
    for block in blocks:
        if "vllm" in block:  # needs a GPU
            compile(block, "README.md", "exec")
            continue
        names = {}
        exec(block, names)
        if "from sentence_transformers " in block and not said:
            continue
        np.testing.assert_allclose(np.asarray(names["vectors"]), encoder.encode(TEXTS), rtol=0, atol=1e-4)
        done.append(next(name for name in LIBRARIES if f"from {name} " in block))
    assert done == [name for name in LIBRARIES if said or name != "sentence_transformers"]


def test_its_code_where_the_attention_scores_are_capped(tiny_dir, tmp_path, monkeypatch):
    """transformers before 5.21 leaves the cap out under "sdpa", which it would take by itself."""
    encoder = Encoder.from_pretrained(tiny_dir("gemma2"))
    blocks = BLOCK.findall(save(encoder, tmp_path / "my-encoder"))
    monkeypatch.chdir(tmp_path)
    for library in LIBRARIES:
        names = {}
        exec(next(block for block in blocks if f"from {library} " in block), names)
        np.testing.assert_allclose(np.asarray(names["vectors"]), encoder.encode(TEXTS), rtol=0, atol=1e-4)
    assert names["model"].config._attn_implementation == "eager"  # of the last, transformers


def test_what_it_says_of_an_encoder(tiny_llama_dir, tmp_path):
    base = Encoder.from_pretrained(tiny_llama_dir)
    origin = Origin("mistralai/Mistral-7B-Instruct-v0.2")
    config = EncoderConfig(max_length=77, pooling="last_token")
    text = save(Encoder(base.model, base.tokenizer, config, origin=origin), tmp_path / "m")
    fields = front_matter(text)
    assert fields["library_name"] == "sentence-transformers" and fields["pipeline_tag"] == "sentence-similarity"
    assert fields["base_model"] == "mistralai/Mistral-7B-Instruct-v0.2" and fields["license"] == "apache-2.0"
    assert {"sentence-transformers", "feature-extraction", "bivec"} <= set(fields["tags"])
    for row in ("| attention | bidirectional |", "| pooling | last_token |", "| longest text | 77 tokens |"):
        assert row in text
    for command in (
        'LLM(model="m", runner="pooling")',
        "text-embeddings-router --model-id m --pooling last-token",
        "llama-embedding -m m.gguf --pooling last --attention non-causal",
    ):
        assert command in text
    causal = Encoder(base.model, base.tokenizer, EncoderConfig(causal=True, pooling="weighted_mean"))
    text = save(causal, tmp_path / "c")
    assert "| attention | causal |" in text and "non-causal" not in text
    assert "llama-embedding" not in text and "text-embeddings-router" not in text  # they have no such pooling
    fields = front_matter(text)
    assert "license" not in fields and "base_model" not in fields and "see the base model" in text


def test_a_local_base_is_named_without_its_path(tiny_llama_dir, tmp_path):
    text = save(Encoder.from_pretrained(tiny_llama_dir), tmp_path / "m")
    assert "| base model | llama |" in text and os.sep + "tmp" not in text and str(tmp_path) not in text
    assert "base_model" not in front_matter(text)
    text = save(Encoder.from_pretrained(tiny_llama_dir), tmp_path / "n", card=ModelCard(licence="mit", recipe="mine"))
    assert front_matter(text)["license"] == "mit" and "# mine" in text


def test_a_readme_of_somebody_else_stays(tiny_llama_dir, tmp_path):
    encoder = Encoder.from_pretrained(tiny_llama_dir)
    save(encoder, tmp_path / "m")
    file = tmp_path / "m" / "README.md"
    assert is_ours(file)
    file.write_text(file.read_text(encoding="utf-8") + "edited\n", encoding="utf-8")
    assert "edited" not in save(encoder, tmp_path / "m")  # ours may be written again
    file.write_text("mine", encoding="utf-8")
    assert save(encoder, tmp_path / "m") == "mine"
    rewrite_card(tmp_path / "m", ModelCard(recipe="other"))
    assert file.read_text(encoding="utf-8") == "mine"
    file.unlink()
    rewrite_card(tmp_path / "m", ModelCard(recipe="other"))
    assert "# other" in file.read_text(encoding="utf-8")


def test_a_card_of_a_folder_that_is_not_ours(tiny_llama_dir, tmp_path):
    for content, message in (("", "no such file"), ("{", "not a JSON file"), ("{}", "not an encoder that")):
        shutil.copytree(tiny_llama_dir, tmp_path / "m", dirs_exist_ok=True)
        if content:
            (tmp_path / "m" / "bivec_config.json").write_text(content)
        with pytest.raises(ConfigError, match=rf"bivec_config\.json: .*{message}"):
            rewrite_card(tmp_path / "m", ModelCard())
    with pytest.raises(BivecError, match="nowhere"):
        rewrite_card(tmp_path / "nowhere", ModelCard())


def test_what_would_break_a_table(tiny_llama_dir, tmp_path):
    base = Encoder.from_pretrained(tiny_llama_dir)
    encoder = Encoder(base.model, base.tokenizer, EncoderConfig(template="a|b {text}"))
    card = ModelCard(licence="other: mine", hyperparameters={"mntp": {"x": "p|q"}})
    text = save(encoder, tmp_path / "m", card=card)
    assert r'| template | `"a\|b {text}"` |' in text and r"| x | p\|q |" in text
    assert front_matter(text)["license"] == "other: mine"


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"recipe": {"stages": ["mntp"]}}'])
def test_a_run_file_that_is_none(content, tmp_path):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(RunError, match=r"run\.json: not a file of a run"):
        card_of_run(tmp_path)


def test_a_run_that_was_not_evaluated_has_no_table(tiny_llama_dir, tmp_path):
    recipe = {"name": "tiny", "stages": ["bi", "mntp"], "mntp_data": "texts/m.txt", "mntp": {"batch_size": 3}}
    versions = {"bivec": "1", "torch": "2", "transformers": "5"}
    (tmp_path / "run.json").write_text(json.dumps({"recipe": recipe, "versions": versions}))
    card = card_of_run(tmp_path)
    expected = ModelCard(data={"mntp": "m.txt"}, hyperparameters={"mntp": {"batch_size": 3}}, recipe="tiny")
    assert card == replace(expected, results=[], versions=versions)
    text = save(Encoder.from_pretrained(tiny_llama_dir), tmp_path / "m", card=card)
    assert "## Training" in text and "| batch_size | 3 |" in text and "## Results" not in text


def test_a_stage_of_which_only_the_data_are_known(tiny_llama_dir, tmp_path):
    card = ModelCard(data={"mntp": "wiki"}, hyperparameters={"simcse": {"scale": 20.0}, "supervised": {}})
    text = save(Encoder.from_pretrained(tiny_llama_dir), tmp_path / "m", card=card)
    _, training = text.split("## Training\n")
    training, _ = training.split("\n\n## ") if "\n\n## " in training else (training, "")
    table = "| setting | value |\n|---|---|\n| scale | 20.0 |"
    assert training.strip() == f"### mntp\n\nData: wiki.\n\n### simcse\n\n{table}\n\n### supervised"


def test_no_differences_have_no_heading(tiny_llama_dir, tmp_path):
    """Of a folder of which none are recorded."""
    heading = "## Where other libraries differ from bivec"
    assert heading in save(Encoder.from_pretrained(tiny_llama_dir), tmp_path / "m")
    file = tmp_path / "m" / "bivec_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"differences_elsewhere": []}))
    rewrite_card(tmp_path / "m", ModelCard(recipe="other"))
    text = (tmp_path / "m" / "README.md").read_text(encoding="utf-8")
    assert "# other" in text and heading not in text and "\n\n\n" not in text
