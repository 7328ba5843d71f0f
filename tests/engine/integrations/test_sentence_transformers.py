"""Our losses in sentence-transformers against the stock ones: values, gradients, and five steps of its trainer."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MatryoshkaLoss,
    MultipleNegativesRankingLoss,
)
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from sentence_transformers.util import dot_score, pairwise_cos_sim

from bivec.engine.errors import ConfigError
from bivec.engine.integrations.sentence_transformers import (
    BivecCachedMultipleNegativesRankingLoss,
    BivecMultipleNegativesRankingLoss,
)

TOLERANCE = 1e-5
PAIRS = [
    (BivecMultipleNegativesRankingLoss, MultipleNegativesRankingLoss),
    (BivecCachedMultipleNegativesRankingLoss, CachedMultipleNegativesRankingLoss),
]
VARIANTS = {
    "default": {},
    "scale": {"scale": 50.0},
    "dot": {"similarity_fct": dot_score, "scale": 0.5},
    "symmetric": {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"},
    "per direction": {"partition_mode": "per_direction"},
    "queries": {"directions": ("query_to_doc", "query_to_query")},
    "no strength": {"hardness_mode": "in_batch_negatives"},
}
TEXT = "the river runs past a mill where old men sell bread and salt to those who come by boat in spring"
WORDS = TEXT.split()


def sentences(count, seed):
    generator = torch.Generator().manual_seed(seed)

    def sentence():
        length = int(torch.randint(3, 12, (), generator=generator))
        return " ".join(WORDS[int(w)] for w in torch.randint(len(WORDS), (length,), generator=generator))

    return [sentence() for _ in range(count)]


@pytest.fixture(scope="module")
def model(tiny_llama_dir):
    trunk = Transformer(str(tiny_llama_dir), model_kwargs={"attn_implementation": "eager"})
    trunk.auto_model.config.is_causal = False
    return SentenceTransformer(modules=[trunk, Pooling(64, "mean")], device="cpu").eval()


def features(model, columns, rows=7):
    return [model.preprocess(sentences(rows, seed)) for seed in range(columns)]


def value_and_gradients(loss, model, columns):
    model.zero_grad()
    value = loss(features(model, columns), None)
    value.backward()
    return float(value.detach()), {name: p.grad.clone() for name, p in model.named_parameters()}


def difference(ours, theirs):
    gradients = [float((ours[1][n] - g).abs().max() / g.abs().max().clamp(min=1)) for n, g in theirs[1].items()]
    return max(abs(ours[0] - theirs[0]), *gradients)


@pytest.mark.parametrize("columns", [2, 4], ids=["pairs", "two hard negatives"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("ours", "theirs"), PAIRS, ids=["plain", "cached"])
def test_values_and_gradients(model, ours, theirs, variant, columns, record_property):
    options = dict(VARIANTS[variant]) | ({"mini_batch_size": 3} if ours is PAIRS[1][0] else {})
    expected = value_and_gradients(theirs(model, **options), model, columns)
    assert expected[0] > 0.1
    distance = difference(value_and_gradients(ours(model, **options), model, columns), expected)
    record_property("difference", distance)
    assert distance <= TOLERANCE


@pytest.mark.parametrize(("ours", "theirs"), PAIRS, ids=["plain", "cached"])
def test_inside_a_matryoshka_loss(model, ours, theirs):
    expected, got = (
        value_and_gradients(MatryoshkaLoss(model, loss(model), [64, 16]), model, 3) for loss in (theirs, ours)
    )
    assert difference(got, expected) <= TOLERANCE


@pytest.mark.parametrize(("ours", "theirs"), PAIRS, ids=["plain", "cached"])
def test_without_gradients(model, ours, theirs):
    with torch.no_grad():
        values = [float(loss(model)(features(model, 3), None)) for loss in (ours, theirs)]
    assert abs(values[0] - values[1]) <= TOLERANCE


def train(model, loss, directory):
    from datasets import Dataset

    model = copy.deepcopy(model)
    columns = {name: sentences(4, seed) for seed, name in enumerate(["anchor", "positive", "negative"])}
    arguments = SentenceTransformerTrainingArguments(
        str(directory),
        per_device_train_batch_size=4,
        max_steps=5,
        learning_rate=1e-3,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
    )
    trainer = SentenceTransformerTrainer(
        model=model, args=arguments, train_dataset=Dataset.from_dict(columns), loss=loss(model)
    )
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row], dict(model.named_parameters())


@pytest.mark.parametrize(("ours", "theirs"), PAIRS, ids=["plain", "cached"])
def test_five_steps_of_the_trainer(model, ours, theirs, tmp_path):
    losses, weights = train(model, ours, tmp_path / "ours")
    expected_losses, expected = train(model, theirs, tmp_path / "theirs")
    assert len(losses) == 5
    assert losses[-1] < losses[0]
    assert losses == pytest.approx(expected_losses, abs=1e-4)
    start = dict(model.named_parameters())
    moved = max(float((expected[name] - start[name]).abs().max()) for name in expected)
    # AdamW's first steps are signs of gradients: where one is nearly 0, rounding alone can turn it
    apart = torch.cat([(weights[name] - expected[name]).abs().flatten() for name in expected])
    assert float(apart.mean()) < 1e-3 * moved


REFUSED = {
    "similarity": ({"similarity_fct": pairwise_cos_sim}, "similarity_fct must be .*cos_sim or dot_score"),
    "directions": ({"directions": ("query_to_doc", "doc_to_doc")}, "'doc_to_doc'.* is none of"),
    "one softmax": ({"directions": ("query_to_doc", "doc_to_query")}, "partition_mode='joint' is none of"),
    "hardness": ({"hardness_mode": "hard_negatives", "hardness_strength": 5.0}, "hardness_mode='hard_negatives'"),
    "gathered queries": (
        {"directions": ("query_to_doc", "query_to_query"), "gather_across_devices": True},
        "leave one of them out",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize(("ours", "theirs"), PAIRS, ids=["plain", "cached"])
def test_what_it_cannot_honour_is_refused(model, ours, theirs, case):
    options, message = REFUSED[case]
    theirs(model, **options)
    with pytest.raises(ConfigError, match=f"{ours.__name__}: .*{message}.*use {theirs.__name__}"):
        ours(model, **options)


@pytest.mark.parametrize(("ours", "theirs"), PAIRS, ids=["plain", "cached"])
def test_attributes_set_later_count(model, ours, theirs):
    loss, stock = ours(model), theirs(model)
    loss.scale = stock.scale = 3.0
    assert difference(value_and_gradients(loss, model, 2), value_and_gradients(stock, model, 2)) <= TOLERANCE
    assert loss.get_config_dict() == stock.get_config_dict()
    loss.hardness_mode, loss.hardness_strength = "all_negatives", 1.0
    with pytest.raises(ConfigError, match="hardness_mode"):
        loss(features(model, 2), None)


def test_one_column_is_refused(model):
    with pytest.raises(ConfigError, match=r"anchors and positives, got 1 column"):
        BivecMultipleNegativesRankingLoss(model)(features(model, 1), None)


def test_gathering_across_ranks(tmp_path):
    """Two processes on gloo: every rank's loss, and the gradients that come back to it from the other one's."""
    worker = Path(__file__).with_name("gather_worker.py")
    commands = [[sys.executable, worker, str(rank), tmp_path / "store", tmp_path / f"{rank}.pt"] for rank in (0, 1)]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert len(found) == 4
        for ours, theirs, alone in found.values():
            for got, expected in zip(ours, theirs, strict=True):
                torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE)
            assert abs(float(alone[0]) - float(ours[0])) > 0.1
            assert (alone[2] - ours[2]).abs().max() > 1e-3  # of the positives: the other rank's queries score them too
