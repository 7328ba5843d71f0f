"""Text format: what the pooled tokens spell for every template, and what truncation may take.

The oracle decodes tokens: it never looks at the offsets that the code under test goes by.
"""

import copy
import gzip
import pickle
import re
from functools import cache
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from bivec.engine.errors import BivecError, ConfigError
from bivec.engine.sentencepiece_bpe import sentencepiece_backend
from bivec.engine.text_format import (
    TEMPLATES,
    Row,
    TextFormat,
    encoding_head,
    resolve_template,
    template_of,
    training_head,
)

SAMPLE = Path(__file__).parents[2] / "recipes/data/wikitext2_paragraphs.txt.gz"
MARKERS = sorted({marker for template in TEMPLATES.values() for marker in re.findall(r"<[^>]+>", template)})
TEXTS = [
    "A lobster is blue.",
    "x",
    "naïve café, 1648",
    "🙂🙂 are two, 👩‍👩‍👧‍👦 is one",
    "你好，世界",
    "two\nlines  and   spaces",
    "ends in a blank \u00a0.",
]
INSTRUCTION = "Retrieve semantically similar text:"
NAMES = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "clean_up_tokenization_spaces": False}
LONG = "The red colour only appears after cooking, which takes a large pot of boiling salted water."


def with_bos(backend):
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, **NAMES)


@cache
def byte_level():
    """Trained here; its special tokens are those of all templates, as each model's own vocabulary has them."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<s>", "</s>", *MARKERS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    with gzip.open(SAMPLE, "rt", encoding="utf-8") as lines:
        backend.train_from_iterator(islice(lines, 200), trainer)
    return with_bos(backend)


@cache
def byte_fallback():
    """As LLaMA-2 and Mistral: no pre-tokenisation, spaces inside the pieces, a byte token where there is no piece."""
    words = ("▁lobster", "▁is", "▁blue", "▁similar", "▁text", "▁takes", "[INST]", "▁[/INST]", "▁▁")
    chains = dict.fromkeys(word[:length] for word in words for length in range(2, len(word) + 1))
    letters = dict.fromkeys("▁abcdefghijklmnopqrstuvwxyzAT[]/INST.,:;\n" + "".join(words))
    pieces = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3), *((marker, 0.0, 3) for marker in MARKERS)]
    pieces += [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)]
    pieces += [(piece, -float(rank), 1) for rank, piece in enumerate((*chains, *letters))]
    backend = sentencepiece_backend(pieces, dummy_prefix=False, byte_fallback=True)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, **NAMES)


@pytest.fixture(scope="module", params=[byte_level, byte_fallback], ids=lambda build: build.__name__)
def tokenizer(request):
    return request.param()


every_template = pytest.mark.parametrize("template", [None, *TEMPLATES.values(), "query: {text}", "{text} [end]"])


def parts(template, instruction, text):
    """(head, text, tail) of the string that is tokenised."""
    before, after = (template or "{text}").split("{text}")
    return before + encoding_head(instruction), text.strip() if after else text, after


def assert_span(tokenizer, row, head, text, tail):
    """The pooled tokens are those that have something of the text in them, and the tail's if it is pooled at all."""
    ids = row.input_ids
    assert ids == tokenizer(head + text + tail).input_ids
    front = tokenizer.decode(ids[: row.start])
    assert front + tokenizer.decode(ids[row.start :]) == "<s>" + head + text + tail
    assert ("<s>" + head).startswith(front), "the first token of the text is left out"
    assert len(tokenizer.decode(ids[: row.start + 1])) > len("<s>" + head), "a token of the head is pooled"
    if row.end < len(ids):
        assert tokenizer.decode(ids[: row.end]).startswith("<s>" + head + text), "the end of the text is left out"
        last = tokenizer.decode(ids[: row.end - 1])
        assert not last.startswith("<s>" + head + text), "a token of the tail is pooled"


@every_template
@pytest.mark.parametrize("instruction", ["", INSTRUCTION])
@pytest.mark.parametrize("pool_tail", [True, False])
def test_span(tokenizer, template, instruction, pool_tail):
    """METHOD 14.9: for each template the text and its tail, never BOS or instruction; or the text alone."""
    text_format = TextFormat(tokenizer, 512, template, pool_tail=pool_tail, pool_bos=False)
    texts = [f"  {text}\n" for text in TEXTS] + TEXTS
    rows = text_format.rows([encoding_head(instruction)] * len(texts), texts)
    for row, spaced in zip(rows, texts, strict=True):
        head, text, tail = parts(template, instruction, spaced)
        assert_span(tokenizer, row, head, text, tail)
        assert (row.end == len(row.input_ids)) is (pool_tail or not tail)


def test_template_markers_are_single_tokens():
    """Else the tests above would say little about chat templates."""
    tokenizer = byte_level()
    (row,) = TextFormat(tokenizer, 512, TEMPLATES["llama-3"]).rows([""], ["x"])
    start, end, eot = tokenizer.convert_tokens_to_ids(["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"])
    assert [row.input_ids[0], row.input_ids[1], row.input_ids[-1]] == [0, start, eot] and end in row.input_ids
    (row,) = TextFormat(tokenizer, 512, TEMPLATES["gemma-2"]).rows([""], ["x"])
    # the tokenizer's own BOS and the template's, as in the original
    assert tokenizer.decode(row.input_ids) == "<s><bos><start_of_turn>user\nx<end_of_turn>"


def test_head_and_bos_are_pooled_on_demand(tokenizer):
    head, template = encoding_head(INSTRUCTION), TEMPLATES["mistral"]
    for options, heads, start in [
        ({"template": template, "skip_head": False}, [head], 0),
        ({"template": template, "skip_head": False, "pool_bos": False}, [head], 1),
        ({"skip_head": False}, [head], 0),
        ({}, [""], 0),
        ({"pool_bos": False}, [""], 1),
        ({"pool_tail": False}, [""], 0),
    ]:
        (row,) = TextFormat(tokenizer, 512, **options).rows(heads, [LONG])
        assert (row.start, row.end) == (start, len(row.input_ids)), options
    (row,) = TextFormat(tokenizer, 512, template, skip_head=False, pool_tail=False).rows([head], [LONG])
    assert row.start == 0 and tokenizer.decode(row.input_ids[: row.end]) == f"<s>[INST] {head}{LONG}"


def spelled_layout(tokenizer, ids, head, text):
    """(tokens in front, tokens that lie in the text alone), from the lengths of the decoded prefixes; ASCII only."""
    ends = [len(tokenizer.decode(ids[:count])) - len("<s>") for count in range(1, len(ids) + 1)]
    front = sum(end <= len(head) for end in ends)
    return front, sum(len(head) < end <= len(head) + len(text) for end in ends)


@every_template
@pytest.mark.parametrize("instruction", ["", INSTRUCTION])
@pytest.mark.parametrize("pool_tail", [True, False])
@pytest.mark.parametrize("append_eos", [True, False])
def test_truncation_at_every_length(tokenizer, template, instruction, pool_tail, append_eos):
    head, text, tail = parts(template, instruction, LONG)
    ids = tokenizer(head + text + tail).input_ids
    front, body = spelled_layout(tokenizer, ids, head, text)
    closing = [tokenizer.eos_token_id] if append_eos else []
    fixed = len(ids) - body + len(closing)
    lengths_that_fit = 0
    for max_length in range(1, fixed + body + 3):
        try:
            text_format = TextFormat(tokenizer, max_length, template, pool_tail=pool_tail, append_eos=append_eos)
        except ConfigError as refused:
            message = str(refused)
            assert max_length <= fixed
            assert f"max_length {max_length} leaves no token to a text" in message
            continue
        heads, texts = ["", encoding_head(instruction), ""], ["a", LONG, "a"]  # the text in question in the middle
        if max_length <= fixed:
            with pytest.raises(BivecError, match=rf"text 1: .* max_length {max_length} .* never cut; raise max_length"):
                text_format.rows(heads, texts)
            continue
        row = text_format.rows(heads, texts)[1]
        kept = min(body, max_length - fixed)
        assert row.input_ids == ids[: front + kept] + ids[front + body :] + closing
        assert len(row.input_ids) == min(max_length, fixed + body)
        assert row.start == (front if head else 0)
        assert row.end == (len(row.input_ids) if pool_tail or append_eos else front + kept)
        assert kept >= 1 and tokenizer.decode(row.input_ids).removesuffix("</s>").endswith(tail)
        lengths_that_fit += 1
    assert lengths_that_fit == body + 2


def test_error_counts_the_tokens_that_stay():
    tokenizer = byte_fallback()
    text_format = TextFormat(tokenizer, 12, "[INST] {text} [/INST]")
    front = len(tokenizer(f"[INST] {INSTRUCTION}").input_ids)
    message = f"text 2: .* max_length 12 .* take {front} in front of it and 1 behind it.* above {front + 1} or shorten"
    with pytest.raises(BivecError, match=message):
        text_format.rows(["", "", encoding_head(INSTRUCTION)], ["a", "b", "blue"])


def test_template_that_fills_max_length():
    """At once, not at the first text."""
    tokenizer = byte_level()
    shortest = len(tokenizer("[INST] a [/INST]").input_ids)
    with pytest.raises(ConfigError, match=rf"max_length {shortest - 1} leaves no token .* takes {shortest}; raise"):
        TextFormat(tokenizer, shortest - 1, TEMPLATES["mistral"])
    (row,) = TextFormat(tokenizer, shortest, TEMPLATES["mistral"]).rows([""], ["a"])
    assert len(row.input_ids) == shortest
    with pytest.raises(ConfigError, match=f"takes {shortest + 1}"):
        TextFormat(tokenizer, shortest, TEMPLATES["mistral"], append_eos=True)


def merging():
    """A BPE with a merge over every boundary of head, text and tail, and none inside of text and tail."""
    letters = ["<s>", "</s>", *"ahtxzyr"]
    merged = ["ht", "htx", "htxz", "htxzy", "zy", "tr"]
    pairs = [("h", "t"), ("ht", "x"), ("htx", "z"), ("htxz", "y"), ("z", "y"), ("t", "r")]
    vocabulary = {token: number for number, token in enumerate(letters + merged)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    backend.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    return with_bos(backend)


def test_merges_over_the_boundaries():
    """Issues #80 and #105 of the original: the suffix tokenised alone is longer than the whole row."""
    tokenizer = merging()
    (row,) = TextFormat(tokenizer, 4, "h{text}y").rows([""], ["txz"])
    assert row == Row(tokenizer.convert_tokens_to_ids(["<s>", "htxzy"]), 1, 2)
    assert len(tokenizer("txzy", add_special_tokens=False).input_ids) == 3 > len(row.input_ids)
    for pool_tail in (True, False):
        # "zy" is both text and tail: pooled in both modes, and never cut
        text_format = TextFormat(tokenizer, 4, "r{text}y", pool_tail=pool_tail)
        (row,) = text_format.rows([""], ["xxxxxxz"])
        assert row == Row(tokenizer.convert_tokens_to_ids(["<s>", "r", "x", "zy"]), 2, 4)
        (row,) = text_format.rows(["x"], ["xxz"])
        assert row == Row(tokenizer.convert_tokens_to_ids(["<s>", "r", "x", "zy"]), 3, 4)
        with pytest.raises(BivecError, match=r"text 1: .* 4 in front of it and 1 behind"):
            text_format.rows(["", "xx"], ["x", "xxz"])
    (row,) = TextFormat(tokenizer, 9, "r{text}ry", pool_tail=False).rows(["x"], ["xt"])
    assert row == Row(tokenizer.convert_tokens_to_ids(["<s>", "r", "x", "x", "tr", "y"]), 3, 5)


@pytest.mark.parametrize("template", [None, "[INST] {text} [/INST]", "{text}<|im_end|>", "🙂{text}🙂"])
def test_characters_of_several_tokens(tokenizer, template):
    """They share one pair of offsets; none of their tokens may be lost at a boundary."""
    text = "🙂你好🙂"
    offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    assert len(offsets) - 1 > len(set(offsets[1:]))
    head, _, tail = parts(template, "", text)
    for pool_tail in (True, False):
        text_format = TextFormat(tokenizer, 512, template, pool_tail=pool_tail, pool_bos=False)
        (row,) = text_format.rows([""], [text])
        assert_span(tokenizer, row, head, text, tail)
        assert (row.end == len(row.input_ids)) is (pool_tail or not tail)
    whole = row.input_ids
    for max_length in range(len(whole) - (row.end - row.start) + 1, len(whole) + 1):
        (cut,) = TextFormat(tokenizer, max_length, template, pool_tail=False).rows([""], [text])
        gone = len(whole) - max_length
        assert cut.input_ids == whole[: row.end - gone] + whole[row.end :] and cut.end == row.end - gone


@settings(max_examples=150, deadline=None)
@given(
    template=st.sampled_from([None, *TEMPLATES.values(), "{text}\n\n", "a{text}a"]),
    instruction=st.sampled_from(["", INSTRUCTION, "🙂"]),
    # the marks that decoding leaves for halves of a character, and that SentencePiece has for a space, spell no text
    text=st.text(
        st.sampled_from("aA .,\n\t_[]<|>🙂你é\u0301\u200b{}")
        | st.characters(codec="utf-8", exclude_characters="\ufffd▁")
    ).filter(str.strip),
    max_length=st.integers(60, 90),
)
def test_any_text(tokenizer, template, instruction, text, max_length):
    whole, cut = (
        TextFormat(tokenizer, length, template, pool_tail=False, pool_bos=False).rows(
            [encoding_head(instruction)], [text]
        )[0]
        for length in (10_000, max_length)
    )
    assert_span(tokenizer, whole, *parts(template, instruction, text))
    gone = len(whole.input_ids) - len(cut.input_ids)
    assert gone == max(0, len(whole.input_ids) - max_length)
    assert whole.start == cut.start < cut.end == whole.end - gone
    slices = range(whole.start, whole.end - gone + 1)  # where a run of text tokens can be missing
    assert any(cut.input_ids == whole.input_ids[:at] + whole.input_ids[at + gone :] for at in slices)
    assert tokenizer.decode(cut.input_ids).endswith(parts(template, instruction, text)[2])


def test_empty_and_blank_texts(tokenizer):
    head = encoding_head(INSTRUCTION)
    for template in (None, *TEMPLATES.values()):
        text_format = TextFormat(tokenizer, 60, template, pool_bos=False, pool_tail=False)
        rows = text_format.rows([head, "", head, ""], ["", "", " \n ", "\t" * 100_000], allow_empty=True)
        for row in rows:
            assert (row.start, row.end) == (0, len(row.input_ids)) and 1 <= len(row.input_ids) <= 60
        assert rows[0].input_ids == tokenizer(head.join((template or "{text}").split("{text}"))).input_ids
        for text in ("", " ", "\n\u00a0"):
            with pytest.raises(BivecError, match="text 1: is empty or blank"):
                text_format.rows(["", "", ""], ["a", text, "b"])
    with pytest.raises(BivecError, match=r"text 1: .* max_length 12 "):
        TextFormat(tokenizer, 12).rows(["", head], ["", ""], allow_empty=True)
    assert TextFormat(tokenizer, 60).rows([], []) == []


def test_text_of_characters_without_tokens():
    """A normaliser may drop all there is."""
    tokenizer = merging()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("é", "")
    text_format = TextFormat(tokenizer, 8, "h{text}y", pool_bos=False)
    with pytest.raises(BivecError, match="text 0: is empty or blank"):
        text_format.rows([""], ["é"])
    (row,) = text_format.rows([""], ["é"], allow_empty=True)
    assert (row.start, row.end) == (0, 3) == (0, len(row.input_ids))


def test_very_long_texts(tokenizer):
    text_format = TextFormat(tokenizer, 512, TEMPLATES["llama-3"], pool_tail=False)
    texts = ["word " * 20_000, "x" * 100_000, "🙂" * 100_000, "short"]
    rows = text_format.rows([encoding_head(INSTRUCTION)] * 4, texts)
    assert [len(row.input_ids) for row in rows[:3]] == [512] * 3 and len(rows[3].input_ids) < 100
    for row, text in zip(rows, texts, strict=True):
        (eot,) = row.input_ids[row.end :]
        assert tokenizer.decode([eot]) == "<|eot_id|>"
        assert text.startswith(tokenizer.decode(row.input_ids[row.start : row.end]).strip(" \ufffd"))


@pytest.mark.parametrize("name", TEMPLATES)
def test_text_that_spells_the_template(tokenizer, name):
    """Markers, the slot and a closing EOS in a user's text are text: pooled, and cut like any other."""
    template = TEMPLATES[name]
    text = f"{{text}} {template} [/INST]{''.join(MARKERS)} {{text}}</s>"
    head, text, tail = parts(template, INSTRUCTION, text)
    for pool_tail in (True, False):
        text_format = TextFormat(tokenizer, 512, template, pool_tail=pool_tail)
        (row,) = text_format.rows([encoding_head(INSTRUCTION)], [text])
        assert_span(tokenizer, row, head, text, tail)
        assert (row.end == len(row.input_ids)) is (pool_tail or not tail)
    gone = row.end - row.start - 1
    (cut,) = TextFormat(tokenizer, len(row.input_ids) - gone, template).rows([encoding_head(INSTRUCTION)], [text])
    assert cut.input_ids == row.input_ids[: row.start + 1] + row.input_ids[row.end :]


def test_tokenizer_that_appends_a_token():
    tokenizer = copy.deepcopy(byte_fallback())
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    for template in (None, "[INST] {text} [/INST]"):
        whole = tokenizer((template or "{text}").replace("{text}", LONG)).input_ids
        for append_eos in (True, False):  # never twice
            (row,) = TextFormat(tokenizer, 512, template, append_eos=append_eos).rows([""], [LONG])
            assert row.input_ids == whole and row.end == len(whole)
        (row,) = TextFormat(tokenizer, 512, template, pool_tail=False).rows([""], [LONG])
        assert tokenizer.decode(row.input_ids[row.start : row.end]).strip().removeprefix("<s>") == LONG
        (row,) = TextFormat(tokenizer, 30, template).rows([""], [LONG])
        behind = 1 if template is None else 2
        assert row.input_ids == whole[: 30 - behind] + whole[-behind:]


def test_eos_is_the_last_pooled_token():
    tokenizer = byte_level()
    for template in (None, "{text}</s>", TEMPLATES["qwen-2"]):
        for pool_tail in (True, False):
            text_format = TextFormat(tokenizer, 20, template, pool_tail=pool_tail, append_eos=True)
            for text in ("A lobster.", LONG, "written out </s>", LONG + "</s>"):
                (row,) = text_format.rows([""], [text])
                assert row.input_ids[row.end - 1] == 1 and row.end == len(row.input_ids) <= 20
                assert row.input_ids[-2] != 1 or template == "{text}</s>"
    with pytest.raises(ConfigError, match="'eos_token': the tokenizer has no EOS; choose 'last_token'"):
        TextFormat(PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE())), 8, append_eos=True)


def test_settings_left_in_the_tokenizer_do_not_count():
    tokenizer = copy.deepcopy(byte_fallback())
    expected = TextFormat(tokenizer, 512).rows(["", ""], [LONG, "x"])
    text_format = TextFormat(tokenizer, 512)  # made before, used after
    tokenizer(["x", LONG], truncation=True, max_length=4, padding=True)
    assert tokenizer.backend_tokenizer.truncation and tokenizer.backend_tokenizer.padding
    assert text_format.rows(["", ""], [LONG, "x"]) == expected


def test_pickling():
    text_format = TextFormat(byte_level(), 20, TEMPLATES["mistral"], pool_bos=False)
    copied = pickle.loads(pickle.dumps(text_format))
    assert copied.rows([""], [LONG]) == text_format.rows([""], [LONG])


def test_lone_surrogates_are_named():
    text_format = TextFormat(byte_level(), 20)
    with pytest.raises(BivecError, match=r"text 1: '\\ud83d' is half of a surrogate pair"):
        text_format.rows(["", "", ""], ["a", "b \ud83d", "c"])


def test_heads():
    assert training_head("Given a claim") == "Given a claim; " and training_head("") == training_head("  ") == ""
    assert encoding_head("Given a claim: ") == "Given a claim: " and encoding_head("") == encoding_head(" \n") == ""
    assert encoding_head("Given a claim") == "Given a claim "


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("meta-llama/Meta-Llama-3-8B-Instruct", "llama-3"),
        ("mistralai/Mistral-7B-Instruct-v0.2", "mistral"),
        ("meta-llama/Llama-2-7b-chat-hf", "llama-2"),
        ("google/gemma-2-9b-it", "gemma-2"),
        ("Qwen/Qwen2-1.5B-Instruct", "qwen-2"),
        ("Qwen/Qwen2-7B-Instruct", "qwen-2"),
        ("meta-llama/Meta-Llama-3.1-8B-Instruct", None),
        ("princeton-nlp/Sheared-LLaMA-1.3B", None),
        ("./my-copy/Mistral-7B-Instruct-v0.2", None),
        ("mistralai/Mistral-7B-Instruct-v0.1", None),
        ("", None),
    ],
)
def test_template_by_the_models_name(model, name):
    assert template_of(model) == name
    assert resolve_template(None, model) == (TEMPLATES[name] if name else None)
    # whatever the model is called, an explicit choice counts
    assert resolve_template("none", model) is None
    for explicit, template in TEMPLATES.items():
        assert resolve_template(explicit, model) == template
    assert resolve_template("say {text}!", model) == "say {text}!"


def test_templates_are_those_of_the_original():
    """METHOD 5.3, character by character."""
    assert TEMPLATES == {
        "llama-3": "<|start_header_id|>user<|end_header_id|>" + "\n\n" + "{text}" + "<|eot_id|>",
        "mistral": "[INST] " + "{text}" + " [/INST]",
        "llama-2": "[INST] " + "{text}" + " [/INST]",
        "gemma-2": "<bos><start_of_turn>user" + "\n" + "{text}" + "<end_of_turn>",
        "qwen-2": "<|im_start|>user" + "\n" + "{text}" + "<|im_end|>",
    }


@pytest.mark.parametrize("given_", ["lama-3", "", "Mistral", "{text} and {text}", "{ text }", 3])
def test_wrong_templates(given_):
    for model in ("mistralai/Mistral-7B-Instruct-v0.2", "mine"):
        with pytest.raises(ConfigError, match="choose one of llama-3, mistral, llama-2, gemma-2, qwen-2, none, or"):
            resolve_template(given_, model)
    if isinstance(given_, str):
        with pytest.raises(ConfigError, match="exactly once"):
            TextFormat(byte_level(), 9, given_)
