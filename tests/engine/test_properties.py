"""Properties of the data path on any input: word spans and offsets, blocks, samplers, their shards and resumes.

Packing, masking, batches of triples and the schedule have theirs in the files of their modules.
"""

from __future__ import annotations

from itertools import accumulate, chain, pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from bivec.engine.data import mntp_blocks, sentence_ids
from bivec.engine.distributed import World
from bivec.engine.errors import ConfigError, DataError
from bivec.engine.evaluation.word_features import align, word_spans
from bivec.engine.grad_cache import PackedRows, StepRows, micro_batches
from bivec.engine.objectives import SimcseObjective
from bivec.engine.packing import indices_for_step
from bivec.engine.supervised import TripleRows
from bivec.engine.text_format import TextFormat
from bivec.engine.tokenizer import load_tokenizer
from bivec.engine.triples import Triple

few = settings(max_examples=40, deadline=None, derandomize=True)
seeds = st.integers(0, 2**64 - 1)
# letters that the tokenizer joins and splits, characters of several bytes, marks that stand on the letter before
letters = st.sampled_from("aeinothT.,'-_<>") | st.sampled_from("éüß世界🙂\u0301\u200b")
words = st.text(letters, min_size=1, max_size=8)
texts = st.lists(words, min_size=1, max_size=12).map(" ".join)


@pytest.fixture(scope="module")
def tokenizer(tiny_llama_dir):
    return load_tokenizer(tiny_llama_dir)


@pytest.fixture(scope="module")
def spacious():
    """One whose tokens have spaces at either end, and reach over several words."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    ends = [f"{word} {letter}" for word in ("a", "in", "the", "to", "世") for letter in "bcdfgjklmp"]
    backend.train_from_iterator([*ends, "in the on to it is at 世 é", "on the tin of the hat"] * 2, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def encoder_of(tokenizer, max_length=10_000):
    return SimpleNamespace(tokenizer=tokenizer, config=SimpleNamespace(max_length=max_length))


def spans_by_characters(encoding, sentence):
    """The word spans, said naively: a token is of the words whose characters it has, a lone space of the next word."""
    starts = list(accumulate((len(word) + 1 for word in sentence), initial=0))
    spaces = {start - 1: index for index, start in enumerate(starts[:-1]) if index}
    marks = list(zip(encoding.offsets, encoding.special_tokens_mask, strict=True))
    found = []
    for index, word in enumerate(sentence):
        own = set(range(starts[index], starts[index] + len(word)))
        tokens = []
        for token, ((start, end), special) in enumerate(marks):
            characters = set(range(start, end))
            lone = len(characters) == 1 and spaces.get(start) == index
            if not special and (characters & own or lone):
                tokens.append(token)
        found.append((tokens[0], tokens[-1] + 1) if tokens else (0, 0))
    return found


@few
@given(sentences=st.lists(st.lists(words | st.sampled_from(["the", "in", "to", "a"]), max_size=6), max_size=5))
def test_words_own_the_tokens_of_their_characters(tokenizer, spacious, sentences):
    for one in (tokenizer, spacious):
        assert_words_own_their_tokens(one, sentences)


def assert_words_own_their_tokens(tokenizer, sentences):
    spans = word_spans(encoder_of(tokenizer), sentences)
    assert spans.offsets.tolist() == list(accumulate(map(len, sentences), initial=0))
    for index, (sentence, row) in enumerate(zip(sentences, spans.rows, strict=True)):
        encoding = tokenizer.backend_tokenizer.encode(" ".join(sentence))
        bounds = slice(spans.offsets[index], spans.offsets[index + 1])
        found = list(zip(spans.starts[bounds].tolist(), spans.ends[bounds].tolist(), strict=True))
        assert row == encoding.ids
        assert found == spans_by_characters(encoding, sentence)
        owned = set(chain.from_iterable(range(*span) for span in found))
        assert owned == {i for i, special in enumerate(encoding.special_tokens_mask) if not special}  # none is lost


@few
@given(data=st.data(), sentences=st.lists(st.lists(words, min_size=1, max_size=8), min_size=1, max_size=4))
def test_a_cut_row_has_the_whole_words_that_fit(tokenizer, data, sentences):
    max_length = data.draw(st.integers(1, 20))
    whole, cut = (word_spans(encoder_of(tokenizer, length), sentences) for length in (10_000, max_length))
    assert cut.rows == [row[:max_length] for row in whole.rows]
    for start, end, cut_start, cut_end in zip(whole.starts, whole.ends, cut.starts, cut.ends, strict=True):
        assert (cut_start, cut_end) == ((start, end) if end <= max_length else (0, 0))


@few
@given(sentences=st.lists(st.lists(words, min_size=1, max_size=5), min_size=1, max_size=4), data=st.data())
def test_word_spans_do_not_depend_on_the_company(tokenizer, sentences, data):
    order = data.draw(st.permutations(range(len(sentences))))
    whole = word_spans(encoder_of(tokenizer), sentences)
    mixed = word_spans(encoder_of(tokenizer), [sentences[i] for i in order])
    assert mixed.rows == [whole.rows[i] for i in order]
    for mine, theirs in ((mixed.starts, whole.starts), (mixed.ends, whole.ends)):
        parts = np.split(theirs, whole.offsets[1:-1])
        assert mine.tolist() == [value for i in order for value in parts[i].tolist()]


@few
@given(sentence=st.lists(words, min_size=1, max_size=8))
def test_alignments_are_shifts_of_one_another(tokenizer, sentence):
    """The BOS in front: every word can be read one position to the left, and no span leaves its row."""
    spans = word_spans(encoder_of(tokenizer, 6), [sentence])
    has_token = spans.ends > spans.starts
    same, following, first = (align(spans, name) for name in ("same_token", "next_token", "first"))
    np.testing.assert_array_equal(np.array(same) - has_token, following)
    np.testing.assert_array_equal(first[0], same[0])
    np.testing.assert_array_equal(first[1] - first[0], has_token)
    for starts, ends in (same, following, first):
        assert ((starts >= 0) & (starts <= ends) & (ends <= len(spans.rows[0]))).all()


@few
@given(data=st.data(), pairs=st.lists(st.tuples(st.sampled_from(["", "Find it: "]), texts), min_size=1, max_size=6))
def test_rows_of_texts_do_not_depend_on_the_company(tokenizer, data, pairs):
    max_length = data.draw(st.integers(12, 40))
    text_format = TextFormat(tokenizer, max_length, data.draw(st.sampled_from([None, "a {text} b"])))
    heads, strings = zip(*pairs, strict=True)
    alone = [text_format.rows([head], [string])[0] for head, string in pairs]
    assert text_format.rows(heads, strings) == alone
    assert all(0 <= row.start < row.end <= len(row.input_ids) <= max_length for row in alone)


@few
@given(rows=st.lists(texts | st.just(""), max_size=8), block_size=st.integers(1, 12), group_size=st.integers(1, 4))
def test_every_token_lands_in_one_block(tokenizer, rows, block_size, group_size):
    """In order, up to the rest of each group."""
    expected = []
    for start in range(0, len(rows), group_size):
        stream = [token for row in rows[start : start + group_size] for token in tokenizer(row).input_ids]
        expected += [stream[at : at + block_size] for at in range(0, len(stream) - block_size + 1, block_size)]
    if not expected:
        with pytest.raises(DataError, match=f"do not fill one block of {block_size}"):
            mntp_blocks(rows, tokenizer, block_size, group_size=group_size)
        return
    blocks = mntp_blocks(rows, tokenizer, block_size, group_size=group_size)
    assert blocks.input_ids.tolist() == expected
    assert len(blocks) == len(expected) and blocks.block_size == block_size
    special = set(tokenizer.all_special_ids)
    assert blocks.special_mask.tolist() == [[token in special for token in block] for block in expected]


@few
@given(rows=st.lists(texts, min_size=1, max_size=8), block_size=st.integers(2, 12), per_call=st.integers(1, 4))
def test_every_token_lands_in_one_block_behind_a_bos(tokenizer, rows, block_size, per_call):
    """As one stream, however many rows are tokenised at a time."""
    stream = [token for row in rows for token in tokenizer(row, add_special_tokens=False).input_ids]
    body = block_size - 1
    assume(len(stream) >= body)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bivec.engine.data.TOKENIZE_ROWS", per_call)
        blocks = mntp_blocks(rows, tokenizer, block_size, per_block_bos=True)
    assert set(blocks.input_ids[:, 0]) == {tokenizer.bos_token_id} and blocks.special_mask[:, 0].all()
    assert blocks.input_ids[:, 1:].ravel().tolist() == stream[: len(stream) // body * body]


@few
@given(rows=st.lists(texts, max_size=6), max_length=st.integers(2, 12), per_call=st.integers(1, 3))
def test_sentences_are_their_own_tokens_cut_at_the_tail(tokenizer, rows, max_length, per_call):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bivec.engine.data.TOKENIZE_ROWS", per_call)
        dataset = sentence_ids(rows, tokenizer, max_length)
    expected = [tokenizer(row.strip()).input_ids[:max_length] for row in rows]
    assert [dataset[i] for i in range(len(dataset))] == expected
    assert dataset.lengths.tolist() == list(map(len, expected))


@given(count=st.integers(0, 200), size=st.integers(1, 64))
@settings(few, max_examples=100)
def test_ranks_share_everything_once(count, size):
    """In order, in parts that differ by one at most, the larger ones first."""
    if count < size:
        with pytest.raises(ConfigError, match=f"a batch of {count} cannot be shared by {size} processes"):
            World(0, size).share(count)
        return
    parts = [World(rank, size).share(count) for rank in range(size)]
    assert list(chain.from_iterable(parts)) == list(range(count))
    assert [len(part) for part in parts] == World(0, size).shares(count) == sorted(map(len, parts), reverse=True)
    assert len(parts[0]) - len(parts[-1]) <= 1


@few
@given(data=st.data(), n=st.integers(1, 40), seed=seeds, first=st.integers(0, 30))
def test_a_resumed_order_is_the_tail_of_the_whole(data, n, seed, first):
    """Whatever was asked for in between: nothing is kept from one step to the next."""
    batch_size = data.draw(st.integers(1, n))
    whole = [indices_for_step(n, batch_size, seed, step).tolist() for step in range(first + 6)]
    asked = data.draw(st.permutations(range(first, first + 6)))
    resumed = {step: indices_for_step(n, batch_size, seed, step).tolist() for step in asked}
    assert [resumed[step] for step in range(first, first + 6)] == whole[first:]


def simcse_of(sentences, batch_size, seed, skip_prefix, world=None):
    options = {} if world is None else {"world": world}
    return SimcseObjective(torch.nn.Identity(), None, sentences, batch_size, seed, skip_prefix=skip_prefix, **options)


@few
@given(data=st.data(), lengths=st.lists(st.integers(1, 6), min_size=2, max_size=12), seed=seeds, step=st.integers(0, 9))
def test_ranks_together_have_the_step_of_one(data, lengths, seed, step):
    """Both views of every sentence, under the dropout keys that one rank would give them."""
    sentences = [[100 * i + j for j in range(length)] for i, length in enumerate(lengths)]
    batch_size = data.draw(st.integers(2, len(sentences)))
    size, skip_prefix = data.draw(st.integers(1, batch_size)), data.draw(st.integers(0, 3))
    whole = simcse_of(sentences, batch_size, seed, skip_prefix).rows(step)
    parts = [simcse_of(sentences, batch_size, seed, skip_prefix, World(rank, size)).rows(step) for rank in range(size)]
    assert sorted(named(whole)) == sorted(chain.from_iterable(map(named, parts)))
    chosen = [sentences[row] for row in indices_for_step(len(sentences), batch_size, seed, step)]
    assert list(whole.input_ids) == chosen * 2
    assert whole.sample_ids.tolist() == list(range(2 * batch_size * step, 2 * batch_size * (step + 1)))  # never again
    for ids, (start, end) in zip(whole.input_ids, whole.spans, strict=True):
        assert (start, end) == (min(skip_prefix, len(ids)), len(ids))


def named(rows: StepRows) -> list[tuple]:
    """The sequences of a step with their keys and spans."""
    return [
        (int(sample), tuple(ids), *span.tolist())
        for sample, ids, span in zip(rows.sample_ids, rows.input_ids, rows.spans, strict=True)
    ]


@few
@given(
    data=st.data(),
    negatives=st.lists(st.integers(0, 3), min_size=1, max_size=6),
    step=st.integers(0, 5),
)
def test_ranks_together_have_the_triples_of_one(tokenizer, data, negatives, step):
    triples = [
        Triple(query=f"q{i}", positive=f"p{i}", negatives=[f"n{i} {j}" for j in range(count)])
        for i, count in enumerate(negatives)
    ]
    size = data.draw(st.integers(1, len(triples)))
    rows = TripleRows(SimpleNamespace(), TextFormat(tokenizer, 64))
    whole = rows.of(step, triples)
    parts = [rows.of(step, triples, World(rank, size)) for rank in range(size)]
    assert sorted(named(whole)) == sorted(chain.from_iterable(map(named, parts)))
    texts_of = [triple.query for triple in triples] + [triple.positive for triple in triples]
    texts_of += [text for triple in triples for text in triple.negatives]
    assert list(whole.input_ids) == [tokenizer(text).input_ids for text in texts_of]
    assert len(set(whole.sample_ids.tolist())) == len(texts_of)
    assert not set(whole.sample_ids) & set(rows.of(step + 1, triples).sample_ids)


@few
@given(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=20),
    budget=st.none() | st.just("all") | st.integers(1, 60),
)
def test_micro_batches_hold_every_sequence_once(lengths, budget):
    """And packed rows keep their tokens, spans and keys in any of them."""
    if budget == "all":  # what just fits is not cut
        budget = max(1, sum(lengths))
    sequences = [[100 * i + j for j in range(length)] for i, length in enumerate(lengths)]
    spans = np.array([(min(1, length), length) for length in lengths])
    rows = StepRows(sequences, spans, 7 + np.arange(len(lengths)))
    parts = micro_batches(rows.lengths, budget)
    assert sorted(chain.from_iterable(parts)) == list(range(len(lengths)))
    if budget is None or sum(lengths) <= budget:
        assert parts == [list(range(len(lengths)))]
    else:
        assert all(sum(lengths[i] for i in part) <= budget or len(part) == 1 for part in parts)
    for part in parts:
        packed = PackedRows.of(rows, part)
        assert packed.places.tolist() == part and packed.batch.sample_ids.tolist() == [7 + i for i in part]
        for i, (start, end) in zip(part, packed.spans.tolist(), strict=True):
            assert packed.batch.input_ids[start:end].tolist() == sequences[i][1:]
        assert all(first[1] <= second[0] for first, second in pairwise(packed.spans.tolist()))
