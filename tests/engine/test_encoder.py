"""The encoder: spans, order, batching, templates and lengths; its folders are in test_encoder_folders.py."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing

import bivec
from bivec.engine.encoder import Encoder
from bivec.engine.encoder_config import EncoderConfig
from bivec.engine.errors import BivecError, ConfigError
from bivec.engine.lora import LoraConfig, add_lora
from bivec.engine.objectives import simcse_loss
from bivec.models import PackedBatch, load_pretrained

TEXTS = [
    "A lobster is blue.",
    "",
    "The red colour only appears after cooking, which takes some time and a large pot of boiling salted water.",
    "In 1648 the Treaty of Westphalia ended the war; about 8,000,000 people had died by then, most of them of hunger.",
    "x",
    "Naïve café — 你好 🙂",
    "A lobster is blue.",
]
TEMPLATES = ("[INST] {text} [/INST]", "<|user|>\n{text}<|end|>", "{text} !", "query: {text}")
both = pytest.mark.parametrize("family", ["llama", "mistral"])


@pytest.fixture
def directory(request, family):
    return request.getfixturevalue(f"tiny_{family}_dir")


@pytest.fixture
def llama(tiny_llama_dir):
    return Encoder.from_pretrained(tiny_llama_dir)


def configured(encoder, **settings):
    return Encoder(encoder.model, encoder.tokenizer, EncoderConfig(**settings))


def hidden_states(encoder, ids):
    """The model's rows for one sequence, alone in its batch."""
    with torch.no_grad():
        return encoder.model(PackedBatch.from_sequences([ids]), causal=encoder.config.causal)


def close(one, other, tolerance=1e-5):
    np.testing.assert_allclose(np.asarray(one), np.asarray(other), rtol=0, atol=tolerance)


def test_shapes_and_types(llama):
    vectors = llama.encode(TEXTS)
    assert isinstance(vectors, np.ndarray) and vectors.shape == (len(TEXTS), llama.dimension) == (7, 64)
    assert vectors.dtype == np.float32 and np.isfinite(vectors).all()
    one = llama.encode(TEXTS[0])
    assert one.shape == (64,)
    close(one, vectors[0])
    tensor = llama.encode(TEXTS, convert_to_tensor=True, normalize_embeddings=True, show_progress_bar=True)
    assert isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32
    close(tensor, vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
    assert llama.encode([]).shape == (0, 64) and llama.encode_tokens([]) == []
    assert llama.encode(tuple(TEXTS)).shape == vectors.shape


@both
def test_batching_and_order_change_nothing(directory):
    """METHOD 14.2: a vector alone equals the same vector in any batch."""
    encoder = Encoder.from_pretrained(directory)
    vectors = encoder.encode(TEXTS)
    close(vectors[0], vectors[6])
    for options in ({"batch_size": 1}, {"batch_size": 3}, {"tokens_per_batch": 1}, {"tokens_per_batch": 40}):
        close(encoder.encode(TEXTS, **options), vectors)
    order = [3, 0, 6, 5, 1, 4, 2]
    close(encoder.encode([TEXTS[i] for i in order]), vectors[order])
    for text, vector in zip(TEXTS, vectors, strict=True):
        close(encoder.encode(text), vector)


def test_each_text_is_the_mean_of_its_tokens(llama):
    for text, vector in zip(TEXTS, llama.encode(TEXTS), strict=True):
        close(hidden_states(llama, llama.tokenizer(text).input_ids).mean(0), vector)


@pytest.mark.parametrize("pooling", ["mean", "weighted_mean", "last_token", "eos_token", "bos_token"])
@pytest.mark.parametrize("pool_bos", [True, False])
def test_poolings(llama, pooling, pool_bos):
    encoder = configured(llama, pooling=pooling, pool_bos=pool_bos)
    text = TEXTS[2]
    ids = llama.tokenizer(text).input_ids + ([1] if pooling == "eos_token" else [])
    states = hidden_states(llama, ids)
    span = states if pool_bos else states[1:]
    ranks = torch.arange(1.0, len(span) + 1)
    expected = {
        "mean": span.mean(0),
        "weighted_mean": (ranks / ranks.sum()) @ span,
        "last_token": states[-1],
        "eos_token": states[-1],
        "bos_token": states[0],
    }
    close(encoder.encode(text), expected[pooling])


@pytest.mark.parametrize("template", [None, *TEMPLATES])
@pytest.mark.parametrize("instruction", [None, "Retrieve semantically similar text:"])
def test_span(llama, template, instruction):
    """METHOD 14.9: the pooled tokens spell the text and the tail of its template, nothing of what is before."""
    encoder = configured(llama, template=template, pool_bos=False)
    before, after = (template or "{text}").split("{text}")
    head = before + (f"{instruction} " if instruction else "")
    for text in ("A lobster is blue.", "x", "café 🙂 in 1648", "semantically similar text"):
        (row,) = encoder._tokenise([(instruction or "", text)])
        assert row.input_ids == llama.tokenizer(head + text + after).input_ids
        # byte-level tokens carry the space before a word, here that between head and text
        assert llama.tokenizer.decode(row.input_ids[row.start :]).lstrip(" ") == text + after
        vector = encoder.encode([text], instruction=instruction)[0]
        close(vector, hidden_states(encoder, row.input_ids)[row.start :].mean(0))
        close(encoder.encode([[instruction, text]])[0] if instruction else vector, vector)


def test_span_with_the_real_mistral_tokenizer(tiny_mistral_dir, tmp_path):
    """SentencePiece puts a space of its own in front, which offsets must see through."""
    package = pytest.importorskip("mistral_common", reason="pip install --no-deps mistral-common")
    pytest.importorskip("sentencepiece")
    from bivec.engine.tokenizer import load_tokenizer

    shutil.copy(next(iter(package.__path__)) + "/data/tokenizer.model.v1", tmp_path / "tokenizer.model")
    tokenizer = load_tokenizer(tmp_path)
    model = load_pretrained(tiny_mistral_dir).model
    encoder = Encoder(model, tokenizer, EncoderConfig(template="[INST] {text} [/INST]", pool_bos=False))
    for instruction in ("", "Retrieve text:"):
        (row,) = encoder._tokenise([(instruction, " A lobster is blue. ")])
        head = f"[INST] {instruction} " if instruction else "[INST] "
        assert row.input_ids == tokenizer(head + "A lobster is blue. [/INST]").input_ids
        assert tokenizer.decode(row.input_ids[row.start :]).strip() == "A lobster is blue. [/INST]"
    plain = Encoder(model, tokenizer, EncoderConfig(pool_bos=False))
    (row,) = plain._tokenise([("", "A lobster")])
    assert row.start == 1 and row.input_ids[0] == 1


def test_instruction_changes_the_context_but_is_not_pooled(llama):
    plain, instructed = llama.encode(TEXTS[2:4]), llama.encode(TEXTS[2:4], instruction="Translate to French:")
    assert np.abs(plain - instructed).max() > 1e-2
    close(llama.encode([["Translate to French: ", TEXTS[2], 3], ["  ", TEXTS[3]]]), [instructed[0], plain[1]])
    pooled = configured(llama, skip_instruction=False)
    ids = llama.tokenizer(f"Translate to French: {TEXTS[2]}").input_ids
    close(pooled.encode(TEXTS[2], instruction="Translate to French:"), hidden_states(llama, ids).mean(0))


def test_empty_texts(llama):
    bos = hidden_states(llama, [0])[0]
    for pool_bos in (True, False):
        close(configured(llama, pool_bos=pool_bos).encode(["", "x"])[0], bos)
    assert np.isfinite(llama.encode(["", " "], instruction="Find:")).all()
    assert np.isfinite(configured(llama, template=TEMPLATES[0]).encode([""])).all()


def test_max_length(llama, tiny_llama_dir):
    long = " ".join(TEXTS) * 30
    ids = llama.tokenizer(long).input_ids
    assert len(ids) > 1024
    close(llama.encode(long), hidden_states(llama, ids[:512]).mean(0))
    short = Encoder.from_pretrained(tiny_llama_dir, max_length=10)
    close(short.encode(long), hidden_states(llama, ids[:10]).mean(0))
    eos = Encoder.from_pretrained(tiny_llama_dir, max_length=10, pooling="eos_token")
    close(eos.encode(long), hidden_states(llama, [*ids[:9], 1])[-1])
    eos.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    close(
        eos.encode("A lobster."), hidden_states(llama, [*llama.tokenizer("A lobster.").input_ids, 1])[-1]
    )  # not twice
    assert short.encode_tokens(long).shape == (10, 64)
    assert configured(llama, max_length=5000).config.max_length == 1024  # the model's positions
    with pytest.raises(ConfigError, match="max_length 1025 exceeds the 1024 positions"):
        Encoder.from_pretrained(tiny_llama_dir, max_length=1025)
    with pytest.raises(BivecError, match=r"text 1: no token is left for it: of max_length 10 its instruction"):
        short.encode([["", "x"], [long, "x"]])


def test_truncation_keeps_the_template(llama):
    encoder = configured(llama, template="[INST] {text} [/INST]", max_length=40)
    long, tail = " ".join(TEXTS[2:4]), len(llama.tokenizer(" [/INST]").input_ids) - 1
    ids = llama.tokenizer(f"[INST] Find: {long} [/INST]").input_ids
    start = len(llama.tokenizer("[INST] Find:").input_ids)
    assert len(ids) > 50 and tail > 1
    states = hidden_states(llama, ids[: 40 - tail] + ids[-tail:])
    close(encoder.encode(["x", long], instruction="Find:")[1], states[start:].mean(0))
    with pytest.raises(BivecError, match="text 1: no token is left for it"):
        encoder.encode(["x", [long, "x"], "x"])
    with pytest.raises(ConfigError, match="max_length 5 leaves no token to a text"):
        configured(llama, template="[INST] {text} [/INST]", max_length=5)


@pytest.mark.parametrize("pooling", ["mean", "last_token", "eos_token", "bos_token"])
def test_text_only(llama, pooling):
    """``pool_tail=False`` ends the span with the text; the EOS and the BOS, where they are what is pooled, stay so."""
    encoder = configured(llama, template="[INST] {text} [/INST]", pool_tail=False, pooling=pooling)
    ids = llama.tokenizer(f"[INST] {TEXTS[2]} [/INST]").input_ids + ([1] if pooling == "eos_token" else [])
    start, end = (len(llama.tokenizer(text).input_ids) for text in ("[INST]", f"[INST] {TEXTS[2]}"))
    states = hidden_states(llama, ids)
    expected = {
        "mean": states[start:end].mean(0),
        "last_token": states[end - 1],
        "eos_token": states[-1],
        "bos_token": states[0],
    }
    close(encoder.encode(["x", TEXTS[2], "y"])[1], expected[pooling])


def test_templates_by_name(tiny_llama_dir, tmp_path, monkeypatch):
    encoder = Encoder.from_pretrained(tiny_llama_dir, template="mistral", pool_tail=False)
    assert encoder.config == EncoderConfig(template="[INST] {text} [/INST]", pool_tail=False)
    # a folder says all by itself, whatever it is called and whatever names later versions know
    name = "Qwen/Qwen2-7B-Instruct"
    encoder.save_pretrained(tmp_path / name)
    stored = json.loads((tmp_path / name / "bivec_config.json").read_text())
    assert stored["template"] == "[INST] {text} [/INST]" and stored["pool_tail"] is False
    monkeypatch.chdir(tmp_path)
    assert Encoder.from_pretrained(name).config == encoder.config
    assert Encoder.from_pretrained(name, template="none", pool_tail=True).config == EncoderConfig()
    shutil.copytree(tiny_llama_dir, "mistralai/Mistral-7B-Instruct-v0.2")
    assert Encoder.from_pretrained("mistralai/Mistral-7B-Instruct-v0.2").config.template is None


def test_bad_input(llama):
    with pytest.raises(BivecError, match="text 1 is int, expected a str or an"):
        llama.encode(["a", 3])
    with pytest.raises(BivecError, match="text 0 is list"):
        llama.encode([["only one"]])
    with pytest.raises(BivecError, match="text 0 is tuple"):
        llama.encode([("instruction", None)])
    with pytest.raises(BivecError, match="expected a text or a list of texts, got int"):
        llama.encode(7)
    with pytest.raises(BivecError, match="text 1 is list, expected a str"):
        llama.encode_tokens(["a", ["b", "c"]])
    with pytest.raises(ValueError, match="at least 1"):
        llama.encode(TEXTS, tokens_per_batch=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pooling": "max"}, "pooling 'max' is unknown; choose one of mean"),
        ({"max_length": 1}, "max_length is 1"),
        ({"max_length": "512"}, "max_length is '512'"),
        ({"template": "no place"}, "exactly once"),
        ({"template": "lama-3"}, "choose one of llama-3, mistral"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ConfigError, match=message):
        EncoderConfig(**settings)


def test_encode_tokens(llama):
    states = configured(llama, template=TEMPLATES[0]).encode_tokens(TEXTS, tokens_per_batch=40)
    for text, rows in zip(TEXTS, states, strict=True):
        close(rows, hidden_states(llama, llama.tokenizer(text).input_ids))
        assert rows.dtype == torch.float32
    close(llama.encode_tokens(TEXTS[3]), states[3])


@both
def test_bidirectional_unless_told_otherwise(directory, tmp_path):
    """METHOD 14.1: a raw decoder whose folder says nothing is mean, bidirectional, 512."""
    encoder = Encoder.from_pretrained(directory)
    assert encoder.config == EncoderConfig() == EncoderConfig("mean", True, False, 512, None)
    assert bivec.Encoder is Encoder
    causal = Encoder.from_pretrained(directory, causal=True)
    one, other = "A lobster is blue", "A lobster is green"
    assert (encoder.encode_tokens(one)[0] - encoder.encode_tokens(other)[0]).abs().max() > 1e-3
    assert torch.equal(causal.encode_tokens(one)[0], causal.encode_tokens(other)[0])
    # a config.json that says is_causal counts
    shutil.copytree(directory, tmp_path / "copy")
    file = tmp_path / "copy" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"is_causal": True}))
    assert Encoder.from_pretrained(tmp_path / "copy").config.causal


def test_training_after_encoding(llama):
    """What encode() leaves in the model (the rotary tables) must do for autograd."""
    vectors = llama.encode(TEXTS)
    assert not any(table.is_inference() for tables in llama.model.rotary(8, llama.device).values() for table in tables)
    adapter = add_lora(llama.model, LoraConfig(rank=2))
    views = PackedBatch.from_sequences([[0, 5, 6], [0, 9], [0, 5, 6], [0, 9]])
    simcse_loss(llama.model, views, seed=1).backward()
    assert all(parameter.grad is not None for parameter in adapter.named_parameters().values())
    close(llama.encode(TEXTS), vectors)


def test_half_precision_and_the_tie_to_cosines(tiny_llama_dir):
    """METHOD 14.2 in bf16: batching moves a vector by less than rounding shows."""
    encoder = Encoder.from_pretrained(tiny_llama_dir, dtype=torch.bfloat16)
    one = encoder.encode(TEXTS, batch_size=1, normalize_embeddings=True)
    other = encoder.encode(TEXTS, normalize_embeddings=True)
    assert one.dtype == np.float32
    assert ((one * other).sum(1) > 0.999).all() and math.isclose((one[0] * one[0]).sum(), 1.0, rel_tol=1e-5)


def test_spans_are_pooled_as_whole_texts_are(llama):
    row = llama.tokenizer(TEXTS[0]).input_ids
    batch = PackedBatch.from_sequences([row])
    hidden = hidden_states(llama, row)
    pooled = llama.pool_spans(hidden, batch.cu_seqlens, [(1, 3)], "weighted_mean")
    close(pooled[0], (hidden[1] + 2 * hidden[2]) / 3)
    with pytest.raises(ConfigError, match="pooling 'median' is unknown; choose one of mean, weighted_mean"):
        llama.pool_spans(hidden, batch.cu_seqlens, [(1, 3)], "median")
