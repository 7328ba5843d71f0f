"""Tokenizers: real SentencePiece files (mistral-common), and small ones trained here."""

import json
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, processors

from bivec.engine import sentencepiece_bpe
from bivec.engine.tokenizer import LLAMA3_SPLIT, QWEN2_SPLIT, load_tokenizer, mask_token_id, prefix_ids, prefix_length
from bivec.models import CheckpointError, ConfigError

sentencepiece = pytest.importorskip("sentencepiece")


@pytest.fixture(scope="module", params=["v1", "v2", "v3"])
def mistral(request, tmp_path_factory, files):
    """(version, our tokenizer, SentencePiece's own)."""
    folder = files.sentencepiece(tmp_path_factory.mktemp("mistral"), request.param)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    return request.param, load_tokenizer(folder), processor


def test_mistral_ids_are_sentencepiece_ids(mistral, files):
    _, tokenizer, processor = mistral
    for text in files.TEXTS:
        assert tokenizer(text).input_ids == [processor.bos_id(), *processor.encode(text)], text
        assert tokenizer(text, add_special_tokens=False).input_ids == processor.encode(text), text


def test_mistral_ids_of_every_piece(mistral):
    _, tokenizer, processor = mistral
    special = set(tokenizer.all_special_tokens)
    pieces = [processor.id_to_piece(number).replace("▁", " ") for number in range(processor.vocab_size())]
    texts = [f"x{piece}y {piece}" for piece in pieces if not any(token in piece for token in special)]
    texts = [text for text in texts if "[control_" not in text and "<0x" not in text]
    ours = tokenizer(texts, add_special_tokens=False).input_ids
    controls = {number for number in range(processor.vocab_size()) if processor.is_control(number)}
    compared = 0
    for text, ids in zip(texts, ours, strict=True):
        if not controls.intersection(ids):  # a control token written out in the text
            assert ids == processor.encode(text), text
            compared += 1
    assert compared > 31_000


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_mistral_ids_of_arbitrary_text(mistral, text):
    _, tokenizer, processor = mistral
    if any(token in text for token in ("<s>", "</s>", "<unk>", "[")):
        return
    assert tokenizer(text, add_special_tokens=False).input_ids == processor.encode(text)


def test_mistral_special_tokens(mistral, files):
    version, tokenizer, processor = mistral
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", "</s>")
    assert prefix_length(tokenizer) == 1
    assert mask_token_id(tokenizer) == {"v1": 28730, "v2": 29498, "v3": 29498}[version] == processor.piece_to_id("_")
    assert mask_token_id(tokenizer, "eos") == 2
    mask = tokenizer("Hello", return_special_tokens_mask=True)["special_tokens_mask"]
    assert mask[0] == 1 and not any(mask[1:])
    text = files.TEXTS[3]
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
    if version != "v1":
        assert tokenizer("[INST]", add_special_tokens=False).input_ids == [3]
        assert 3 in tokenizer("[INST] Hi [/INST]").input_ids


def test_mistral_saved(mistral, tmp_path, assert_saved_alike):
    assert_saved_alike(mistral[1], tmp_path, model_type="mistral")


def test_sentencepiece_settings_file_and_damage(tmp_path, files):
    folder = files.sentencepiece(tmp_path, "v1")
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    assert load_tokenizer(folder).chat_template == "{{ messages }}"
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not a JSON file"):
        load_tokenizer(folder)
    (folder / "tokenizer_config.json").unlink()
    content = (folder / "tokenizer.model").read_bytes()
    for damaged in (b"", content[: len(content) // 2], b"not a model"):
        (folder / "tokenizer.model").write_bytes(damaged)
        with pytest.raises(CheckpointError, match="not a complete SentencePiece model"):
            load_tokenizer(folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_type": "unigram", "normalization_rule_name": "identity"}, "model type unigram"),
        ({"model_type": "bpe", "normalization_rule_name": "nmt_nfkc"}, "text normalisation 'nmt_nfkc'"),
        ({"model_type": "bpe", "normalization_rule_name": "identity", "remove_extra_whitespaces": True}, "extra white"),
    ],
)
def test_other_sentencepiece_models_are_refused_by_name(tmp_path, options, message, files):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(text for text in files.TEXTS if text.isprintable()) * 20, encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=500,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
        **{"remove_extra_whitespaces": False, **options},
    )
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("add_dummy_prefix", [True, False])
def test_other_sentencepiece_bpe_models_are_converted(tmp_path, add_dummy_prefix, files):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(text for text in files.TEXTS if text.isprintable()) * 20, encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(tmp_path / "tokenizer"),
        model_type="bpe",
        vocab_size=500,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=add_dummy_prefix,
        user_defined_symbols=["<sep>", "(new)"],
        minloglevel=2,
    )
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    tokenizer = load_tokenizer(tmp_path)
    for text in [*files.TEXTS, "a<sep>b (new)<sep> c", "<sep>"]:
        assert tokenizer(text, add_special_tokens=False).input_ids == processor.encode(text), text


@pytest.mark.parametrize(
    ("special", "named", "asked", "expected"),
    [
        (("<|begin|>", "<|endoftext|>", "<|end|>"), {"bos_token": "<|begin|>"}, None, "<|endoftext|>"),
        (("<|begin|>", "<|endoftext|>", "<|end|>"), {"bos_token": "<|begin|>"}, "<|begin|>", "<|begin|>"),
        (("<|begin|>", "<|end|>"), {"bos_token": "<|begin|>", "eos_token": "<|end|>"}, None, "<|begin|>"),
        (("<|begin|>", "<|end|>"), {"eos_token": "<|end|>"}, None, "<|end|>"),
    ],
)
@pytest.mark.parametrize("add_bos_token", [None, False])
def test_a_bos_is_added_where_there_is_none(
    tmp_path, special, named, asked, expected, add_bos_token, files, assert_saved_alike
):
    backend = files.byte_level(special=special)
    config = {"tokenizer_class": "GPT2Tokenizer", **named}
    if add_bos_token is not None:  # must not undo our BOS when the saved tokenizer is loaded
        config["add_bos_token"] = add_bos_token
    tokenizer = load_tokenizer(files.byte_level_directory(tmp_path, backend, **config), bos_token=asked)
    for text in files.TEXTS:
        assert tokenizer(text).input_ids == [backend.token_to_id(expected), *backend.encode(text).ids], text
    assert prefix_length(tokenizer) == 1 and tokenizer.bos_token == expected
    assert tokenizer.pad_token == named.get("eos_token", expected)
    assert expected in tokenizer.all_special_tokens
    (tmp_path / "saved").mkdir()
    assert_saved_alike(tokenizer, tmp_path / "saved", model_type="llama")


def test_a_tokenizer_with_its_own_bos_stays_as_it_is(tmp_path, files, assert_saved_alike):
    backend = files.byte_level(split=LLAMA3_SPLIT)
    template = processors.TemplateProcessing(
        single="<|begin|> $A", pair="<|begin|> $A <|begin|> $B", special_tokens=[("<|begin|>", 0)]
    )
    backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    folder = files.byte_level_directory(
        tmp_path, backend, bos_token="<|begin|>", eos_token="<|end|>", pad_token="<|endoftext|>"
    )
    tokenizer = load_tokenizer(folder)
    assert tokenizer(files.TEXTS).input_ids == [encoding.ids for encoding in backend.encode_batch(files.TEXTS)]
    assert prefix_length(tokenizer) == 1 and tokenizer.pad_token == "<|endoftext|>"
    assert load_tokenizer(folder, bos_token="<|begin|>")("a").input_ids == tokenizer("a").input_ids
    with pytest.raises(ConfigError, match=r"already puts '<\|begin\|>' in front"):
        load_tokenizer(folder, bos_token="<|end|>")
    (tmp_path / "saved").mkdir()
    assert_saved_alike(tokenizer, tmp_path / "saved", model_type="llama")


def test_unusable_bos_tokens(tmp_path, files):
    folder = files.byte_level_directory(tmp_path, files.byte_level(special=()))
    with pytest.raises(ConfigError, match="neither a BOS nor an EOS"):
        load_tokenizer(folder)
    with pytest.raises(ConfigError, match="'<none>' is not in the tokenizer's vocabulary"):
        load_tokenizer(folder, bos_token="<none>")


def test_mask_tokens(tmp_path, files):
    backend = files.byte_level()
    tokenizer = load_tokenizer(files.byte_level_directory(tmp_path, backend, eos_token="<|end|>"))
    assert mask_token_id(tokenizer) == backend.token_to_id("_") == tokenizer("_").input_ids[1]
    assert mask_token_id(tokenizer, "eos") == backend.token_to_id("<|end|>")
    with pytest.raises(ConfigError, match="no mask token of its own"):
        mask_token_id(tokenizer, "mask")
    with pytest.raises(ConfigError, match="expected 'blank', 'eos' or 'mask'"):
        mask_token_id(tokenizer, "_")
    own = load_tokenizer(files.byte_level_directory(tmp_path, backend, eos_token="<|end|>", mask_token="<|begin|>"))
    assert {mask_token_id(own, kind) for kind in ("blank", "eos", "mask")} == {0}


def test_mask_token_that_is_no_token(tmp_path, files):
    backend = Tokenizer(models.BPE(vocab={"<s>": 0, "a": 1, "b": 2}, merges=[]))
    tokenizer = load_tokenizer(files.byte_level_directory(tmp_path, backend, bos_token="<s>"))
    with pytest.raises(ConfigError, match="'_' is not one token"):
        mask_token_id(tokenizer)
    with pytest.raises(ConfigError, match="no eos token"):
        mask_token_id(tokenizer, "eos")


def test_missing_and_damaged_tokenizers(tmp_path):
    with pytest.raises(CheckpointError, match=r"neither tokenizer\.json nor tokenizer\.model"):
        load_tokenizer(tmp_path)
    (tmp_path / "tekken.json").touch()
    with pytest.raises(CheckpointError, match=r"tekken\.json is not supported"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", ')
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read"):
        load_tokenizer(tmp_path)


def test_qwen_and_gemma_directories(tmp_path, files):
    """What their classes in transformers save is read as it is: Qwen adds no BOS, Gemma its own."""
    from transformers import GemmaTokenizer, Qwen2Tokenizer

    state = json.loads(files.byte_level(split=QWEN2_SPLIT).to_str())["model"]
    qwen = Qwen2Tokenizer(vocab=state["vocab"], merges=[tuple(pair) for pair in state["merges"]])
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += [*dict.fromkeys("\u2581" + "".join(files.TEXTS).replace(" ", "")), "Th", "\u2581t", "he", "\u2581the"]
    merges = [("T", "h"), ("\u2581", "t"), ("h", "e"), ("\u2581t", "he")]
    gemma = GemmaTokenizer(
        vocab={piece: i for i, piece in enumerate(dict.fromkeys(pieces))}, merges=merges, add_bos_token=True
    )
    for name, theirs, prefix in (("qwen", qwen, ["<|endoftext|>"]), ("gemma", gemma, [])):
        theirs.save_pretrained(tmp_path / name)
        tokenizer = load_tokenizer(tmp_path / name)
        for text in files.TEXTS:
            expected = [*map(theirs.convert_tokens_to_ids, prefix), *theirs(text).input_ids]
            assert tokenizer(text).input_ids == expected, text
        assert prefix_length(tokenizer) == 1
    assert tokenizer.bos_token == "<bos>" and tokenizer("a").input_ids[0] == 2


def add_where_another_stands(rules):
    """The id that tokenizers gives to a token behind the vocabulary, which one of the vocabulary has too."""
    vocabulary = rules["model"]["vocab"]
    vocabulary[next(reversed(vocabulary))] = len(vocabulary)
    rules["added_tokens"].append(rules["added_tokens"][0] | {"content": "<t>", "id": len(vocabulary)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rules: rules["model"]["vocab"].update(odd=2**31), "2147483648 is out of range"),  # would take 32 GiB
        (lambda rules: rules["added_tokens"][0].update(id=-1), "cannot be read"),
        (lambda rules: rules["model"]["vocab"].update(odd=7), "gives the id 7 to two tokens"),
        (add_where_another_stands, "to two tokens"),
        (
            lambda rules: rules["model"]["vocab"].pop(rules["added_tokens"][0]["content"]),
            "says that .* is .*, tokenizers",
        ),
        (
            lambda rules: rules["added_tokens"].append(rules["added_tokens"][0] | {"content": "<t>", "id": 9000}),
            "says that '<t>' is 9000",
        ),
        (lambda rules: rules.update(padding={"strategy": {"Fixed": 2**40}}), "1099511627776 is out of range"),
        (lambda rules: rules.update(padding={"strategy": {}, "pad_to_multiple_of": 2**40}), "is out of range"),
        (lambda rules: rules["model"].update(merges=[["no", "token"]]), "cannot be read|cannot be used"),
        (lambda rules: rules.update(model=5), "cannot be read"),
    ],
)
def test_damaged_rules_are_named(tmp_path, change, message, files):
    files.byte_level_directory(tmp_path, files.byte_level())
    rules = json.loads((tmp_path / "tokenizer.json").read_text())
    change(rules)
    (tmp_path / "tokenizer.json").write_text(json.dumps(rules))
    with pytest.raises(CheckpointError, match=message) as error:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [("[]", "expected a JSON object"), ('{"a": 1, "a": 2}', "the key 'a' is there twice"), ("[" * 100_000, "too deep")],
)
def test_damaged_settings_are_named(tmp_path, content, message, files):
    files.byte_level_directory(tmp_path, files.byte_level())
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=rf"tokenizer_config\.json: .*{message}"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("place", ["piece", "name"])
def test_sentencepiece_models_that_are_no_utf8(tmp_path, place, files):
    folder = files.sentencepiece(tmp_path, "v1")
    data = (folder / "tokenizer.model").read_bytes()
    old = "▁the".encode() if place == "piece" else b"identity"
    (folder / "tokenizer.model").write_bytes(data.replace(old, b"\xff" + old[1:], 1))
    with pytest.raises(CheckpointError, match=r"tokenizer\.model: not a complete SentencePiece model"):
        load_tokenizer(folder)


def test_sentencepiece_is_named_where_it_is_missing(tmp_path, monkeypatch, files):
    folder = files.sentencepiece(tmp_path, "v1")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(CheckpointError, match="needs the package sentencepiece: pip install sentencepiece"):
        load_tokenizer(folder)


def test_a_conversion_that_gives_other_ids_is_refused(tmp_path, monkeypatch, files):
    """Every load compares with SentencePiece itself."""
    folder = files.sentencepiece(tmp_path, "v1")
    monkeypatch.setattr("bivec.engine.sentencepiece_bpe._merges", lambda pieces: [])
    with pytest.raises(CheckpointError, match=r"differs from SentencePiece on it \(token \d+ of a test text\)"):
        load_tokenizer(folder)


@pytest.mark.parametrize("message", [b"\x08\x01", b"\x0a\x04\x0a\x00\x1a\x00"], ids=["piece", "type"])
def test_fields_of_the_wrong_kind(message):
    with pytest.raises(TypeError, match="belongs"):
        sentencepiece_bpe._model_parts(message)


@pytest.mark.parametrize("error", [MemoryError("full"), ModuleNotFoundError("No module named 'transformers'")])
def test_what_is_no_fault_of_the_file_is_not_said_of_it(tiny_llama_dir, monkeypatch, error):
    def fails(*_):
        raise error

    monkeypatch.setattr("bivec.engine.tokenizer._wrap", fails)
    with pytest.raises(type(error), match=str(error)):
        load_tokenizer(tiny_llama_dir)


def test_the_prefix_is_without_the_padding_of_an_earlier_call(tiny_llama_dir):
    tokenizer = load_tokenizer(tiny_llama_dir)
    expected = prefix_ids(tokenizer)
    assert len(expected) == 1
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    tokenizer(["one", "one two"], padding="max_length", max_length=6)
    assert prefix_ids(tokenizer) == expected
