"""The linear probe: what it learns, what it counts, and that it repeats."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from bivec.engine.errors import ConfigError, DataError, RunError
from bivec.engine.evaluation.word_features import WordFeatures
from bivec.engine.evaluation.word_probe import PRESETS, Probe, ProbeConfig, evaluate_probe, train_probe

LABELS = ("B-A", "I-A", "O")
FAST = ProbeConfig(learning_rate=0.05, steps=60)


def features(vectors, lengths, present=None) -> WordFeatures:
    vectors = np.asarray(vectors, np.float32)
    present = np.ones(len(vectors), bool) if present is None else np.array(present, bool)
    return WordFeatures(vectors, present, np.array([0, *np.cumsum(lengths)], np.int64), "same_token", computed=True)


def clusters(sentences: int, seed: int = 0, noise: float = 0.1):
    """Words of three kinds, told apart by their vectors: (features, labels)."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 6, sentences)
    kinds = rng.integers(0, 3, lengths.sum())
    vectors = np.eye(3, 8)[kinds] + noise * rng.normal(size=(len(kinds), 8))
    names = [LABELS[kind] for kind in kinds]
    ends = np.cumsum(lengths)
    return features(vectors, lengths), [names[end - n : end] for end, n in zip(ends, lengths, strict=True)]


def oracle(labels=LABELS) -> Probe:
    """A probe that passes vectors on as scores."""
    layer = nn.Linear(len(labels), len(labels))
    with torch.no_grad():
        layer.weight.copy_(torch.eye(len(labels)))
        layer.bias.zero_()
    width = len(labels)
    return Probe(labels, layer, torch.zeros(width), torch.ones(width), frozenset(labels))


def one_hot(names, labels=LABELS):
    return np.eye(len(labels))[[labels.index(name) for name in names]]


def test_presets_are_the_papers():
    paper, repository = PRESETS["paper"], PRESETS["repository"]
    assert (paper.learning_rate, paper.batch_size, paper.steps, paper.dropout) == (5e-4, 8, 1500, 0.1)
    assert (repository.learning_rate, repository.batch_size, repository.steps) == (5e-4, 8, 4000)
    assert (paper.decay_epochs, repository.decay_epochs, repository.weight_decay) == (None, 10.0, 0.0)
    assert not paper.standardize and not repository.standardize


def test_it_learns_what_is_linear():
    found, labels = clusters(80)
    probe = train_probe(found, labels, FAST)
    assert probe.labels == LABELS
    test, test_labels = clusters(40, seed=1)
    result = evaluate_probe(probe, test, test_labels, "ner")
    assert result.accuracy > 97
    assert result.f1 > 95
    untrained = replace(FAST, learning_rate=1e-9, steps=1)
    assert evaluate_probe(train_probe(found, labels, untrained), test, test_labels, "ner").accuracy < 80


def test_the_same_seed_gives_the_same_probe_and_leaves_the_generator_alone():
    found, labels = clusters(30)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    probes = [train_probe(found, labels, replace(FAST, seed=seed)) for seed in (1, 1, 2)]
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(probes[0].layer.weight, probes[1].layer.weight)
    assert torch.equal(probes[0].layer.bias, probes[1].layer.bias)
    assert not torch.equal(probes[0].layer.weight, probes[2].layer.weight)


def test_testing_is_without_dropout():
    found, labels = clusters(30, noise=1.0)
    probe = train_probe(found, labels, replace(FAST, dropout=0.9))
    results = [evaluate_probe(probe, found, labels, "ner") for _ in range(3)]
    assert results[0] == results[1] == results[2]
    scores = found.vectors @ probe.layer.weight.detach().numpy().T + probe.layer.bias.detach().numpy()
    assert probe.predict(found.vectors).tolist() == scores.argmax(axis=1).tolist()


def test_dropout_acts_while_training():
    found, labels = clusters(30)
    weights = [train_probe(found, labels, replace(FAST, dropout=p)).layer.weight for p in (0.0, 0.5)]
    assert not torch.allclose(*weights)


def test_scores_are_those_of_sklearn_and_seqeval():
    gold = [["B-A", "I-A", "O"], ["O", "B-A"], ["B-A"]]
    predicted = [["B-A", "I-A", "O"], ["B-A", "B-A"], ["O"]]
    flat = [name for row in predicted for name in row]
    found = features(one_hot(flat), [3, 2, 1])
    result = evaluate_probe(oracle(), found, gold, "chunking")
    assert result.accuracy == pytest.approx(100 * 4 / 6)
    # three spans there, three found, two right; [B-A, I-A] | [B-A] are two spans, the sentence ends between them
    assert result.f1 == pytest.approx(100 * 2 / 3)
    assert (result.num_words, result.num_missing, result.unseen_labels) == (6, 0, {})
    assert evaluate_probe(oracle(), found, gold, "pos").f1 is None


def test_a_word_without_a_vector_is_wrong():
    gold = [["O", "B-A"], ["O"]]
    found = features(one_hot(["O", "B-A", "O"]), [2, 1], present=[True, False, False])
    result = evaluate_probe(oracle(), found, gold, "ner")
    assert result.accuracy == pytest.approx(100 / 3)  # the last word is O, and a zero vector might well say so
    assert (result.num_missing, result.f1) == (2, 0.0)


def test_words_without_a_vector_teach_nothing():
    found, labels = clusters(30)
    broken = found.vectors.copy()
    broken[3:9] = 1e6
    present = np.ones(len(broken), bool)
    present[3:9] = False
    lengths = np.diff(found.offsets)
    for config in (FAST, replace(FAST, standardize=True)):
        one = train_probe(features(broken, lengths, present), labels, config)
        zeroed = np.where(present[:, None], found.vectors, 0)
        other = train_probe(features(zeroed, lengths, present), labels, config)
        assert torch.equal(one.layer.weight, other.layer.weight)


def test_a_sentence_without_vectors_or_words_is_skipped():
    found, labels = clusters(6)
    lengths = [0, *np.diff(found.offsets), 2, 0]
    vectors = np.concatenate([found.vectors, np.zeros((2, 8))])
    present = np.array([True] * len(found.vectors) + [False] * 2)
    probe = train_probe(features(vectors, lengths, present), [[], *labels, ["O", "O"], []], FAST)
    assert torch.isfinite(probe.layer.weight).all()


def test_labels_that_the_training_data_lacks():
    found, labels = clusters(40)
    gold = [["B-B" if name == "I-A" else name for name in row] for row in labels]
    result = evaluate_probe(train_probe(found, labels, FAST), found, gold, "ner")
    lacking = sum(row.count("B-B") for row in gold)
    assert result.unseen_labels == {"B-B": lacking}
    assert result.accuracy <= 100 * (1 - lacking / result.num_words)
    # a label of a fixed set may be predicted, but is unseen all the same
    probe = train_probe(found, labels, FAST, label_set=(*LABELS, "B-B"))
    assert probe.layer.out_features == 4
    assert evaluate_probe(probe, found, gold, "ner").unseen_labels == {"B-B": lacking}
    with pytest.raises(DataError, match="label 'B-B'"):
        train_probe(found, gold, FAST, label_set=LABELS)


def test_standardised_features_have_mean_0_and_deviation_1():
    found, labels = clusters(50)
    vectors = found.vectors * 1000 + 77
    vectors[:, 7] = 3.0  # constant
    probe = train_probe(features(vectors, np.diff(found.offsets)), labels, replace(FAST, standardize=True))
    inputs = probe.inputs(vectors)
    torch.testing.assert_close(inputs.mean(0), torch.zeros(8), rtol=0, atol=1e-4)
    torch.testing.assert_close(inputs.std(0, correction=0)[:7], torch.ones(7), rtol=0, atol=1e-3)
    assert evaluate_probe(probe, features(vectors, np.diff(found.offsets)), labels, "ner").accuracy > 97


def test_the_rate_falls_to_zero_over_the_steps_or_the_epochs():
    found, labels = clusters(30)  # four batches of eight
    config = ProbeConfig(learning_rate=0.05, steps=4, dropout=0.0)
    weights = {
        horizon: train_probe(found, labels, replace(config, decay_epochs=horizon)).layer.weight.detach()
        for horizon in (None, 0.5, 1.0, 100.0)
    }
    # shorter horizons than the steps are the steps
    assert torch.equal(weights[None], weights[0.5]) and torch.equal(weights[None], weights[1.0])
    start = train_probe(found, labels, replace(config, steps=1, learning_rate=1e-12)).layer.weight.detach()
    moved = {horizon: float((weight - start).norm()) for horizon, weight in weights.items()}
    assert moved[100.0] > 1.2 * moved[None]


def test_errors():
    found, labels = clusters(5)
    with pytest.raises(DataError, match=r"5 sentences with .* of different data"):
        train_probe(found, [["O", *labels[0]], *labels[1:]], FAST)
    with pytest.raises(DataError, match="of different data"):
        evaluate_probe(train_probe(found, labels, FAST), found, labels[:-1], "ner")
    with pytest.raises(DataError, match="no word of the training data has a vector"):
        train_probe(features(np.zeros((2, 8)), [2], present=[False, False]), [["O", "O"]], FAST)
    with pytest.raises(DataError, match="no words to test on"):
        evaluate_probe(train_probe(found, labels, FAST), features(np.zeros((0, 8)), [0]), [[]], "ner")
    with pytest.raises(RunError, match="loss is nan at step 1"):
        train_probe(features(np.full((2, 8), np.nan), [2]), [["O", "O"]], FAST)
    with pytest.raises(ConfigError, match="positive"):
        ProbeConfig(steps=0)
