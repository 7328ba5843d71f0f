"""Echo: the second copy is what is pooled, it has seen the whole input, and both copies are cut alike."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bivec.engine.encoder import Encoder
from bivec.engine.errors import BivecError, ConfigError
from bivec.engine.evaluation.echo import REPETITION, EchoEncoder, token_span

TEXTS = [
    "The river froze over in January.",
    "Ships",
    "Nobody had seen the king’s new château, or so they said.",
    "see Ä 日本",
]


@pytest.fixture(scope="module")
def encoder(tiny_llama_dir):
    return Encoder.from_pretrained(tiny_llama_dir, causal=True, max_length=128)


def states(encoder: Encoder, ids: list[int]) -> torch.Tensor:
    ((hidden, _, _),) = encoder.hidden_states([ids])
    return hidden


@pytest.mark.parametrize("pooling", ["mean", "weighted_mean", "last_token"])
@pytest.mark.parametrize("text", TEXTS)
def test_the_second_copy_is_pooled(encoder, text, pooling):
    """Against the tokens counted from behind: byte-level pieces of the second copy are those of " text" alone."""
    echo = EchoEncoder(encoder, template="Say {text}, again {text}", pooling=pooling)
    copy = len(encoder.tokenizer(" " + text, add_special_tokens=False).input_ids)
    hidden = states(encoder, encoder.tokenizer(f"Say {text}, again {text}").input_ids)[-copy:]
    weights = {
        "mean": torch.ones(copy),
        "weighted_mean": torch.arange(1.0, copy + 1),
        "last_token": torch.eye(copy)[-1],
    }[pooling]
    expected = (hidden * weights[:, None]).sum(0) / weights.sum()
    np.testing.assert_allclose(echo.encode(text), expected.numpy(), atol=1e-5)


def test_the_second_copy_knows_the_future(encoder):
    """Its first token changes with the last word; that of the first copy, as of a plain row, cannot."""
    echo = EchoEncoder(encoder)
    rows = echo.echo_format.rows(["", ""], ["a cold grey morning", "a cold grey evening"])
    one, other = (states(encoder, row.input_ids) for row in rows)
    assert not torch.allclose(one[rows[0].start], other[rows[1].start], atol=1e-3)
    assert torch.allclose(one[:6], other[:6], atol=1e-6)  # BOS and the template's head


@pytest.mark.parametrize("text", TEXTS)
def test_offsets_cover_the_copy(encoder, text):
    echo = EchoEncoder(encoder)
    (row,) = echo.echo_format.rows([""], [text])
    assert encoder.tokenizer.decode(row.input_ids[row.start : row.end]).strip() == text
    assert row.end == len(row.input_ids)


def test_an_instruction_and_a_chat_template_stand_in_front_and_are_not_pooled(tiny_llama_dir):
    chat = Encoder.from_pretrained(tiny_llama_dir, causal=True, template="[INST] {text} [/INST]")
    echo = EchoEncoder(chat, template=REPETITION)
    (row,) = echo.echo_format.rows(["Find it: "], ["a boat"])
    assert chat.tokenizer.decode(row.input_ids, skip_special_tokens=True) == "[INST] Find it: a boat a boat [/INST]"
    assert chat.tokenizer.decode(row.input_ids[row.start : row.end]) == " a boat"
    plain, told = echo.encode("a boat"), echo.encode("a boat", instruction="Find it:")
    assert not np.allclose(plain, told, atol=1e-3)
    np.testing.assert_allclose(echo.encode([["Find it:", "a boat"]])[0], told, atol=1e-6)


@pytest.mark.parametrize("length", [24, 25, 40])
def test_both_copies_lose_the_same_characters(tiny_llama_dir, length):
    text = "one two three four five six seven eight nine ten " * 6
    short = Encoder.from_pretrained(tiny_llama_dir, causal=True, max_length=length)
    echo = EchoEncoder(short, template="First: {text} | second: {text} |")
    (row,) = echo.echo_format.rows([""], [text])
    first, second = (
        part.strip() for part in short.tokenizer.decode(row.input_ids[1:-1]).removeprefix("First:").split("| second:")
    )
    assert length - 4 <= len(row.input_ids) <= length  # an odd rest, and pieces that join differently at a cut
    assert first == second.removesuffix("|").strip() and text.startswith(first) and len(first) > 10
    assert short.tokenizer.decode(row.input_ids[row.start : row.end]).strip() == first


@pytest.mark.parametrize("limit", [1, 4, 7, 100])
def test_a_limit_on_a_copy_takes_whole_words(encoder, limit):
    """The same words as of a plain row, up to the blank before the first, which the tokenizer counts to it or not."""
    text = "One man saw extraordinary mountains yesterday"
    echo = EchoEncoder(encoder, template="Again: {text}; {text}")
    (row,) = echo.echo_format.rows([""], [text], max_text_length=limit)
    first, _, second = encoder.tokenizer.decode(row.input_ids[1:]).removeprefix("Again: ").partition("; ")
    assert first == second
    assert first and text.startswith(first)
    assert len(encoder.tokenizer(" " + first, add_special_tokens=False).input_ids) <= limit
    if limit > 1:  # a whole word
        assert f"{text} ".removeprefix(first).startswith(" ")
    longer = " ".join(text.split()[: len(first.split()) + 1])
    assert longer == text or len(encoder.tokenizer(" " + longer, add_special_tokens=False).input_ids) > limit
    same = echo.encode(text, max_text_length=limit)
    np.testing.assert_allclose(same, echo.encode(first), atol=1e-5)


def test_what_cannot_be(encoder, tiny_llama_dir, tmp_path):
    with pytest.raises(ConfigError, match="causal=True"):
        EchoEncoder(Encoder.from_pretrained(tiny_llama_dir))
    with pytest.raises(ConfigError, match="exactly twice"):
        EchoEncoder(encoder, template="{text}")
    with pytest.raises(ConfigError, match="not for Echo"):
        EchoEncoder(encoder, pooling="eos_token")
    with pytest.raises(ConfigError, match="a way to use an encoder"):
        EchoEncoder(encoder).save_pretrained(tmp_path)
    with pytest.raises(BivecError, match=r"text 0: no token is left .* of max_length 12"):
        EchoEncoder(Encoder.from_pretrained(tiny_llama_dir, causal=True, max_length=12)).encode(["a b c d"])
    with pytest.raises(BivecError, match=r"text 1: .*surrogate"):
        EchoEncoder(encoder).encode(["fine", "half \ud800"])


def test_an_empty_text_pools_the_whole_row(encoder):
    echo = EchoEncoder(encoder)
    ids = encoder.tokenizer("Rewrite the sentence: , rewritten sentence: ").input_ids
    np.testing.assert_allclose(echo.encode(""), states(encoder, ids).mean(0).numpy(), atol=1e-5)
    with pytest.raises(BivecError, match="text 0: is empty"):
        echo.echo_format.rows([""], [" \n"])


def test_batches_do_not_matter(encoder):
    echo = EchoEncoder(encoder)
    together = echo.encode(TEXTS)
    for index, text in enumerate(TEXTS):
        np.testing.assert_allclose(echo.encode(text), together[index], atol=1e-5)
    np.testing.assert_allclose(echo.encode(TEXTS[::-1], tokens_per_batch=1)[::-1], together, atol=1e-5)


def test_spans_of_characters():
    """The tokens "<s>", "a", " b", "c d", " " of the characters "a bc d "."""
    offsets = [(0, 0), (0, 1), (1, 3), (3, 6), (6, 7)]
    assert token_span(offsets, 0, 4) == (1, 4)  # "c d" reaches into it
    assert token_span(offsets, 0, 4, whole=True) == (1, 3)
    assert token_span(offsets, 2, 3) == (2, 3)  # a blank before the characters belongs to its token
    assert token_span(offsets, 7, 9) == (0, 0)
