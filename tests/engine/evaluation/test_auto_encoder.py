"""Encoder-only models: MiniLM against sentence-transformers, DeBERTa and RoBERTa by code on random weights."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from bivec.engine.errors import CheckpointError, ConfigError
from bivec.engine.evaluation import sts_spearman
from bivec.engine.evaluation.auto_encoder import MINILM_INSTALL, AutoEncoder, find_minilm

TEXTS = [
    "A man is playing a guitar.",
    "",
    "Zwölf Boxkämpfer jagen Viktor über den Sylter Deich. " * 40,
    "x",
]


@pytest.fixture(scope="module")
def minilm():
    try:
        return AutoEncoder.from_pretrained(find_minilm())
    except CheckpointError as error:
        pytest.skip(str(error))


def random_model(folder, tokenizer_dir, config):
    import transformers

    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(tokenizer_dir)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.AutoModel.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


SHAPE = {
    "vocab_size": 1000,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "pad_token_id": 1,
    "initializer_range": 0.2,
}


@pytest.fixture(scope="module")
def deberta_dir(tmp_path_factory, tiny_llama_dir):
    """DeBERTa-v3's options: disentangled attention, shared keys, buckets of log distance; with dropout to be off."""
    from transformers import DebertaV2Config

    config = DebertaV2Config(
        **SHAPE,
        max_position_embeddings=64,
        relative_attention=True,
        position_buckets=16,
        pos_att_type=["p2c", "c2p"],
        share_att_key=True,
        norm_rel_ebd="layer_norm",
        position_biased_input=False,
        type_vocab_size=0,
        hidden_dropout_prob=0.5,
        attention_probs_dropout_prob=0.5,
    )
    return random_model(tmp_path_factory.mktemp("deberta") / "model", tiny_llama_dir, config)


@pytest.fixture(scope="module")
def deberta(deberta_dir):
    return AutoEncoder.from_pretrained(deberta_dir)


def test_minilm_is_what_sentence_transformers_gives(minilm):
    from sentence_transformers import SentenceTransformer

    theirs = SentenceTransformer(str(find_minilm()), device="cpu")
    expected = theirs.encode(TEXTS, normalize_embeddings=True)
    assert (minilm.config.max_length, minilm.config.pooling, minilm.dimension) == (256, "mean", 384)
    np.testing.assert_allclose(minilm.encode(TEXTS, normalize_embeddings=True), expected, atol=1e-5)
    prompted = theirs.encode(TEXTS[:1], prompt="Represent this: ", normalize_embeddings=True)
    ours = minilm.encode(TEXTS[:1], instruction="Represent this:", normalize_embeddings=True)
    np.testing.assert_allclose(ours, prompted, atol=1e-5)


def test_minilm_is_a_good_encoder(minilm):
    from pathlib import Path

    from bivec.engine.data import load_sts

    pairs = load_sts(Path(__file__).parents[3] / "recipes" / "data" / "stsb_dev.csv.gz")[:100]
    assert sts_spearman(minilm.encode, pairs) > 80  # its card says 82 to 87 on STS-B


def test_hidden_states_are_transformers_row_by_row(deberta):
    rows = [[0, 5, 6, 7], [0, 9], [0, 11, 12, 13, 14, 15, 16]]
    seen = {}
    for hidden, cu_seqlens, indices in deberta.hidden_states(rows, tokens_per_batch=14):
        assert cu_seqlens.dtype == torch.int32
        assert len(indices) * max(len(rows[i]) for i in indices) <= 14
        seen |= dict(zip(indices, hidden.split(cu_seqlens.diff().tolist()), strict=True))
    assert list(seen) == [2, 0, 1]  # longest first
    for i, row in enumerate(rows):
        with torch.no_grad():
            expected = deberta.model(input_ids=torch.tensor([row])).last_hidden_state[0]
        torch.testing.assert_close(seen[i], expected, atol=1e-5, rtol=0)


def test_batch_order_and_budget_change_nothing(deberta):
    texts = [text for text in TEXTS if len(text) < 100] + [f"The {n} sentence of these. " * n for n in range(1, 5)]
    together = deberta.encode(texts)
    assert np.abs(together - together[0]).max(axis=1)[1:].min() > 1e-2  # the model is no constant
    np.testing.assert_allclose(deberta.encode(texts[::-1], batch_size=2)[::-1], together, atol=1e-5)
    np.testing.assert_allclose(deberta.encode(texts, tokens_per_batch=1), together, atol=1e-5)


def test_no_dropout_and_both_directions(deberta):
    one = deberta.encode_tokens("a cold grey morning")
    assert torch.equal(one, deberta.encode_tokens("a cold grey morning"))
    other = deberta.encode_tokens("a cold grey evening")
    assert not torch.allclose(one[1], other[1], atol=1e-3)


@pytest.mark.parametrize("pooling", ["mean", "weighted_mean", "bos_token", "last_token"])
def test_poolings(deberta_dir, pooling):
    encoder = AutoEncoder.from_pretrained(deberta_dir, pooling=pooling, max_length=16)
    states = encoder.encode_tokens("the whole of it")
    weights = torch.arange(1.0, len(states) + 1)
    expected = {
        "mean": states.mean(0),
        "weighted_mean": (states * weights[:, None]).sum(0) / weights.sum(),
        "bos_token": states[0],
        "last_token": states[-1],
    }[pooling]
    np.testing.assert_allclose(encoder.encode("the whole of it"), expected.numpy(), atol=1e-5)


def test_roberta_has_fewer_positions_than_its_table(tmp_path, tiny_llama_dir):
    """Position ids begin behind the padding id: of 32 rows 30 are left, and the 31st token would be out of range."""
    from transformers import RobertaConfig

    config = RobertaConfig(**SHAPE, max_position_embeddings=32, bos_token_id=0, eos_token_id=1)
    folder = random_model(tmp_path / "roberta", tiny_llama_dir, config)
    encoder = AutoEncoder.from_pretrained(folder)
    assert encoder.config.max_length == 30
    assert np.isfinite(encoder.encode("many words, " * 50)).all()
    with pytest.raises(ConfigError, match="max_length 31 exceeds the 30 positions"):
        AutoEncoder.from_pretrained(folder, max_length=31)


def test_what_cannot_be_loaded(tmp_path, deberta_dir, tiny_llama_dir):
    import shutil

    from safetensors.torch import load_file, save_file

    with pytest.raises(ConfigError, match="llama is no encoder-only model"):
        AutoEncoder.from_pretrained(tiny_llama_dir)
    broken = tmp_path / "broken"
    shutil.copytree(deberta_dir, broken)
    # copies: older safetensors map the file, which is overwritten below
    weights = {name: tensor.clone() for name, tensor in load_file(broken / "model.safetensors").items()}
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 weights of the model are missing, first encoder\.layer\.1"):
        AutoEncoder.from_pretrained(broken)
    torch.save(weights, broken / "pytorch_model.bin")
    (broken / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="convert the weights to safetensors"):
        AutoEncoder.from_pretrained(broken)


def test_code_of_a_repository_is_not_run(tmp_path, deberta_dir):
    import shutil

    folder = tmp_path / "remote"
    shutil.copytree(deberta_dir, folder)
    (folder / "evil.py").write_text("open('was_run', 'w')\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "unheard-of", "auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="transformers cannot load it"):
        AutoEncoder.from_pretrained(folder)


def test_minilm_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match=MINILM_INSTALL):
        find_minilm()


def test_it_is_not_saved_as_a_decoder(deberta, tmp_path):
    for options in ({}, {"normalize": True}):
        with pytest.raises(ConfigError, match=r"use encoder\.model\.save_pretrained"):
            deberta.save_pretrained(tmp_path / "x", **options)
    assert not (tmp_path / "x").exists()
