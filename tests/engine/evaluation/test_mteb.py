"""MTEB's own evaluation of our encoder, on tasks built from the samples that ship: no network."""

from __future__ import annotations

import random
from pathlib import Path

import mteb
import numpy as np
import pytest
from mteb.cache import ResultCache
from mteb.models import EncoderProtocol, ModelMeta
from mteb.types import PromptType
from scipy.stats import spearmanr
from sklearn.metrics import average_precision_score, ndcg_score
from torch.utils.data import DataLoader

from bivec import Encoder
from bivec.engine.data import STSPair
from bivec.engine.errors import ConfigError, DataError, RunError
from bivec.engine.evaluation import evaluate_sts
from bivec.engine.evaluation.local_tasks import LOCAL_INSTRUCTIONS, LocalSizes, evaluate_local, local_tasks
from bivec.engine.evaluation.mteb_encoder import paper_instructions, paper_task_name
from bivec.engine.evaluation.paper import paper_tasks

DATA = Path(__file__).parents[3] / "recipes" / "data"
SIZES = LocalSizes(sts_pairs=60, pairs_per_class=20, documents=30, queries=15, clusters=6, sentences_per_cluster=6)


@pytest.fixture(scope="module")
def encoder(tiny_llama_dir):
    return Encoder.from_pretrained(tiny_llama_dir)


@pytest.fixture(scope="module")
def tasks():
    return {task.metadata.name: task for task in local_tasks(DATA, SIZES)}


def run(model, task):
    """The scores of mteb's evaluation of one task."""
    results = mteb.evaluate(model, task, cache=None, co2_tracker=False, show_progress_bar=False)
    (scores,) = results.task_results[0].scores["test"]
    return scores


def data_of(task):
    """The task's data; mteb drops it after an evaluation."""
    task.load_data()
    data = task.dataset
    task.unload_data()
    return data


@pytest.fixture
def recorded(encoder, monkeypatch):
    """What the encoder is given: (instruction, texts, max_text_length) of every call."""
    calls = []
    encode = Encoder.encode

    def record(self, sentences, *, instruction=None, max_text_length=None, **options):
        calls.append((instruction, list(sentences), max_text_length))
        return encode(self, sentences, instruction=instruction, max_text_length=max_text_length, **options)

    monkeypatch.setattr(Encoder, "encode", record)
    return calls


def cosines(a, b):
    a, b = a.astype(np.float64), b.astype(np.float64)
    return (a @ b.T) / np.linalg.norm(a, axis=1)[:, None] / np.linalg.norm(b, axis=1)[None]


def test_the_protocol_is_satisfied(encoder):
    model = encoder.as_mteb(name="tiny", revision="7")
    assert isinstance(model, EncoderProtocol)
    meta = model.mteb_model_meta
    assert isinstance(meta, ModelMeta)
    assert (meta.name, meta.revision, meta.embed_dim, meta.max_tokens) == ("bivec/tiny", "7", 64, 512)
    assert meta.n_parameters == sum(weight.numel() for weight in encoder.model.parameters())
    assert meta.similarity_fn_name.value == "cosine"
    a, b = np.random.default_rng(0).normal(size=(2, 5, 64)).astype(np.float32)
    np.testing.assert_allclose(model.similarity(a, b), cosines(a, b), atol=1e-6)
    np.testing.assert_allclose(model.similarity_pairwise(a, b), np.diag(cosines(a, b)), atol=1e-6)


@pytest.mark.parametrize("instructions", [None, LOCAL_INSTRUCTIONS], ids=["plain", "instructions"])
def test_sts_is_our_own_and_scipys(encoder, tasks, instructions):
    instruction = (instructions or {}).get("LocalSTS")
    scores = run(encoder.as_mteb(instructions=instructions), tasks["LocalSTS"])
    data = data_of(tasks["LocalSTS"])["test"]
    assert len(data) == 60
    pairs = [STSPair(**row) for row in data]
    ours = evaluate_sts(lambda sentences: encoder.encode(sentences, instruction=instruction), pairs).spearman
    first, second = (encoder.encode(list(data[side]), instruction=instruction) for side in ("sentence1", "sentence2"))
    by_scipy = spearmanr(np.diag(cosines(first, second)), data["score"]).statistic
    assert 100 * scores["main_score"] == pytest.approx(ours, abs=1e-6)
    assert 100 * scores["cosine_spearman"] == pytest.approx(ours, abs=1e-6)
    assert scores["main_score"] == pytest.approx(by_scipy, abs=1e-8)
    assert ours > 10  # not noise, so a wrong pairing would show


def test_retrieval_is_sklearns(encoder, tasks):
    scores = run(encoder.as_mteb(), tasks["LocalRetrieval"])
    data = data_of(tasks["LocalRetrieval"])["default"]["test"]
    documents = [f"{row['title']} {row['text']}" for row in data["corpus"]]
    similarity = cosines(encoder.encode(list(data["queries"]["text"])), encoder.encode(documents))
    ids = list(data["corpus"]["id"])
    relevance = np.array([[data["relevant_docs"][query].get(id_, 0) for id_ in ids] for query in data["queries"]["id"]])
    assert relevance.shape == (15, 30) and (relevance.sum(axis=1) == 1).all()
    expected = ndcg_score(relevance, similarity, k=10)
    assert scores["main_score"] == scores["ndcg_at_10"] == pytest.approx(expected, abs=1e-5)
    assert 0.1 < expected < 1


def test_pair_classification_is_sklearns(encoder, tasks):
    scores = run(encoder.as_mteb(), tasks["LocalPairClassification"])
    data = data_of(tasks["LocalPairClassification"])["test"]
    assert list(data["labels"]) == [1] * 20 + [0] * 20
    first, second = (encoder.encode(list(data[side])) for side in ("sentence1", "sentence2"))
    expected = average_precision_score(data["labels"], np.diag(cosines(first, second)))
    assert scores["main_score"] == pytest.approx(expected, abs=1e-6)
    assert expected > 0.55


def test_clustering_runs_and_knows_a_perfect_encoder(encoder, tasks):
    task = tasks["LocalClustering"]
    assert 0 < run(encoder.as_mteb(), task)["main_score"] < 1
    data = data_of(task)["test"]
    assert len(data) == 36 and len(set(data["labels"])) == 6

    class Oracle(type(encoder.as_mteb())):
        def encode(self, inputs, **_):
            texts = [text for batch in inputs for text in batch["text"]]
            numbers = dict(zip(data["sentences"], data["labels"], strict=True))
            return np.array([np.eye(6, 64)[int(numbers[text].split()[1])] for text in texts])

    assert run(Oracle(encoder), task)["main_score"] > 0.8  # k-means of few draws, even of six points
    assert run(encoder.as_mteb(), task)["main_score"] < 0.8


def test_instructions_on_both_sides_or_of_queries_only(encoder, tasks, recorded):
    model = encoder.as_mteb(instructions=LOCAL_INSTRUCTIONS)
    for name, sides in (("LocalSTS", 2), ("LocalPairClassification", 2), ("LocalClustering", 1)):
        recorded.clear()
        run(model, tasks[name])
        assert [instruction for instruction, _, _ in recorded] == [LOCAL_INSTRUCTIONS[name]] * sides
    recorded.clear()
    run(model, tasks["LocalRetrieval"])
    data = data_of(tasks["LocalRetrieval"])["default"]["test"]
    (queries, documents) = recorded
    assert queries[:2] == (LOCAL_INSTRUCTIONS["LocalRetrieval"], list(data["queries"]["text"]))
    assert documents[0] == ""
    expected = [f"{row['title']} {row['text']}" for row in data["corpus"]]
    assert documents[1] == expected  # title, one space, text
    assert {limit for _, _, limit in recorded} == {400}


def loader(texts, batch_size=4):
    return DataLoader([{"text": text} for text in texts], batch_size=batch_size)


@pytest.mark.parametrize(
    ("task", "queries", "documents"),
    [
        ("AskUbuntuDupQuestions", True, True),  # reranking: both, as the mteb of the paper called it
        ("SciFact", True, False),
        ("QuoraRetrieval", True, False),
        ("ArguAna", True, False),
        ("CQADupstackUnixRetrieval", True, False),
        ("STSBenchmark", True, None),
        ("SummEval", True, None),
        ("Banking77Classification", True, None),
        ("SprintDuplicateQuestions", True, None),
    ],
)
def test_sides_of_the_papers_tasks(encoder, recorded, task, queries, documents):
    metadata = mteb.get_task(task).metadata
    model = encoder.as_mteb()
    expected = paper_instructions()[paper_task_name(task)]
    kinds = [None] if documents is None else [PromptType.query, PromptType.document]
    for kind in kinds:
        model.encode(loader(["a b"]), task_metadata=metadata, hf_split="test", hf_subset="default", prompt_type=kind)
    wanted = [queries] if documents is None else [queries, documents]
    assert [instruction for instruction, _, _ in recorded] == [expected if has else "" for has in wanted]


def test_the_row_is_instruction_space_text(encoder):
    """One space between the colon and the text, and the instruction is not pooled."""
    metadata = mteb.get_task("SICK-R").metadata
    vectors = encoder.as_mteb().encode(loader(["A dog runs."]), task_metadata=metadata)
    row = encoder.tokenizer("Retrieve semantically similar text: A dog runs.").input_ids
    head = len(encoder.tokenizer("Retrieve semantically similar text:").input_ids)
    ((hidden, _, _),) = encoder.hidden_states([row])
    np.testing.assert_allclose(vectors[0], hidden[head:].mean(dim=0).numpy(), atol=1e-5)


def test_every_task_of_the_paper_has_its_instruction():
    instructions = paper_instructions()
    assert list(instructions) == [task.name for task in paper_tasks()]
    assert all(text.endswith(":") and text == text.strip() for text in instructions.values())
    assert instructions["AmazonCounterfactualClassification"].endswith("either counterfactual or notcounterfactual:")
    assert instructions["MedrxivClusteringS2S"].endswith("category of Medrxiv papers based on the titles:")
    assert instructions["StackExchangeClusteringP2P"].endswith("posts based on the given paragraphs:")
    assert len({instructions[task.name] for task in paper_tasks(category="STS")}) == 1


def test_mtebs_english_benchmarks_find_their_instructions():
    """Also under the names of later versions."""
    first, second = (mteb.get_benchmark(f"MTEB(eng, v{n})").tasks for n in (1, 2))
    names = {task.metadata.name: task.metadata.type for task in (*first, *second)}
    assert {task.name: task.category for task in paper_tasks()} == {t.metadata.name: t.metadata.type for t in first}
    assert {name for name in names if paper_task_name(name) not in paper_instructions()} == set()
    forums = [task.metadata.name for task in mteb.get_task("CQADupstackRetrieval").metadata.tasks]
    assert len(forums) == 12
    assert {paper_task_name(name) for name in forums} == {"CQADupstackRetrieval"}
    for later, name in (("SICK-R", "SICK-R"), ("Touche2020Retrieval.v3", "Touche2020"), ("STS22.v2", "STS22")):
        assert paper_task_name(later) == name
    assert paper_task_name("FEVERHardNegatives.v2") == "FEVER"
    assert paper_task_name("ArguAna-PL") not in paper_instructions()  # a translation


def test_the_users_instructions_come_first(encoder):
    sick, other = (mteb.get_task(name).metadata for name in ("SICK-R", "ArguAna-PL"))
    assert encoder.as_mteb().instruction_for(other) == ""
    assert encoder.as_mteb(instructions={"ArguAna-PL": "Szukaj:"}).instruction_for(other) == "Szukaj:"
    assert encoder.as_mteb(instructions={"SICK-R": ""}).instruction_for(sick) == ""
    assert encoder.as_mteb(paper_instructions=False).instruction_for(sick) == ""


def test_a_text_has_400_tokens_at_most(encoder):
    metadata = mteb.get_task("NFCorpus").metadata
    words = [random.Random(0).choice(["lobster", "blue", "coast", "water"]) for _ in range(600)]
    long = " ".join(words)
    vectors = encoder.as_mteb().encode(loader([long]), task_metadata=metadata, prompt_type=PromptType.document)
    lengths = [len(encoder.tokenizer(" ".join(words[:n])).input_ids) - 1 for n in range(1, 401)]
    kept = sum(length <= 400 for length in lengths)
    assert 10 < kept < 400
    np.testing.assert_allclose(vectors[0], encoder.encode(" ".join(words[:kept])), atol=1e-5)
    assert np.abs(vectors[0] - encoder.encode(" ".join(words[: kept + 1]))).max() > 1e-5
    whole = encoder.as_mteb(max_text_length=None).encode(loader([long]), task_metadata=metadata)
    np.testing.assert_allclose(whole[0], encoder.encode(long, instruction=paper_instructions()["NFCorpus"]), atol=1e-5)


def test_order_and_batch_size_change_nothing(encoder, tasks):
    data = data_of(tasks["LocalClustering"])["test"]
    texts, metadata = list(data["sentences"]), tasks["LocalClustering"].metadata
    once = encoder.as_mteb().encode(loader(texts, 32), task_metadata=metadata)
    order = random.Random(1).sample(range(len(texts)), len(texts))
    for batch_size, budget in ((1, None), (7, 100), (64, 4096)):
        model = encoder.as_mteb(tokens_per_batch=budget)
        shuffled = model.encode(loader([texts[i] for i in order], batch_size), task_metadata=metadata)
        np.testing.assert_allclose(shuffled, once[order], atol=1e-5)


@pytest.mark.parametrize("shown", [True, False])
def test_evaluate_local_leaves_progress_bars_as_they_were(shown, encoder, tasks):
    import datasets

    before = datasets.are_progress_bars_disabled()
    try:
        (datasets.enable_progress_bars if shown else datasets.disable_progress_bars)()
        evaluate_local(encoder, [tasks["LocalSTS"]])
        assert datasets.are_progress_bars_disabled() is not shown
    finally:
        (datasets.disable_progress_bars if before else datasets.enable_progress_bars)()


def test_evaluate_local_gives_the_same_again(encoder, tasks):
    scores = evaluate_local(encoder, list(tasks.values()))
    assert list(scores) == list(tasks) == list(LOCAL_INSTRUCTIONS)
    assert evaluate_local(encoder, list(tasks.values())) == scores
    assert all(0 < score < 100 for score in scores.values())
    assert evaluate_local(encoder.as_mteb(), [tasks["LocalSTS"]]) != {"LocalSTS": scores["LocalSTS"]}


def test_results_are_kept_and_found_again(encoder, tasks, recorded, tmp_path):
    cache = ResultCache(tmp_path)
    options = {"cache": cache, "co2_tracker": False, "show_progress_bar": False}
    model = encoder.as_mteb(name="tiny")
    first = mteb.evaluate(model, tasks["LocalSTS"], **options).task_results[0].get_score()
    assert (tmp_path / "results" / "bivec__tiny" / model.mteb_model_meta.revision / "LocalSTS.json").is_file()
    recorded.clear()
    assert mteb.evaluate(encoder.as_mteb(name="tiny"), tasks["LocalSTS"], **options).task_results[0].get_score() == (
        pytest.approx(first, abs=1e-6)
    )
    assert recorded == []
    mteb.evaluate(encoder.as_mteb(name="tiny", max_text_length=None), tasks["LocalSTS"], **options)
    assert len(recorded) == 2  # another protocol has another revision


def test_the_revision_tells_models_and_settings_apart(encoder, tiny_llama_dir, tiny_mistral_dir):
    same = Encoder.from_pretrained(tiny_llama_dir)
    same.encode_tokens("leaves its truncation in the tokenizer")
    assert same.as_mteb().fingerprint() == encoder.as_mteb().fingerprint()
    others = [
        Encoder.from_pretrained(tiny_mistral_dir).as_mteb(),
        Encoder.from_pretrained(tiny_llama_dir, causal=True).as_mteb(),
        Encoder.from_pretrained(tiny_llama_dir, pooling="weighted_mean").as_mteb(),
        encoder.as_mteb(instructions={"SciFact": "Find:"}),
        encoder.as_mteb(paper_instructions=False),
        encoder.as_mteb(max_text_length=None),
    ]
    changed = Encoder.from_pretrained(tiny_llama_dir)
    changed.model.layers[1].self_attn.v_proj.weight.data[0, 0] += 1e-3
    prints = {model.fingerprint() for model in (encoder.as_mteb(), changed.as_mteb(), *others)}
    assert len(prints) == len(others) + 2


def test_what_cannot_be_evaluated_is_named(encoder, tasks, tmp_path):
    metadata = tasks["LocalSTS"].metadata
    images = DataLoader([{"image": 1}], batch_size=1)
    with pytest.raises(ConfigError, match="LocalSTS has no texts but image"):
        encoder.as_mteb().encode(images, task_metadata=metadata)
    with pytest.raises(ConfigError, match="precision 'int8'"):
        encoder.as_mteb().encode(loader(["a"]), task_metadata=metadata, precision="int8")
    with pytest.raises(DataError, match=r"stsb_dev.csv.gz: no such file"):
        local_tasks(tmp_path)


def test_broken_weights_are_named(tiny_llama_dir, tasks):
    encoder = Encoder.from_pretrained(tiny_llama_dir)
    encoder.model.norm.weight.data[3] = float("nan")
    with pytest.raises(RunError, match="LocalSTS: 60 of 60 embeddings hold NaN"):
        run(encoder.as_mteb(), tasks["LocalSTS"])
