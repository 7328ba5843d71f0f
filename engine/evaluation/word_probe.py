"""A linear probe on frozen word vectors: what METHOD 6 measures chunking, NER and part-of-speech tagging with.

    vectors -> dropout -> one linear layer with bias -> cross-entropy, the mean over the words of a batch

It trains on the cached features, in seconds. The traps of the original (METHOD 6.2) that are avoided here:

* at test time its dropout stays on, since the wrapper is never put in eval mode: here there is none;
* while the probe trains, LoRA dropout is on in the frozen encoder: here the features are computed once, without;
* one of its test configurations (bi-mntp-simcse of LLaMA-2) loads the classifier of another model: here the probe that
  is tested is the one that was trained, on the same features;
* its collator pads word ids with 0, the number of a word: here nothing is padded;
* its Python double loop over batch x words is one ``segment_pool``.

Source: METHOD 6.1, 6.2 (paper, appendix D.1.3; experiments/run_word_task.py of the LLM2Vec repository).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from bivec.engine.errors import ConfigError, DataError, RunError
from bivec.engine.evaluation.word_data import SPAN_TASKS
from bivec.engine.evaluation.word_features import WordFeatures

BLOCK = 8192  # words read at a time where all of them are gone through
MAX_GRAD_NORM = 1.0  # as the HF trainer's
NO_VECTOR = "<no vector>"  # the prediction for a word without one: equal to no label


@dataclass(frozen=True)
class ProbeConfig:
    """Hyper-parameters of the probe."""

    learning_rate: float = 5e-4
    steps: int = 1500
    decay_epochs: float | None = None  # the rate falls to 0 over so many epochs; None = over the steps
    batch_size: int = 8  # sentences
    dropout: float = 0.1
    weight_decay: float = 0.0
    standardize: bool = False  # divide every feature by its standard deviation over the training words, centred
    seed: int = 42

    def __post_init__(self) -> None:
        if not (self.learning_rate > 0 and self.steps > 0 and self.batch_size > 0 and 0 <= self.dropout < 1):
            raise ConfigError(f"rate, steps and batch size must be positive and dropout in [0, 1), got {self}")


@dataclass(frozen=True)
class ProbeResult:
    """How well a probe labels words."""

    accuracy: float  # of words, x 100
    f1: float | None  # over spans, micro-averaged, x 100; None for tasks without spans
    num_words: int
    num_missing: int  # words without a vector, counted as wrong
    unseen_labels: dict[str, int] = field(default_factory=dict)  # test words with labels that no training word has


@dataclass(frozen=True)
class Probe:
    """A linear layer and what it was trained for."""

    labels: tuple[str, ...]  # C
    layer: nn.Linear  # D -> C, float32
    mean: Tensor  # [D], subtracted from a vector
    scale: Tensor  # [D], by which it is then divided
    seen: frozenset[str]  # the labels that its training data has

    def inputs(self, vectors: np.ndarray) -> Tensor:
        """Word vectors [W, D] as the layer sees them, float32."""
        return (torch.from_numpy(vectors.astype(np.float32)) - self.mean) / self.scale

    @torch.no_grad()
    def predict(self, vectors: np.ndarray) -> np.ndarray:
        """The most probable labels of words [W, D], as numbers [W]; without dropout."""
        blocks = [vectors[start : start + BLOCK] for start in range(0, len(vectors), BLOCK)]
        return np.concatenate([self.layer(self.inputs(block)).argmax(dim=1).numpy() for block in blocks])


PAPER = ProbeConfig()  # appendix D.1.3: 1,500 steps
REPOSITORY = ProbeConfig(steps=4000, decay_epochs=10.0)  # its training stops at 4,000, the rate aims at ten epochs
# SmolLM2-135M, Uni, POS on UD-EWT, one seed: 84.7 at the paper's rate, 87.6 at 2e-3, 87.7 at 5e-3 and with 4,000 steps
# no more. Standardising changes little (87.5), but keeps the rate independent of the size of a model's features.
SMALL = ProbeConfig(learning_rate=5e-3, standardize=True)
PRESETS = {"paper": PAPER, "repository": REPOSITORY, "small": SMALL}


def train_probe(
    features: WordFeatures,
    labels: Sequence[Sequence[str]],
    config: ProbeConfig,
    *,
    label_set: Sequence[str] | None = None,
) -> Probe:
    """Trains a probe.

    Args:
        features: of the training corpus.
        labels: its labels, N sequences.
        config: hyper-parameters; the seed decides the initial weights, the order of the sentences and the dropout.
        label_set: the labels that can be predicted (CoNLL-2003's are fixed); None = those that occur.

    Returns:
        The probe of the last step. The same inputs give the same probe on the same machine.

    Raises:
        DataError: labels and features do not fit together, there is nothing to train on, or a label is not in the set.
        RunError: the loss is not finite.
    """
    _check_fit(features, labels)
    seen = frozenset(one for row in labels for one in row)
    names = tuple(sorted(seen)) if label_set is None else tuple(label_set)
    if not seen <= set(names):
        raise DataError(f"the training data has the label {min(seen - set(names))!r}, the label set has not")
    number = {name: index for index, name in enumerate(names)}
    targets = torch.tensor([number[one] for row in labels for one in row])
    if not features.present.any():
        raise DataError("no word of the training data has a vector")
    width = features.vectors.shape[1]
    mean, scale = _moments(features) if config.standardize else (torch.zeros(width), torch.ones(width))
    with torch.random.fork_rng(devices=[]):  # dropout and nn.Linear draw from the global generator
        torch.manual_seed(config.seed)
        probe = Probe(names, nn.Linear(width, len(names)), mean, scale, seen)
        _fit(probe, features, targets, config)
    return probe


def evaluate_probe(probe: Probe, features: WordFeatures, labels: Sequence[Sequence[str]], task: str) -> ProbeResult:
    """Labels the words of a test corpus.

    Args:
        probe: from :func:`train_probe`.
        features: of the test corpus.
        labels: its labels, N sequences.
        task: "chunking" and "ner" have spans, scored with seqeval as conlleval does.

    Returns:
        The scores. A word without a vector is wrong (and no part of a span); a label that the training data lacks can
        only be got wrong, and is counted in ``unseen_labels``.

    Raises:
        DataError: labels and features do not fit together, or there are no words.
    """
    from sklearn.metrics import accuracy_score

    _check_fit(features, labels)
    gold = [label for row in labels for label in row]
    if not gold:
        raise DataError("there are no words to test on")
    predicted = np.array(probe.labels, dtype=object)[probe.predict(features.vectors)]
    predicted[~features.present] = NO_VECTOR
    return ProbeResult(
        accuracy=100 * float(accuracy_score(gold, predicted.tolist())),
        f1=_span_f1(labels, predicted, features.offsets) if task in SPAN_TASKS else None,
        num_words=len(gold),
        num_missing=features.num_missing,
        unseen_labels=dict(Counter(label for label in gold if label not in probe.seen)),
    )


def _span_f1(labels: Sequence[Sequence[str]], predicted: np.ndarray, offsets: np.ndarray) -> float:
    from seqeval.metrics import f1_score

    flat = np.where(predicted == NO_VECTOR, "O", predicted).tolist()
    rows = [flat[start:end] for start, end in pairwise(offsets)]
    return 100 * float(f1_score([list(row) for row in labels], rows, zero_division=0))


def _check_fit(features: WordFeatures, labels: Sequence[Sequence[str]]) -> None:
    lengths = [len(row) for row in labels]
    if lengths != np.diff(features.offsets).tolist():
        raise DataError(
            f"{len(lengths)} sentences with {sum(lengths)} labels, but features of {len(features.offsets) - 1} "
            f"sentences with {len(features.vectors)} words: they are of different data"
        )


def _moments(features: WordFeatures) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every feature over the words that have vectors; 1 for a constant one."""
    total, squares = np.zeros(features.vectors.shape[1]), np.zeros(features.vectors.shape[1])
    for start in range(0, len(features.vectors), BLOCK):
        block = features.vectors[start : start + BLOCK][features.present[start : start + BLOCK]].astype(np.float64)
        total += block.sum(axis=0)
        squares += (block**2).sum(axis=0)
    count = np.count_nonzero(features.present)
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 0.0))
    return torch.from_numpy(mean).float(), torch.from_numpy(np.where(std > 0, std, 1.0)).float()


def _fit(probe: Probe, features: WordFeatures, targets: Tensor, config: ProbeConfig) -> None:
    present_before = np.concatenate([np.zeros(1, np.int64), features.present.cumsum()])
    sentences = np.flatnonzero(np.diff(present_before[features.offsets]))  # those with a word that has a vector
    batches_per_epoch = -(-len(sentences) // config.batch_size)
    horizon = config.steps
    if config.decay_epochs is not None:
        horizon = max(horizon, round(config.decay_epochs * batches_per_epoch))
    layer = probe.layer
    optimizer = torch.optim.AdamW(layer.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / horizon))
    shuffle = np.random.default_rng(config.seed)
    queue: list[int] = []
    for step in range(config.steps):
        if not queue:
            queue = shuffle.permutation(sentences).tolist()
        batch, queue = queue[: config.batch_size], queue[config.batch_size :]
        rows = np.concatenate([np.arange(features.offsets[i], features.offsets[i + 1]) for i in batch])
        rows = rows[features.present[rows]]
        inputs = nn.functional.dropout(probe.inputs(features.vectors[rows]), config.dropout, training=True)
        loss = nn.functional.cross_entropy(layer(inputs), targets[torch.from_numpy(rows)])
        if not torch.isfinite(loss):
            raise RunError(f"the probe's loss is {loss.item()} at step {step + 1}: lower the rate or standardize")
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(layer.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        schedule.step()
