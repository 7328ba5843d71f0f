"""benchmarks/mteb_eval.py: a run on the local tasks, its restart, and tasks that need the hub."""

import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def command(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.delitem(sys.modules, "mteb_eval", raising=False)
    import mteb_eval

    from bivec.engine.evaluation import local_tasks

    small = local_tasks.LocalSizes(20, 10, 12, 6, 3, 6)
    monkeypatch.setattr(mteb_eval, "local_tasks", lambda folder: local_tasks.local_tasks(folder, small))
    yield mteb_eval
    sys.modules.pop("mteb_eval", None)


@pytest.fixture
def offline(monkeypatch):
    """No try to reach the hub."""
    import datasets
    import huggingface_hub

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def test_the_list_names_all_tasks(command, capsys):
    assert command.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 56 + 4
    assert "| SICK-R | STS | yes | Retrieve semantically similar text: |" in lines
    assert sum("| yes |" in line for line in lines) == 15


def test_groups_of_tasks(command):
    assert len(command.find_tasks(["full56"])) == 56
    subset = command.find_tasks(["subset15", "SICK-R"])
    assert len(subset) == 15
    assert {t.metadata.name: t.hf_subsets for t in subset}["STS17"] == ["en-en"]
    assert next(t.metadata.name for t in command.find_tasks(["local"])) == "LocalSTS"


def test_a_run_its_restart_and_what_needs_the_hub(command, tiny_llama_dir, tmp_path, capsys, offline):
    arguments = ["--model", str(tiny_llama_dir), "--variant", "bi", "--output-dir", str(tmp_path)]
    assert command.main([*arguments, "--tasks", "LocalSTS", "SICK-R", "LocalClustering"]) == 1
    output = capsys.readouterr().out
    assert "SICK-R: needs the hub" in output
    content = json.loads((tmp_path / "bivec__llama-bi.json").read_text())
    assert list(content["scores"]) == ["LocalSTS", "LocalClustering"] and list(content["failed"]) == ["SICK-R"]
    assert content["instructions"]["SICK-R"] == "Retrieve semantically similar text:"
    assert "| LocalSTS |" in output and "* SICK-R: needs the hub" in (tmp_path / "bivec__llama-bi.md").read_text()

    (kept,) = tmp_path.glob("results/bivec__llama-bi/*/LocalSTS.json")
    before = kept.stat().st_mtime_ns
    (broken,) = tmp_path.glob("results/bivec__llama-bi/*/LocalClustering.json")
    broken.write_text(broken.read_text()[:100])
    assert command.main([*arguments, "--tasks", "local"]) == 0
    assert "LocalClustering.json: not whole" in capsys.readouterr().out
    assert kept.stat().st_mtime_ns == before  # not run again
    again = json.loads((tmp_path / "bivec__llama-bi.json").read_text())["scores"]
    assert len(again) == 4
    assert again["LocalSTS"] == pytest.approx(content["scores"]["LocalSTS"], abs=1e-3)
    assert again["LocalClustering"] == pytest.approx(content["scores"]["LocalClustering"], abs=1e-3)


def test_a_task_that_fails_leaves_the_others(command, tiny_llama_dir, tmp_path, monkeypatch):
    from mteb.abstasks import AbsTaskSTS

    def fails(*_, **__):
        raise ValueError("a bug of the task")

    monkeypatch.setattr(AbsTaskSTS, "_calculate_scores", fails)
    arguments = ["--model", str(tiny_llama_dir), "--output-dir", str(tmp_path), "--name", "x"]
    assert command.main([*arguments, "--tasks", "LocalSTS", "LocalPairClassification"]) == 1
    content = json.loads((tmp_path / "bivec__x.json").read_text())
    assert content["failed"] == {"LocalSTS": "ValueError: a bug of the task"}
    assert list(content["scores"]) == ["LocalPairClassification"]


def test_the_papers_baselines_in_the_same_harness(command, tiny_llama_dir, tmp_path, capsys):
    """Echo and encoder-only models: other vectors, the latter's without instructions."""
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    config = BertConfig(
        vocab_size=1000,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=48,
        pad_token_id=1,
    )
    BertModel(config).save_pretrained(tmp_path / "bert")
    PreTrainedTokenizerFast.from_pretrained(tiny_llama_dir).save_pretrained(tmp_path / "bert")
    output = ["--tasks", "LocalSTS", "--output-dir", str(tmp_path / "out")]
    scores = {}
    for name, flags in (
        ("llama-uni", ["--model", str(tiny_llama_dir), "--variant", "uni"]),
        ("llama-echo", ["--model", str(tiny_llama_dir), "--echo"]),
        ("bert", ["--model", str(tmp_path / "bert"), "--encoder-only"]),
    ):
        assert command.main([*output, *flags]) == 0
        content = json.loads((tmp_path / "out" / f"bivec__{name}.json").read_text())
        scores[name] = content["scores"]["LocalSTS"]
        assert content["paper_variant"] == {"llama-uni": "uni", "llama-echo": "echo"}.get(name, "bi+mntp+simcse")
        assert content["instructions"]["LocalSTS"] == ("" if name == "bert" else "Retrieve semantically similar text:")
    assert len(set(scores.values())) == 3
    for flags, message in (
        (["--echo", "--variant", "bi"], "--echo works around the causal mask"),
        (["--echo", "--encoder-only"], "--echo works around the causal mask"),
        (["--encoder-only", "--variant", "bi"], "--encoder-only has no variants"),
    ):
        with pytest.raises(SystemExit):
            command.main([*output, "--model", "x", *flags])
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks", "SICKR", "--model", "x"], "SICKR"),
        (["--tasks", "local", "--model", "MODEL", "--variant", "bi+mntp"], "no variant 'bi+mntp', only uni, bi"),
        (["--tasks", "local", "--model", "MODEL", "--pooling", "max"], "pooling 'max' is unknown"),
        (["--tasks", "local", "--model", "MODEL", "--instructions", "absent.json"], "absent.json"),
    ],
)
def test_bad_arguments_end_before_any_work(command, tiny_llama_dir, tmp_path, capsys, options, message):
    options = [str(tiny_llama_dir) if option == "MODEL" else option for option in options]
    assert command.main([*options, "--output-dir", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_is_missing_is_said(command, capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(["--tasks", "local"])
    assert stop.value.code == 2
    assert "--output-dir" in capsys.readouterr().err
