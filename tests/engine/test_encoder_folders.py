"""Folders of encoders: what is saved and read again, adapters, and the settings files of other libraries."""

import json
import shutil

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from bivec.engine.encoder import Encoder
from bivec.engine.encoder_config import EncoderConfig
from bivec.engine.errors import BivecError, CheckpointError, ConfigError
from bivec.engine.lora import LoraConfig, add_lora
from bivec.models import load_pretrained

TEXTS = [
    "A lobster is blue.",
    "",
    "The red colour only appears after cooking, which takes some time and a large pot of boiling salted water.",
    "In 1648 the Treaty of Westphalia ended the war; about 8,000,000 people had died by then, most of them of hunger.",
    "x",
    "Naïve café — 你好 🙂",
]
both = pytest.mark.parametrize("family", ["llama", "mistral"])


@pytest.fixture
def directory(request, family):
    return request.getfixturevalue(f"tiny_{family}_dir")


@pytest.fixture
def llama(tiny_llama_dir):
    return Encoder.from_pretrained(tiny_llama_dir)


def configured(encoder, **settings):
    return Encoder(encoder.model, encoder.tokenizer, EncoderConfig(**settings))


def close(one, other, tolerance=1e-5):
    np.testing.assert_allclose(np.asarray(one), np.asarray(other), rtol=0, atol=tolerance)


def transformers_mean(directory, texts):
    """Plain mean pooling over a padded batch: what any other library does with the directory."""
    from transformers import AutoModel, AutoTokenizer

    # the switch keeps transformers from asking the hub which regular expression a Mistral tokenizer ought to have
    tokenizer = AutoTokenizer.from_pretrained(directory, fix_mistral_regex=False)
    model = AutoModel.from_pretrained(directory, dtype=torch.float32).eval()
    encoded = tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        hidden = model(**encoded).last_hidden_state
    mask = encoded.attention_mask.unsqueeze(-1)
    return (hidden * mask).sum(1) / mask.sum(1)


@both
@pytest.mark.parametrize("causal", [False, True])
def test_transformers_gives_our_vectors(directory, causal, tmp_path):
    encoder = Encoder.from_pretrained(directory, causal=causal)
    vectors = encoder.encode(TEXTS)
    encoder.save_pretrained(tmp_path / "merged")
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["is_causal"] is causal
    close(transformers_mean(tmp_path / "merged", TEXTS), vectors, 1e-4)


def test_round_trip(tiny_llama_dir, tmp_path):
    settings = {"pooling": "weighted_mean", "pool_bos": False, "max_length": 30, "template": "[INST] {text} [/INST]"}
    encoder = Encoder.from_pretrained(tiny_llama_dir, **settings)
    vectors = encoder.encode(TEXTS, instruction="Find:")
    encoder.save_pretrained(tmp_path / "run" / "merged")
    for path in (tmp_path / "run" / "merged", str(tmp_path / "run")):  # a run directory stands for its merged/
        again = Encoder.from_pretrained(path)
        assert again.config == encoder.config
        close(again.encode(TEXTS, instruction="Find:"), vectors, 0)
    assert Encoder.from_pretrained(tmp_path / "run", pooling="mean", causal=True).config == EncoderConfig(
        **{**settings, "pooling": "mean", "causal": True}
    )
    # the truncation of encode() is ours: in tokenizer.json it would cut everybody's texts
    assert Tokenizer.from_file(str(tmp_path / "run" / "merged" / "tokenizer.json")).truncation is None


def test_save_is_atomic(llama, tmp_path, monkeypatch):
    target = tmp_path / "model"
    llama.save_pretrained(target)
    (target / "README.md").write_text("mine")
    before = {file.name: file.read_bytes() for file in target.rglob("*") if file.is_file()}

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(type(llama.tokenizer), "save_pretrained", full)
        for path in (target, tmp_path / "new"):
            with pytest.raises(CheckpointError, match="disk is full"):
                configured(llama, max_length=9).save_pretrained(path)
    assert {file.name: file.read_bytes() for file in target.rglob("*") if file.is_file()} == before
    assert [item.name for item in tmp_path.iterdir()] == ["model"]
    configured(llama, max_length=9).save_pretrained(target)
    assert Encoder.from_pretrained(target).config.max_length == 9
    assert (target / "README.md").read_text() == "mine"


def test_adapters_are_merged_in_order(tiny_llama_dir, tmp_path):
    model = load_pretrained(tiny_llama_dir).model
    for number in (1, 2):
        adapter = add_lora(model, LoraConfig(rank=2), seed=number)
        for parameter in adapter.named_parameters().values():
            parameter.data.normal_(std=0.05, generator=torch.Generator().manual_seed(number))
        adapter.save(tmp_path / str(number), "tiny")
        adapter.merge()
    plain = Encoder.from_pretrained(tiny_llama_dir)
    merged = Encoder.from_pretrained(tiny_llama_dir, adapters=[tmp_path / "1", tmp_path / "2"])
    expected = Encoder(model, plain.tokenizer).encode(TEXTS)
    close(merged.encode(TEXTS), expected)
    assert np.abs(plain.encode(TEXTS) - expected).max() > 1e-2


def foreign(tiny_llama_dir, folder, **files):
    """The tiny model with other libraries' settings files; double underscores stand for a slash."""
    shutil.copytree(tiny_llama_dir, folder)
    for name, content in files.items():
        file = folder / (name.replace("__", "/") + ".json")
        file.parent.mkdir(exist_ok=True)
        file.write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
]
DENSE = [*MODULES, {"idx": 3, "name": "3", "path": "3_Dense", "type": "sentence_transformers.models.Dense"}]


def flags(*modes, **others):
    every = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
    return {"word_embedding_dimension": 64, **{f"pooling_mode_{mode}": mode in modes for mode in every}, **others}


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("mean_tokens", "mean"),
        ("weightedmean_tokens", "weighted_mean"),
        ("lasttoken", "last_token"),
        ("cls_token", "bos_token"),
    ],
)
def test_sentence_transformers_folders(tiny_llama_dir, tmp_path, mode, expected):
    files = {"modules": MODULES, "1_Pooling__config": flags(mode), "sentence_bert_config": {"max_seq_length": 77}}
    folder = foreign(tiny_llama_dir, tmp_path / "st", **files)
    encoder = Encoder.from_pretrained(folder)
    # sentence-transformers pools a prompt too unless include_prompt is false, and runs a decoder as config.json says
    expected_config = EncoderConfig(
        pooling=expected, max_length=77, skip_instruction=False, causal=True, normalize=True
    )
    assert encoder.config == expected_config
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"is_causal": False}))
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(flags(mode, include_prompt=False)))
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": null}')
    assert Encoder.from_pretrained(folder).config == EncoderConfig(pooling=expected, normalize=True)
    chosen = Encoder.from_pretrained(folder, pooling="mean", max_length=5)
    assert chosen.config == EncoderConfig(max_length=5, normalize=True)


def test_newer_sentence_transformers_name_the_mode(tiny_llama_dir, tmp_path):
    pooling = {"embedding_dimension": 64, "pooling_mode": "lasttoken", "include_prompt": True}
    folder = foreign(tiny_llama_dir, tmp_path / "st", **{"modules": MODULES, "1_Pooling__config": pooling})
    assert Encoder.from_pretrained(folder).config.pooling == "last_token"


def test_llm2vec_folders(tiny_llama_dir, tmp_path):
    stored = {"pooling_mode": "weighted_mean", "max_length": 128, "doc_max_length": 400, "skip_instruction": True}
    folder = foreign(tiny_llama_dir, tmp_path / "l2v", llm2vec_config=stored)
    expected = EncoderConfig(pooling="weighted_mean", pool_bos=False, max_length=128)
    assert Encoder.from_pretrained(folder).config == expected
    (folder / "llm2vec_config.json").write_text('{"skip_instruction": false}')
    assert Encoder.from_pretrained(folder).config == EncoderConfig(skip_instruction=False)
    # our own file counts first
    (folder / "bivec_config.json").write_text('{"max_length": 33}')
    assert Encoder.from_pretrained(folder).config == EncoderConfig(max_length=33)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"bivec_config": "{"}, r"bivec_config\.json: not a JSON file"),
        ({"bivec_config": "[]"}, r"bivec_config\.json: expected a JSON object, found list"),
        ({"bivec_config": {"polling": "mean"}}, r"bivec_config\.json: unknown field 'polling'"),
        ({"llm2vec_config": {"pooling_mode": "latent"}}, r"llm2vec_config\.json: pooling 'latent' is unknown"),
        ({"modules": MODULES}, r"1_Pooling.config\.json: no such file"),
        ({"modules": MODULES, "1_Pooling__config": flags("max_tokens")}, "pooling max_tokens is not supported"),
        (
            {"modules": MODULES, "1_Pooling__config": flags("mean_tokens", "cls_token")},
            r"pooling cls_token \+ mean_tokens is not supported",
        ),
        ({"modules": DENSE}, r"modules\.json: module 'Dense' is not supported"),
        ({"modules": [{"name": "0"}]}, r"modules\.json: every module needs a type and a path"),
    ],
)
def test_settings_that_cannot_be_used(tiny_llama_dir, tmp_path, files, message):
    with pytest.raises(ConfigError, match=message):
        Encoder.from_pretrained(foreign(tiny_llama_dir, tmp_path / "folder", **files))


def test_nothing_there(tmp_path):
    with pytest.raises(BivecError, match="nowhere"):
        Encoder.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(BivecError, match=r"config\.json"):
        Encoder.from_pretrained(tmp_path)
