"""Word vectors: which tokens a word has, the two alignments, the cache."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bivec.engine.encoder import Encoder
from bivec.engine.errors import BivecError, ConfigError, RunError
from bivec.engine.evaluation.word_data import WordCorpus
from bivec.engine.evaluation.word_features import align, model_fingerprint, word_features, word_spans

SENTENCES = [
    ["The", "committee", "adjourned", "."],
    ["x"],
    ["Überraschung", ",", "日本", "🙂🙃", "ends", "antidisestablishmentarianism"],
    ["It", "'s", "over"],
]


class FakeEncoder:
    """Tokens are characters pairs of a word; the hidden state of a token is its position and its row's length."""

    dimension = 2

    def __init__(self, tokenizer, max_length=64, scale=1.0):
        self.tokenizer, self.config, self.scale = tokenizer, SimpleNamespace(max_length=max_length), scale

    def hidden_states(self, rows, **_):
        assert all(rows)
        for indices in ([*range(1, len(rows))], [0]) if len(rows) > 1 else ([0],):  # in an order of its own
            lengths = torch.tensor([len(rows[i]) for i in indices])
            hidden = torch.cat([torch.arange(n, dtype=torch.float32) for n in lengths])
            hidden = torch.stack([hidden, lengths.repeat_interleave(lengths).float()], dim=1) * self.scale
            yield hidden, torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int(), indices


def corpus(sentences) -> WordCorpus:
    return WordCorpus("memory", tuple(map(tuple, sentences)), {}, tuple(range(len(sentences))))


def word_level(*, prefix="<s>", suffix=None, strip=""):
    """A fast tokenizer with one token for every two characters of a word; characters of ``strip`` vanish."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex("..?"), "isolated")]
    )
    if strip:
        backend.normalizer = normalizers.Replace(Regex(f"[{strip}]"), "")
    single = " ".join(part for part in (prefix, "$A", suffix) if part)
    if prefix or suffix:
        specials = [(token, backend.token_to_id(token)) for token in (prefix, suffix) if token]
        backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=specials)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=prefix, eos_token=suffix)


@pytest.fixture(scope="module")
def encoder(tiny_llama_dir):
    return Encoder.from_pretrained(tiny_llama_dir)


def test_the_papers_example():
    """BOS, t11 t12, t21 t22 t23, t31 at positions 0 … 6 (METHOD 6.1)."""
    fake = FakeEncoder(word_level())
    spans = word_spans(fake, [["aabb", "aabbcc", "aa"]])
    assert spans.rows == [[0, 2, 2, 2, 2, 2, 2]]
    assert list(zip(*align(spans, "same_token"), strict=True)) == [(1, 3), (3, 6), (6, 7)]
    # e1 = (BOS + t11) / 2, e2 = (t12 + t21 + t22) / 3, e3 = t23
    assert list(zip(*align(spans, "next_token"), strict=True)) == [(0, 2), (2, 5), (5, 6)]
    assert list(zip(*align(spans, "first"), strict=True)) == [(1, 2), (3, 4), (6, 7)]
    found = word_features(fake, corpus([["aabb", "aabbcc", "aa"]]), ["same_token", "next_token", "first"])
    expected = {
        "same_token": [[1.5, 7], [4, 7], [6, 7]],
        "next_token": [[0.5, 7], [3, 7], [5, 7]],
        "first": [[1, 7], [3, 7], [6, 7]],
    }
    for alignment, vectors in expected.items():
        np.testing.assert_allclose(found[alignment].vectors, vectors, rtol=1e-6)


def test_half_a_surrogate_pair_is_named(encoder):
    with pytest.raises(BivecError, match=r"^text 1: '.*ud83d' is half of a surrogate pair"):
        word_spans(encoder, [["a"], ["b", "\ud83d"]])


def test_tokens_of_a_byte_level_vocabulary_belong_to_their_words(encoder):
    spans = word_spans(encoder, SENTENCES)
    tokenizer = encoder.tokenizer
    for index, words in enumerate(SENTENCES):
        assert spans.rows[index] == tokenizer(" ".join(words)).input_ids
        first, last = spans.offsets[index : index + 2]
        assert last - first == len(words)
        end = 1  # behind the BOS; the words' tokens follow one another without a gap
        for word, start, stop in zip(words, spans.starts[first:last], spans.ends[first:last], strict=True):
            assert start == end
            assert tokenizer.decode(spans.rows[index][start:stop]).strip() == word
            end = stop
        assert end == len(spans.rows[index])


def test_vectors_are_means_over_the_hidden_states(encoder):
    found = word_features(encoder, corpus(SENTENCES), ["same_token", "next_token", "first"])
    states = encoder.encode_tokens([" ".join(words) for words in SENTENCES])
    spans = word_spans(encoder, SENTENCES)
    rows = np.repeat(np.arange(len(SENTENCES)), np.diff(spans.offsets))
    for alignment, shift in (("same_token", 0), ("next_token", 1)):
        expected = [
            states[row][start - shift : end - shift].mean(0).numpy()
            for row, start, end in zip(rows, spans.starts, spans.ends, strict=True)
        ]
        np.testing.assert_allclose(found[alignment].vectors, np.stack(expected), rtol=0, atol=2e-6)
    expected = np.stack([states[row][start].numpy() for row, start in zip(rows, spans.starts, strict=True)])
    np.testing.assert_allclose(found["first"].vectors, expected, rtol=0, atol=2e-6)


def test_two_passes_give_the_same_bits_even_in_train_mode(encoder):
    once = word_features(encoder, corpus(SENTENCES), ["same_token"])["same_token"].vectors
    encoder.model.train()
    try:
        again = word_features(encoder, corpus(SENTENCES), ["same_token"])["same_token"].vectors
    finally:
        encoder.model.eval()
    assert again.tobytes() == once.tobytes()


def test_neither_order_nor_batches_change_a_vector(encoder):
    once = word_features(encoder, corpus(SENTENCES), ["same_token"])["same_token"]
    other = word_features(encoder, corpus(SENTENCES[::-1]), ["same_token"], tokens_per_batch=1)["same_token"]
    parts = [other.vectors[start:end] for start, end in zip(other.offsets[:-1], other.offsets[1:], strict=True)]
    np.testing.assert_allclose(np.concatenate(parts[::-1]), once.vectors, rtol=0, atol=1e-5)


def test_words_without_tokens_have_no_vector():
    fake = FakeEncoder(word_level(strip="~"))
    found = word_features(fake, corpus([["~", "aa", "~~", "bb~", "~"], ["~"]]), ["same_token", "next_token"])
    for features, shift in ((found["same_token"], 0), (found["next_token"], 1)):
        assert features.present.tolist() == [False, True, False, True, False, False]
        assert features.vectors[:, 0].tolist() == [0, 1 - shift, 0, 2 - shift, 0, 0]
        assert features.num_missing == 4


def test_words_beyond_the_length_have_no_vector():
    # BOS, three words of one, two and two tokens, and what the tokenizer puts behind
    fake = FakeEncoder(word_level(suffix="</s>"), max_length=5)
    spans = word_spans(fake, [["aa", "aabb", "aabb"], ["aa"]])
    assert spans.rows == [[0, 2, 2, 2, 1], [0, 2, 1]]
    found = word_features(fake, corpus([["aa", "aabb", "aabb"], ["aa"]]), ["same_token", "next_token"])
    assert found["same_token"].present.tolist() == [True, True, False, True]
    assert found["same_token"].vectors.tolist() == [[1, 5], [2.5, 5], [0, 0], [1, 3]]
    assert found["next_token"].vectors.tolist() == [[0, 5], [1.5, 5], [0, 0], [0, 3]]
    # a word that is cut in two has none either
    fake.config.max_length = 4
    assert word_features(fake, corpus([["aa", "aabb"]]), ["same_token"])["same_token"].present.tolist() == [True, False]


def test_no_words_at_all(encoder):
    found = word_features(encoder, corpus([[], ["one"], []]), ["same_token"])["same_token"]
    assert found.offsets.tolist() == [0, 0, 1, 1]
    alone = word_features(encoder, corpus([["one"]]), ["same_token"])["same_token"]
    np.testing.assert_allclose(found.vectors, alone.vectors, rtol=0, atol=1e-5)
    assert word_features(encoder, corpus([]), ["same_token"])["same_token"].vectors.shape == (0, encoder.dimension)
    bare = FakeEncoder(word_level(prefix=None))  # an empty sentence has no token at all
    found = word_features(bare, corpus([["aa"], [], ["bb", "cc"]]), ["same_token"])["same_token"]
    assert found.vectors.tolist() == [[0, 1], [0, 2], [1, 2]]


def test_next_token_needs_a_token_in_front():
    fake = FakeEncoder(word_level(prefix=None))
    with pytest.raises(ConfigError, match="no token in front"):
        word_features(fake, corpus([["aa"]]), ["next_token"])
    assert word_features(fake, corpus([["aa"]]), ["same_token"])["same_token"].vectors.tolist() == [[0, 1]]


def test_unknown_alignment_and_slow_tokenizer(encoder):
    with pytest.raises(ConfigError, match="expected same_token, next_token, first"):
        word_features(encoder, corpus(SENTENCES), ["last"])
    with pytest.raises(ConfigError, match="fast"):
        word_spans(FakeEncoder(SimpleNamespace()), SENTENCES)


def test_a_state_that_is_not_finite_is_an_error(tmp_path):
    fake = FakeEncoder(word_level(), scale=1e6)  # too large for float16
    with pytest.raises(RunError, match="not finite in float16"):
        word_features(fake, corpus([["aa"]]), ["same_token"], cache_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert word_features(fake, corpus([["aa"]]), ["same_token"])["same_token"].vectors[0, 0] == 1e6


def test_cache_is_reused_only_for_the_same_inputs(tmp_path, encoder, tiny_mistral_dir):
    def make(encoder, sentences, alignments=("same_token", "next_token")):
        return word_features(encoder, corpus(sentences), alignments, cache_dir=tmp_path, name="test")

    def computed(found):
        return {alignment: features.computed for alignment, features in found.items()}

    memory = word_features(encoder, corpus(SENTENCES), ["same_token"])["same_token"]
    first = make(encoder, SENTENCES, ("same_token",))
    assert computed(first) == {"same_token": True}
    np.testing.assert_allclose(first["same_token"].vectors, memory.vectors, rtol=1e-3, atol=1e-6)
    both = make(encoder, SENTENCES)
    assert computed(both) == {"same_token": False, "next_token": True}
    assert both["same_token"].vectors.tobytes() == first["same_token"].vectors.tobytes()
    assert both["same_token"].offsets.tolist() == memory.offsets.tolist()
    assert computed(make(encoder, SENTENCES)) == {"same_token": False, "next_token": False}
    # other words, another model, another mask, other weights
    assert computed(make(encoder, [*SENTENCES[1:], ["y"]], ("same_token",))) == {"same_token": True}
    assert computed(make(Encoder.from_pretrained(tiny_mistral_dir), SENTENCES, ("same_token",))) == {"same_token": True}
    make(encoder, SENTENCES)
    fingerprints = {model_fingerprint(encoder)}
    encoder.config = SimpleNamespace(**{**vars(encoder.config), "causal": True})
    fingerprints.add(model_fingerprint(encoder))
    weight = next(parameter for parameter in encoder.model.parameters() if parameter.dim() == 2)
    with torch.no_grad():
        weight += 1e-3
    fingerprints.add(model_fingerprint(encoder))
    with torch.no_grad():
        weight -= 1e-3
    assert len(fingerprints) == 3


def test_a_damaged_cache_is_made_again(tmp_path):
    fake = FakeEncoder(word_level())

    def make():
        return word_features(fake, corpus([["aa", "bb"]]), ["same_token"], cache_dir=tmp_path)["same_token"]

    make()
    vectors, sidecar = tmp_path / "features-same_token.npy", tmp_path / "features-same_token.json"
    assert not make().computed
    assert json.loads(sidecar.read_text())["alignment"] == "same_token"
    vectors.write_bytes(vectors.read_bytes()[:-3])
    assert make().computed
    sidecar.write_text("{")
    assert make().computed
    assert sorted(file.name for file in tmp_path.iterdir()) == [sidecar.name, vectors.name]
