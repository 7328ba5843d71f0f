"""The supervised stage of a run: after the others or on a model of its own, stopped and resumed, and its bad input."""

import json
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bivec.engine.data import load_sts
from bivec.engine.encoder import Encoder
from bivec.engine.evaluation import sts_spearman
from bivec.engine.lora import load_adapter
from bivec.engine.metrics import StepLog
from bivec.engine.text_format import MODEL_TEMPLATES
from bivec.models import load_pretrained

ROOT = Path(__file__).parents[2]
ALL = "bi,mntp,simcse,supervised"
NAMES = ["uni", "uni weighted-mean", "bi", "bi+mntp", "bi+mntp+simcse", "bi+mntp+simcse+supervised"]


class Stopped(BaseException):
    """Stands for a kill: nothing catches it."""


def stages(directory):
    return json.loads((directory / "results.json").read_text())["stages"]


def losses(directory):
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [
        (line["step"], line["loss"], line["grad_norm"], line["tokens"])
        for line in lines
        if line["stage"] == "supervised"
    ]


def weights(directory):
    return load_file(directory / "merged" / "model.safetensors")


def assert_same_weights(one, other, tolerance=0.0):
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=tolerance)


@pytest.fixture(scope="module")
def whole(execute, recipe, tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole") / "run"
    execute(recipe, directory, "--stages", ALL)
    return directory


def test_after_the_other_stages(whole):
    assert [stage["stage"] for stage in stages(whole)] == NAMES
    assert all(stage["sts_test_spearman"] is not None for stage in stages(whole))
    assert [line[0] for line in losses(whole)] == [1, 2, 3, 4] and len({line[1] for line in losses(whole)}) == 4
    assert json.loads((whole / "run.json").read_text())["data"]["supervised"].startswith("triples 15 ")
    # its test figure is that of the saved encoder
    assert stages(whole)[-1]["sts_dev_spearman"] != stages(whole)[-2]["sts_dev_spearman"]


@pytest.mark.parametrize("step", [1, 2, 3])
def test_stopped_and_resumed(execute, whole, recipe, tmp_path, monkeypatch, step):
    append = StepLog.append

    def stopping(self, record):
        append(self, record)
        if (record.stage, record.step) == ("supervised", step) and "metrics" in self.path.name:
            raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(StepLog, "append", stopping)
        with pytest.raises(Stopped):
            execute(recipe, tmp_path / "run", "--stages", ALL)
    execute(recipe, tmp_path / "run", "--stages", ALL, "--resume")
    assert losses(tmp_path / "run") == losses(whole) and stages(tmp_path / "run") == stages(whole)
    assert_same_weights(tmp_path / "run", whole)


@pytest.mark.parametrize("stop", ["mid-stage", "evaluation"])
def test_resuming_with_the_adapter_of_simcse(execute, recipe, tmp_path, monkeypatch, stop):
    """The weights have to be loaded again without that adapter; stopped in the stage, and after it."""
    going_on = replace(recipe, supervised=replace(recipe.supervised, init_adapter="simcse"))
    execute(going_on, tmp_path / "whole", "--stages", ALL)
    append = StepLog.append

    def stopping(self, record):
        append(self, record)
        at = ("supervised", 3 if stop == "mid-stage" else 4)
        if (record.stage, record.step) == at and ("metrics" in self.path.name) == (stop == "mid-stage"):
            raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(StepLog, "append", stopping)
        with pytest.raises(Stopped):
            execute(going_on, tmp_path / "run", "--stages", ALL)
    execute(going_on, tmp_path / "run", "--stages", ALL, "--resume")
    execute(going_on, tmp_path / "run", "--stages", ALL, "--resume")  # all is done already
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert stages(tmp_path / "run") == stages(tmp_path / "whole")
    assert_same_weights(tmp_path / "run", tmp_path / "whole")


def test_on_the_model_that_another_run_has_made(execute, whole, recipe, tiny_llama_dir, tmp_path):
    """From a run's merged folder; and from the base with a run's adapters, which is the same model."""
    execute(recipe, tmp_path / "first")
    adapters = ",".join(str(tmp_path / "first" / name) for name in ("mntp", "simcse"))
    execute(recipe, tmp_path / "merged", "--stages", "bi,supervised", "--model", tmp_path / "first")
    execute(recipe, tmp_path / "adapters", "--stages", "bi,supervised", "--adapters", adapters)
    for name in ("merged", "adapters"):
        assert [stage["stage"] for stage in stages(tmp_path / name)][2:] == ["bi", *NAMES[-2:]]
        assert stages(tmp_path / name)[2]["sts_dev_spearman"] == pytest.approx(
            stages(whole)[4]["sts_dev_spearman"], abs=0.01
        )
    assert_same_weights(tmp_path / "merged", tmp_path / "adapters", 1e-5)
    # going on with that run's adapter of SimCSE, on the model as it was before it
    start = ("--set", f"supervised.init_adapter={tmp_path / 'first' / 'simcse'}")
    flags = ("--stages", "bi,supervised", "--adapters", tmp_path / "first" / "mntp")
    execute(recipe, tmp_path / "going on", *flags, *start)
    assert [stage["stage"] for stage in stages(tmp_path / "going on")][3:] == ["bi+mntp", "bi+mntp+supervised"]
    assert losses(tmp_path / "going on")[0][1] == pytest.approx(
        losses(tmp_path / "merged")[0][1], rel=0.05
    )  # its dropout


def test_a_state_of_an_earlier_run_is_scored_as_that_run_left_it(execute, recipe, tmp_path):
    """Also where this run trains a stage of the same name, with other settings: the test set sees no weights of it."""
    causal = replace(recipe, simcse=replace(recipe.simcse, causal=True, pooling="weighted_mean"))
    execute(causal, tmp_path / "first", "--stages", "bi,simcse")
    flags = ("--stages", "bi,simcse,supervised", "--set", "simcse.optim.learning_rate=0.1")
    execute(recipe, tmp_path / "second", "--model", tmp_path / "first", *flags)
    last, again = stages(tmp_path / "first")[-1], {one["stage"]: one for one in stages(tmp_path / "second")}
    assert list(again)[-3:] == ["uni+simcse", "bi+simcse+simcse", "bi+simcse+simcse+supervised"]
    assert again["uni+simcse"] == pytest.approx(last, abs=0.01)
    assert again["bi+simcse+simcse"]["pooling"] == "mean"
    scores = [one["sts_test_spearman"] for one in again.values()][-3:]
    assert len(set(scores)) == 3
    # the last state is the saved encoder
    whole = Encoder.from_pretrained(tmp_path / "second")
    pairs = load_sts(recipe.sts_test)[: recipe.eval_pairs]
    assert sts_spearman(whole.encode, pairs) == pytest.approx(scores[-1], abs=0.01)
    # also by its adapter, and by the folder of the encoder itself, beside which no file tells of stages
    ways = {
        "uni+simcse": ("--adapters", tmp_path / "first" / "simcse"),
        "uni": ("--model", tmp_path / "first" / "merged"),
    }
    for state, way in ways.items():
        execute(recipe, tmp_path / state, "--stages", "bi", *way)
        found = {one["stage"]: one for one in stages(tmp_path / state)}[state]
        assert found == pytest.approx(last | {"stage": state}, abs=0.01)
    assert Encoder.from_pretrained(tmp_path / "uni").config == Encoder.from_pretrained(tmp_path / "first").config


def test_a_supervised_model_is_scored_with_the_instruction_again(execute, recipe, tmp_path):
    told = replace(recipe, supervised=replace(recipe.supervised, sts_instruction="Find the same meaning: "))
    execute(told, tmp_path / "first", "--stages", "bi,supervised")
    execute(told, tmp_path / "second", "--stages", "bi", "--model", tmp_path / "first")
    last, again = stages(tmp_path / "first")[-1], stages(tmp_path / "second")[-1]
    assert again == pytest.approx(last, abs=0.01)
    execute(recipe, tmp_path / "without", "--stages", "bi", "--model", tmp_path / "first")
    assert stages(tmp_path / "without")[-1] != pytest.approx(last, abs=0.01)


def test_an_adapter_that_is_in_the_model_already(execute, fails, recipe, tmp_path):
    execute(recipe, tmp_path / "first")
    start = f"supervised.init_adapter={tmp_path / 'first' / 'simcse'}"
    flags = ("--stages", "bi,supervised", "--set", start)
    told = fails(recipe, tmp_path / "a", *flags, "--model", tmp_path / "first")
    assert "is merged into the model already" in told
    assert "is merged into" in fails(recipe, tmp_path / "a", *flags, "--adapters", tmp_path / "first" / "simcse")
    assert "has rank 4, alpha 8" in fails(recipe, tmp_path / "a", *flags, "--set", "supervised.lora.rank=8")
    assert not (tmp_path / "a").exists()


def test_the_template_is_of_the_folder_else_of_the_decoder(execute, recipe, tmp_path, monkeypatch, capsys):
    """And it is printed which; a run directory stands for the decoder that it was made of."""
    monkeypatch.setitem(MODEL_TEMPLATES, recipe.model, "mistral")
    execute(recipe, tmp_path / "first")
    execute(recipe, tmp_path / "second", "--stages", "bi,supervised", "--model", tmp_path / "first")
    assert f"template '[INST] {{text}} [/INST]', of {recipe.model}" in capsys.readouterr().out
    assert Encoder.from_pretrained(tmp_path / "second").config.template == "[INST] {text} [/INST]"
    execute(recipe, tmp_path / "none", "--stages", "bi,supervised", "--set", "supervised.template=none")
    assert "supervised: no template, as asked for" in capsys.readouterr().out


def test_the_recipe_of_its_own(recipe, files, tmp_path, monkeypatch, capsys):
    """The paper's numbers (METHOD 5.7), a dry run, and a run of a few steps on another run's model."""
    module = runpy.run_path(str(ROOT / "recipes" / "supervised.py"))
    stage = module["RECIPE"].supervised
    assert (stage.batch_size, stage.max_length, stage.scale, stage.pooling, stage.decay_epochs) == (
        512,
        512,
        50.0,
        "mean",
        3,
    )
    assert (stage.optim.learning_rate, stage.optim.steps, stage.optim.warmup_steps) == (2e-4, 1000, 300)
    assert (stage.lora.rank, stage.lora.alpha, stage.lora.dropout, stage.init_adapter) == (16, 32, 0.05, None)
    flags = [
        "--model",
        recipe.model,
        "--supervised-data",
        str(files / "triples.jsonl"),
        "--output-dir",
        str(tmp_path / "x"),
    ]
    monkeypatch.setattr(sys, "argv", ["supervised.py", *flags, "--dry-run"])
    with pytest.raises(SystemExit) as stop:
        module["main"]()
    assert stop.value.code == 0 and "supervised: 1000 steps of 512" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["supervised.py", *flags, "--smoke"])
    module["main"]()
    assert [found["stage"] for found in stages(tmp_path / "x")] == ["bi", "bi+supervised"]
    assert not Encoder.from_pretrained(tmp_path / "x").config.pool_bos
    monkeypatch.setattr(sys, "argv", ["supervised.py", *flags[:-1], "y", "--stages", "bi,mntp,simcse,supervised"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        module["main"]()
    assert stop.value.code == 2 and not (tmp_path / "y").exists()
    assert "this recipe does not train mntp and simcse, only supervised" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["supervised.py", "--supervised-data", str(files / "triples.jsonl")])
    with pytest.raises(SystemExit):
        module["main"]()
    assert "runs/llm2vec-mistral-7b: there is no such run" in capsys.readouterr().err


def test_going_on_with_the_adapter_of_simcse(execute, recipe, tmp_path, tiny_llama_dir):
    """Nothing learnt (rate 0): the adapter is SimCSE's, and the model as it was, not with that adapter twice."""
    still = replace(recipe.supervised.optim, learning_rate=1e-30)
    frozen = replace(recipe, supervised=replace(recipe.supervised, init_adapter="simcse", optim=still))
    execute(frozen, tmp_path, "--stages", ALL)
    ours, simcse = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("supervised", "simcse"))
    for name, value in simcse.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=1e-6)
    before, after = stages(tmp_path)[-2:]
    assert [before["stage"], after["stage"]] == NAMES[-2:]
    for split in ("sts_dev_spearman", "sts_test_spearman"):
        assert after[split] == pytest.approx(before[split], abs=1e-3)
    model = load_pretrained(tiny_llama_dir).model
    for name in ("mntp", "supervised"):
        load_adapter(model, tmp_path / name).merge()
    merged = weights(tmp_path)
    for name, value in model.named_parameters():
        torch.testing.assert_close(merged[name], value, rtol=0, atol=1e-6)


def test_the_uni_baseline_and_the_template_are_saved_with_the_encoder(execute, recipe, tmp_path):
    stage = replace(recipe.supervised, causal=True, pooling="weighted_mean", template="[I] {text} [E]", pool_tail=False)
    execute(replace(recipe, supervised=stage, stages=("bi", "supervised")), tmp_path)
    found = stages(tmp_path)[-1]
    assert (found["stage"], found["pooling"]) == ("uni+supervised", "weighted_mean")
    encoder = Encoder.from_pretrained(tmp_path)
    assert encoder.config.causal and encoder.config.pooling == "weighted_mean"
    assert encoder.config.template == "[I] {text} [E]" and not encoder.config.pool_tail


def test_micro_batches_change_nothing(execute, whole, recipe, tmp_path):
    at_once = replace(recipe, supervised=replace(recipe.supervised, micro_batch_tokens=None))
    execute(at_once, tmp_path, "--stages", ALL)
    for one, other in zip(losses(tmp_path), losses(whole), strict=True):
        assert one[1] == pytest.approx(other[1], rel=1e-4) and one[3] == other[3]


def test_memory_cuts_the_stage(execute, recipe, tmp_path, capsys):
    execute(recipe, tmp_path, "--stages", "bi,supervised", "--memory", "2.7MB")
    assert "supervised: " in capsys.readouterr().out
    assert json.loads((tmp_path / "run.json").read_text())["cuts"]["supervised"]["micro_batch_tokens"] is not None


def test_bad_input(fails, recipe, files, tmp_path):
    supervised = ("--stages", "bi,supervised")
    none = replace(recipe, supervised_data=None)
    assert "--supervised-data (queries with positives and hard negatives): none was given" in fails(
        none, tmp_path / "a", *supervised
    )
    broken = tmp_path / "broken.jsonl"
    broken.write_text((files / "triples.jsonl").read_text() + '{"query": "no positive"}\n')
    told = fails(recipe, tmp_path / "a", *supervised, "--supervised-data", broken)
    assert "broken.jsonl, line 16" in told and "positive" in told
    large = replace(recipe, supervised=replace(recipe.supervised, batch_size=16))
    assert "no data set fills one batch of 16 triples" in fails(large, tmp_path / "a", *supervised)
    assert "supervised.max_length: 4096 tokens exceed" in fails(
        recipe, tmp_path / "a", *supervised, "--set", "supervised.max_length=4096"
    )
    for setting, message in (
        ("matryoshka_dims=32,65", "the model's embeddings have 64 numbers"),
        ("matryoshka_dims=32,32", "expected different numbers"),
        ("margin=nan", "margin is nan"),
        ("scale=inf", "expected attention_dropout"),
        ("max_length=2", "leaves no token to a text"),
    ):
        flags = (*supervised, "--set", f"supervised.{setting}", "--set", "supervised.template=mistral")
        assert message in fails(recipe, tmp_path / "a", *flags)
    assert "is not read without --stages bi,mntp,simcse,supervised" in fails(
        none, tmp_path / "a", "--supervised-data", files / "triples.jsonl"
    )
    assert "template" in fails(recipe, tmp_path / "a", *supervised, "--set", "supervised.template=mistrl")
    told = fails(
        recipe, tmp_path / "a", *supervised, "--adapters", f"{tmp_path},x", "--set", "supervised.init_adapter=simcse"
    )
    assert f"--adapters: {tmp_path}: no adapter_config.json there" in told and "--adapters: x: no adapter" in told
    assert "--set supervised.init_adapter: simcse: no adapter_config.json there" in told
    assert not (tmp_path / "a").exists()


def test_bad_lines_are_skipped_if_asked_for(execute, recipe, files, tmp_path, capsys):
    broken = tmp_path / "broken.jsonl"
    broken.write_text((files / "triples.jsonl").read_text() + '{"query": "no positive"}\n')
    flags = ("--stages", "bi,supervised", "--supervised-data", broken, "--on-bad-line", "skip")
    execute(recipe, tmp_path / "run", *flags)
    assert "broken: skipped lines that hold no triple: 1" in capsys.readouterr().out
