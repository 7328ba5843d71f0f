"""bivec eval: the figures of engine/evaluation, as a table and as JSON."""

import pytest

from bivec.engine.cli import evaluate
from bivec.engine.data import load_sts
from bivec.engine.encoder import Encoder
from bivec.engine.evaluation import evaluate_sts, local_tasks
from bivec.engine.evaluation.word_data import TASKS
from bivec.engine.presets import STS_DEV, STS_TEST


@pytest.fixture(scope="module")
def encoder(tiny_llama_dir):
    return Encoder.from_pretrained(tiny_llama_dir, causal=False)


@pytest.fixture
def small(monkeypatch):
    """The local tasks on very little data."""
    sizes, make = local_tasks.LocalSizes(20, 10, 12, 6, 3, 6), local_tasks.local_tasks
    monkeypatch.setattr(local_tasks, "local_tasks", lambda folder: make(folder, sizes))


def test_sts_is_what_the_recipes_evaluate_with(bivec_json, bivec, tiny_llama_dir):
    encoder = Encoder.from_pretrained(tiny_llama_dir)
    document = bivec_json("eval", tiny_llama_dir, "--pairs", "15")
    expected = {
        name: evaluate_sts(encoder.encode, load_sts(file)[:15]).spearman
        for name, file in (("STS-B dev", STS_DEV), ("STS-B test", STS_TEST))
    }
    assert {one["data"]: one["spearman"] for one in document["sts"]} == pytest.approx(expected, abs=1e-3)
    assert document["model"] == str(tiny_llama_dir) and document["pooling"] == "mean" and document.keys() >= {"sts"}
    assert "tasks" not in document and "words" not in document
    printed, _ = bivec("eval", tiny_llama_dir, "--pairs", "15")
    assert f"| STS-B dev | 15 | {expected['STS-B dev']:.1f} |" in printed.splitlines()


def test_other_pairs_with_an_instruction(bivec_json, tiny_llama_dir, tmp_path):
    file = tmp_path / "pairs.csv"
    file.write_text("a choir,a band,4\nrain,snow,3\nold kings,a car,0.5\nblue,red,2\n")
    encoder = Encoder.from_pretrained(tiny_llama_dir, pooling="last_token")
    flags = ["--sts", file, "--instruction", "Find:", "--pooling", "last_token"]
    (found,) = bivec_json("eval", tiny_llama_dir, *flags)["sts"]
    expected = evaluate_sts(lambda texts: encoder.encode(texts, instruction="Find:"), load_sts(file)).spearman
    assert found == {"data": str(file), "pairs": 4, "spearman": pytest.approx(expected)}


def test_local_tasks_of_mteb(bivec_json, tiny_llama_dir, tmp_path, small, monkeypatch):
    """What is done is kept, a task that has no score is named, and the exit code says so."""
    import datasets
    import huggingface_hub

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    command = ["eval", tiny_llama_dir, "--output-dir", tmp_path, "--tasks"]
    document = bivec_json(*command, "LocalSTS", "SICK-R", code=1)
    assert list(document["tasks"]) == ["LocalSTS"] and "sts" not in document
    assert list(document["failed"]) == ["SICK-R"] and document["failed"]["SICK-R"].startswith("needs the hub: ")
    (kept,) = tmp_path.glob("results/bivec__llama/*/LocalSTS.json")
    before = kept.stat().st_mtime_ns
    document = bivec_json(*command, "local")
    assert sorted(document["tasks"]) == ["LocalClustering", "LocalPairClassification", "LocalRetrieval", "LocalSTS"]
    assert document["failed"] == {} and kept.stat().st_mtime_ns == before


def test_a_task_that_does_not_exist(bivec, tiny_llama_dir, tmp_path):
    printed, said = bivec("eval", tiny_llama_dir, "--tasks", "SICKR", "--output-dir", tmp_path / "out", code=1)
    assert printed == "" and "SICKR" in said and not (tmp_path / "out").exists()


def test_words(bivec_json, bivec, tiny_llama_dir, monkeypatch):
    from bivec.engine.evaluation import word_probe

    monkeypatch.setitem(word_probe.PRESETS, "small", word_probe.ProbeConfig(steps=20))
    assert tuple(sorted(TASKS)) == evaluate.WORD_TASKS or set(evaluate.WORD_TASKS) == set(TASKS)
    flags = ["eval", tiny_llama_dir, "--words", "pos", "ner", "--sentences", "30"]
    document = bivec_json(*flags)
    found = {(one["task"], one["alignment"]): one for one in document["words"]}
    assert found.keys() == {(task, at) for task in ("pos", "ner") for at in ("same_token", "next_token")}
    assert all(0 < one["accuracy"] <= 100 for one in found.values())
    assert found["pos", "same_token"]["f1"] is None and found["ner", "same_token"]["f1"] is not None
    row = f"| pos | same token | {found['pos', 'same_token']['accuracy']:.2f} |  |"
    assert row in bivec(*flags)[0].splitlines()
    assert "invalid choice: 'parsing'" in bivec("eval", tiny_llama_dir, "--words", "parsing", code=2)[1]


def test_bad_input(bivec, tiny_llama_dir, tmp_path):
    (tmp_path / "one.csv").write_text("a,b,3\n")
    (tmp_path / "bad.csv").write_text("a,b,3\nc,d,9\n")
    for flags, message in (
        (["--sts", tmp_path / "absent.csv"], "absent.csv is no file"),
        (["--sts", tmp_path / "bad.csv"], "bad.csv, line 2: the score is '9'"),
        (["--sts", tmp_path / "one.csv"], "needs two pairs at least, got 1"),
    ):
        printed, said = bivec("eval", tiny_llama_dir, *flags, code=1)
        assert printed == "" and message in said
