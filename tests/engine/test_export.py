"""What is saved opens in sentence-transformers and transformers with no code of ours, and gives our vectors."""

import json
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer

from bivec import Encoder
from bivec.engine.cli.versions import older
from bivec.engine.encoder_config import EncoderConfig
from bivec.engine.errors import CheckpointError
from bivec.models.files import atomic_directory

TEXTS = [
    "A lobster is blue.",
    "The red colour only appears after cooking, which takes some time and a large pot of boiling salted water.",
    "x",
    "Na\u00efve caf\u00e9 \u2014 \u4f60\u597d \U0001f642",
]
EMPTY = ["", *TEXTS]
INSTRUCTION = "Find the answer:"
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text")
POOLINGS = ("mean", "weighted_mean", "last_token", "eos_token", "bos_token")


def saved(encoder, folder, **options):
    """Saves an encoder, and opens the folder with sentence-transformers; trust_remote_code is off by default."""
    from sentence_transformers import SentenceTransformer

    encoder.save_pretrained(folder, **options)
    return SentenceTransformer(str(folder), device="cpu")


def close(one, other, tolerance=1e-4):
    np.testing.assert_allclose(np.asarray(one), np.asarray(other), rtol=0, atol=tolerance)


def attention_of(folder):
    """Options that AutoModel needs: for Gemma 2, before transformers 5.21, what its model card says."""
    capped = json.loads((folder / "config.json").read_text())["model_type"] == "gemma2"
    return {"attn_implementation": "eager"} if capped and older(transformers.__version__, "5.21") else {}


def by_transformers(folder, texts, pooling):
    """Padded vectors by AutoModel and AutoTokenizer, pooled here."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    model = AutoModel.from_pretrained(folder, dtype=torch.float32, **attention_of(folder)).eval()
    with torch.no_grad():
        hidden = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
    mask = batch.attention_mask.unsqueeze(-1)
    if pooling in ("last_token", "eos_token"):
        return hidden[torch.arange(len(texts)), batch.attention_mask.sum(1) - 1]
    if pooling == "bos_token":
        return hidden[:, 0]
    weights = mask * mask.cumsum(1) if pooling == "weighted_mean" else mask
    return (hidden * weights).sum(1) / weights.sum(1)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family, causal, tiny_dir, tmp_path):
    encoder = Encoder.from_pretrained(tiny_dir(family), causal=causal)
    vectors = encoder.encode(EMPTY)
    model = saved(encoder, tmp_path / "out")
    close(model.encode(EMPTY), vectors)
    close(model.encode(EMPTY, batch_size=1), vectors)
    close(by_transformers(tmp_path / "out", EMPTY, "mean"), vectors)
    assert model.max_seq_length == 512 and model.similarity_fn_name == "cosine"
    stored = json.loads((tmp_path / "out" / "config.json").read_text())
    assert stored["is_causal"] is causal and "auto_map" not in stored
    # the mask is really the one that config.json says
    one, other = model.encode(["A lobster is blue", "A lobster is red"], output_value="token_embeddings")
    assert torch.equal(one[0], other[0]) is causal


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_every_pooling(family, pooling, causal, tiny_dir, tmp_path):
    encoder = Encoder.from_pretrained(tiny_dir(family), pooling=pooling, causal=causal)
    vectors = encoder.encode(EMPTY)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # plain texts have the same vectors: there is nothing to warn of
        model = saved(encoder, tmp_path / "out", normalize=True)
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    close(model.encode(EMPTY), units)
    close(by_transformers(tmp_path / "out", EMPTY, pooling), vectors)
    again = Encoder.from_pretrained(tmp_path / "out")
    assert again.config == replace(encoder.config, normalize=True)
    close(again.encode(EMPTY), units, 1e-6)
    close(again.encode(EMPTY, normalize_embeddings=False), vectors, 1e-6)
    # without our own file, as any other library's folder
    (tmp_path / "out" / "bivec_config.json").unlink()
    close(Encoder.from_pretrained(tmp_path / "out").encode(EMPTY), units, 1e-6)


@pytest.mark.parametrize("pooling", ["last_token", "bos_token"])
def test_an_instruction_where_one_token_is_pooled(pooling, tiny_llama_dir, tmp_path):
    encoder = Encoder.from_pretrained(tiny_llama_dir, pooling=pooling)
    model = saved(encoder, tmp_path / "out", prompts={"query": f"{INSTRUCTION} "})
    vectors = encoder.encode(TEXTS, instruction=INSTRUCTION)
    close(model.encode(TEXTS, prompt_name="query"), vectors)
    close(model.encode_query(TEXTS), vectors)
    close(model.encode_document(TEXTS), encoder.encode(TEXTS))


def test_an_instruction_that_is_pooled(tiny_llama_dir, tmp_path):
    encoder = Encoder.from_pretrained(tiny_llama_dir)
    encoder = Encoder(encoder.model, encoder.tokenizer, EncoderConfig(skip_instruction=False), prompts={"q": "Find: "})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = saved(encoder, tmp_path / "out")
    close(model.encode(TEXTS, prompt_name="q"), encoder.encode(TEXTS, instruction="Find:"))
    again = Encoder.from_pretrained(tmp_path / "out")
    assert again.prompts == {"q": "Find: "}
    close(again.encode(TEXTS, prompt_name="q"), encoder.encode(TEXTS, instruction="Find:"), 0)


def test_an_instruction_that_is_not_pooled(tiny_llama_dir, tmp_path):
    """sentence-transformers counts the space behind a prompt as a token of it; the card says so, and what helps."""
    encoder = Encoder.from_pretrained(tiny_llama_dir)
    encoder.save_pretrained(tmp_path / "quiet")  # no prompt is stored: nothing to warn of, but the card says it
    with pytest.warns(UserWarning, match="leaves out the text's first token") as caught:
        model = saved(encoder, tmp_path / "out", prompts={"query": f"{INSTRUCTION} "})
    assert caught[0].filename == __file__
    for folder in ("quiet", "out"):
        assert "leaves out the text's first token" in (tmp_path / folder / "README.md").read_text(encoding="utf-8")
        stored = json.loads((tmp_path / folder / "bivec_config.json").read_text())
        assert any("leaves out the text's first token" in line for line in stored["differences_elsewhere"])
        pooling = json.loads((tmp_path / folder / "1_Pooling" / "config.json").read_text())
        assert pooling["include_prompt"] is False
    texts = TEXTS[:2]  # before the others the space is a token of its own in this vocabulary
    vectors = encoder.encode(texts, instruction=INSTRUCTION)
    close(model.encode([" " + text for text in texts], prompt=INSTRUCTION), vectors)
    close(model.encode(TEXTS), encoder.encode(TEXTS))


@pytest.mark.parametrize("normalize", [False, True])
def test_a_bos_that_is_not_pooled(normalize, tiny_llama_dir, tmp_path):
    """The paper's recipes: the mean of the text alone, which a module of weights says there."""
    encoder = Encoder.from_pretrained(tiny_llama_dir, pool_bos=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = saved(encoder, tmp_path / "out", normalize=normalize)
    vectors = encoder.encode(TEXTS, normalize_embeddings=normalize)
    assert np.abs(vectors - Encoder.from_pretrained(tiny_llama_dir).encode(TEXTS)).max() > 1e-2
    close(model.encode(TEXTS), vectors)
    assert model.encode("").any() == False  # noqa: E712 - as the card says
    assert "an empty text gives zeros there" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert Encoder.from_pretrained(tmp_path / "out").config == replace(encoder.config, normalize=normalize)


def test_a_bos_that_counts_with_no_weight_cannot_be_said(tiny_llama_dir, tmp_path):
    encoder = Encoder.from_pretrained(tiny_llama_dir, pool_bos=False, pooling="weighted_mean")
    with pytest.warns(UserWarning, match="the BOS is pooled with weight 1 there"):
        model = saved(encoder, tmp_path / "out")
    assert np.abs(model.encode(TEXTS) - encoder.encode(TEXTS)).max() > 1e-3  # the warning is true
    close(Encoder.from_pretrained(tmp_path / "out").encode(TEXTS), encoder.encode(TEXTS), 0)


@pytest.mark.parametrize("skip", [False, True])
def test_a_template_without_a_tail_is_a_default_prompt(skip, tiny_llama_dir, tmp_path):
    base = Encoder.from_pretrained(tiny_llama_dir)
    config = EncoderConfig(template="query:\n{text}", skip_instruction=skip)
    encoder = Encoder(base.model, base.tokenizer, config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = saved(encoder, tmp_path / "out")
    assert np.abs(encoder.encode(TEXTS) - base.encode(TEXTS)).max() > 1e-2
    close(model.encode(TEXTS), encoder.encode(TEXTS))
    (tmp_path / "out" / "bivec_config.json").unlink()
    close(Encoder.from_pretrained(tmp_path / "out").encode(TEXTS), encoder.encode(TEXTS), 1e-6)


@pytest.mark.parametrize("settings", [{"template": "mistral"}, {"template": "llama-3", "pool_tail": False}])
def test_a_template_with_a_tail_cannot_be_said(settings, tiny_llama_dir, tmp_path):
    encoder = Encoder.from_pretrained(tiny_llama_dir, **settings)
    with pytest.warns(UserWarning, match="every text is put into the template"):
        model = saved(encoder, tmp_path / "out")
    assert np.abs(model.encode(TEXTS) - encoder.encode(TEXTS)).max() > 1e-2
    assert "every text is put into the template" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    again = Encoder.from_pretrained(tmp_path / "out")
    assert again.config == encoder.config
    close(again.encode(TEXTS), encoder.encode(TEXTS), 0)


@pytest.mark.parametrize("pooling", ["mean", "eos_token"])
def test_texts_longer_than_the_encoder_takes(pooling, tiny_llama_dir, tmp_path):
    encoder = Encoder.from_pretrained(tiny_llama_dir, max_length=9, pooling=pooling)
    model = saved(encoder, tmp_path / "out")
    assert model.max_seq_length == 9 and len(encoder.tokenizer(TEXTS[1]).input_ids) > 20
    close(model.encode(TEXTS), encoder.encode(TEXTS))


def test_the_tokenizer(tiny_llama_dir, tmp_path):
    encoder = Encoder.from_pretrained(tiny_llama_dir)
    encoder.tokenizer.padding_side, encoder.tokenizer.chat_template = "left", "{{ messages }}"
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "chat_template.jinja").write_text("of an earlier save")
    encoder.save_pretrained(tmp_path / "out")
    again = Encoder.from_pretrained(tmp_path / "out").tokenizer
    assert (again.padding_side, again.chat_template, again.pad_token) == ("right", None, "</s>")
    assert not list((tmp_path / "out").glob("chat_template*"))
    rules = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert rules.truncation is None and rules.padding is None
    assert (encoder.tokenizer.padding_side, encoder.tokenizer.chat_template) == ("left", "{{ messages }}")  # a copy


def test_a_folder_with_an_adapter_is_refused(tiny_llama_dir, tmp_path):
    """transformers would load the adapter's base model instead of what was saved there."""
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="holds an adapter"):
        Encoder.from_pretrained(tiny_llama_dir).save_pretrained(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["adapter_config.json"]


def test_no_file_is_a_pickle(tiny_llama_dir, tmp_path):
    Encoder.from_pretrained(tiny_llama_dir, pool_bos=False).save_pretrained(tmp_path / "out", normalize=True)
    endings = {file.suffix for file in (tmp_path / "out").rglob("*") if file.is_file()}
    assert endings == {".json", ".safetensors", ".md"}


def test_directories_in_an_existing_folder(tmp_path):
    """What a save brings goes into the folders that are there."""
    (tmp_path / "out" / "1_Pooling").mkdir(parents=True)
    (tmp_path / "out" / "1_Pooling" / "config.json").write_text("old")
    with atomic_directory(tmp_path / "out") as temporary:
        (temporary / "1_Pooling").mkdir()
        (temporary / "1_Pooling" / "config.json").write_text("new")
    assert (tmp_path / "out" / "1_Pooling" / "config.json").read_text() == "new"
