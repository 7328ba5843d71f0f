"""The limit on a text's own tokens: whole words go, and only as many as must (METHOD 7.1).

The oracle tokenises the text without its last words, again and again, until what is left is short enough.
"""

import re
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from bivec import Encoder
from bivec.engine.errors import ConfigError
from bivec.engine.sentencepiece_bpe import sentencepiece_backend
from bivec.engine.text_format import TEMPLATES, TextFormat, encoding_head

INSTRUCTION = "Retrieve semantically similar text:"
LONG = "The red colour only appears after cooking, which takes a large pot of boiling salted water."


def with_bos(backend):
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=False
    )


@cache
def byte_level():
    """The space before a word is the first character of its token."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<s>", "</s>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([LONG, INSTRUCTION, "A lobster is blue, and lobsters are many."], trainer)
    return with_bos(backend)


@cache
def byte_fallback():
    """As LLaMA-2 and Mistral: no pre-tokenisation, spaces inside the pieces, a byte token where there is no piece."""
    words = ("▁lobster", "▁is", "▁blue", "▁red", "▁text", "▁takes", "[INST]", "▁[/INST]", "▁▁")
    chains = dict.fromkeys(word[:length] for word in words for length in range(2, len(word) + 1))
    letters = dict.fromkeys("▁abcdefghijklmnopqrstuvwxyzAT[]/INST.,:;\n" + "".join(words))
    pieces = [("<s>", 0.0, 3), ("</s>", 0.0, 3), ("<unk>", 0.0, 2), ("<|eot_id|>", 0.0, 3)]
    pieces += [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)]
    pieces += [(piece, -float(rank), 1) for rank, piece in enumerate((*chains, *letters))]
    return with_bos(sentencepiece_backend(pieces, dummy_prefix=False, byte_fallback=True))


@pytest.fixture(scope="module", params=[byte_level, byte_fallback], ids=lambda build: build.__name__)
def tokenizer(request):
    return request.param()


def shortened(text_format, head, text, limit):
    """The row of the text without as many of its last words as are too many; None where no word is left."""
    ends = [match.end() for match in re.finditer(r"\S+", text)]
    rows = text_format.rows([head] * len(ends), [text[:end] for end in ends])
    fitting = [row for row in rows if row.end - row.start <= limit]
    return fitting[-1] if fitting else None


@pytest.mark.parametrize("template", [None, TEMPLATES["mistral"], TEMPLATES["llama-3"]])
@pytest.mark.parametrize("instruction", ["", INSTRUCTION])
def test_the_last_words_go_and_no_more_than_must(tokenizer, template, instruction):
    head = encoding_head(instruction)
    text_format = TextFormat(tokenizer, 512, template, pool_tail=False, pool_bos=False)
    (whole,) = text_format.rows([head], [LONG])
    length = whole.end - whole.start
    seen = set()
    for limit in range(1, length + 3):
        (row,) = text_format.rows([head], [LONG], max_text_length=limit)
        assert row.end - row.start <= limit
        expected = shortened(text_format, head, LONG, limit)
        if expected is None:  # not even the first word: cut inside it
            assert row.input_ids[: row.end] == whole.input_ids[: whole.start + limit]
        else:
            assert row == expected
            seen.add(row.end)
    assert row == whole
    assert len(seen) == len(LONG.split())  # the limits did bite, at every word


def test_the_limit_leaves_instruction_and_template_alone_and_max_length_comes_after_it(tokenizer):
    head = encoding_head("Find it:")
    fixed = len(TextFormat(tokenizer, 512, TEMPLATES["mistral"]).rows([head], ["a"])[0].input_ids)
    text_format = TextFormat(tokenizer, fixed + 11, TEMPLATES["mistral"])
    (by_text,) = text_format.rows([head], [LONG], max_text_length=4)
    (by_row,) = text_format.rows([head], [LONG], max_text_length=400)
    assert len(by_text.input_ids) < len(by_row.input_ids) == fixed + 11
    assert by_text.input_ids[: by_text.start] == by_row.input_ids[: by_row.start]
    assert tokenizer.decode(by_row.input_ids).endswith(" [/INST]")
    assert tokenizer.decode(by_text.input_ids).endswith(" [/INST]")
    assert by_row == text_format.rows([head], [LONG])[0]


def test_one_word_longer_than_the_limit_is_cut(tokenizer):
    word = "supercalifragilisticexpialidocious" * 3
    text_format = TextFormat(tokenizer, 512, pool_bos=False)
    for text in (word, f"\n  {word} and more"):
        (whole,) = text_format.rows([""], [text])
        (row,) = text_format.rows([""], [text], max_text_length=9)
        assert row.input_ids == whole.input_ids[: whole.start + 9]
        assert (row.start, row.end) == (whole.start, whole.start + 9)
    (row,) = text_format.rows([""], [f"It is {word}"], max_text_length=12)
    assert tokenizer.decode(row.input_ids[row.start :]) == "It is"


def test_short_and_blank_texts_are_as_they_were(tokenizer):
    text_format = TextFormat(tokenizer, 512)
    texts = ["A lobster is blue.", "", "   ", "你好，世界", "two\nlines  and   spaces"]
    heads = [""] * len(texts)
    longest = max(len(row.input_ids) for row in text_format.rows(heads, texts, allow_empty=True))
    limited = text_format.rows(heads, texts, allow_empty=True, max_text_length=longest)
    assert limited == text_format.rows(heads, texts, allow_empty=True)
    blank = text_format.rows([""], [" " * 400], allow_empty=True, max_text_length=5)[0]
    assert (blank.start, blank.end) == (0, len(blank.input_ids))


@settings(max_examples=60, deadline=None)
@given(text=st.text("ab é🙂\n\t世", min_size=1, max_size=40), limit=st.integers(1, 30))
def test_any_text_keeps_something_and_stays_below_the_limit(text, limit):
    for tokenizer in (byte_level(), byte_fallback()):
        text_format = TextFormat(tokenizer, 512, pool_bos=False)
        (whole,) = text_format.rows([""], [text], allow_empty=True)
        (row,) = text_format.rows([""], [text], allow_empty=True, max_text_length=limit)
        if text.strip():
            assert 1 <= row.end - row.start <= limit
        assert row.input_ids == whole.input_ids[: len(row.input_ids)]
        if len(row.input_ids) < len(whole.input_ids) and text.strip():
            kept = tokenizer.decode(row.input_ids, skip_special_tokens=True)
            whole_words = text.startswith(kept) and (text[len(kept)].isspace() or kept[-1].isspace())
            assert whole_words or len(kept.split()) == 1  # the first word may be cut, even inside a character


@pytest.mark.parametrize("limit", [0, -3])
def test_a_limit_below_one_is_refused(tokenizer, limit):
    with pytest.raises(ConfigError, match="at least 1 token"):
        TextFormat(tokenizer, 512).rows([""], ["a"], max_text_length=limit)


def test_encode_takes_the_limit(tiny_llama_dir):
    encoder = Encoder.from_pretrained(tiny_llama_dir)
    text = "The lobster is blue until it is cooked for a while in salted water."
    limited = encoder.encode(text, instruction="Find it:", max_text_length=6)
    ends = [match.end() for match in re.finditer(r"\S+", text)]
    lengths = [len(encoder.tokenizer(text[:end]).input_ids) - 1 for end in ends]  # without BOS
    words = sum(length <= 6 for length in lengths)
    assert 1 <= words < len(lengths)
    expected = encoder.encode(text[: ends[words - 1]], instruction="Find it:")
    np.testing.assert_allclose(limited, expected, atol=1e-6)
    assert np.abs(limited - encoder.encode(text, instruction="Find it:")).max() > 1e-3
