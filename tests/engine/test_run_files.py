"""What is read out of run directories."""

import json

import pytest
import torch

from bivec.engine.distributed import World
from bivec.engine.errors import RunError, first_line
from bivec.engine.metrics import StepLog
from bivec.engine.model_card import card_of_run
from bivec.engine.presets import PRESETS
from bivec.engine.recipe import as_dict
from bivec.engine.recipe_arguments import RunOptions
from bivec.engine.run_files import RUN_FILE, base_model, chosen_device, earlier_run, read_results
from bivec.engine.trainer import StepMetrics


def made_of(directory, model):
    directory.mkdir(exist_ok=True)
    (directory / RUN_FILE).write_text(json.dumps({"recipe": {"model": str(model)}}))
    return directory


def test_the_base_of_a_chain_of_runs(tmp_path):
    first = made_of(tmp_path / "first", "owner/decoder")
    third = made_of(tmp_path / "third", made_of(tmp_path / "second", first))
    assert base_model(str(third)) == base_model(str(first)) == base_model("owner/decoder") == "owner/decoder"
    made_of(first, tmp_path / "folder")  # a decoder's folder, which is no run
    assert base_model(str(third)) == str(tmp_path / "folder")


def test_runs_that_were_made_of_each_other_have_no_base(tmp_path, monkeypatch):
    """A directory may be used again; the search ends all the same, also where one is written in two ways."""
    monkeypatch.chdir(tmp_path)
    one, other = tmp_path / "one", tmp_path / "other"
    made_of(made_of(one, other), "./other/../other/")
    made_of(other, "one")
    assert base_model(str(one)) == "one" and base_model("one") == "one"
    assert base_model(str(made_of(tmp_path / "third", one))) == "one"
    made_of(one, one)
    assert base_model("one") == str(one)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert base_model(str(tmp_path / "loop")) == str(tmp_path / "loop")


RESULTS = {
    "stages": [{"stage": "uni", "pooling": "mean", "sts_dev_spearman": 48.5}],
    "seconds": 3,
    "peak_memory_bytes": 9,
}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (json.dumps(RESULTS | {"seconds": "3"}), "seconds and peak_memory_bytes are '3' and 9"),
        (json.dumps(RESULTS | {"peak_memory_bytes": True}), "seconds and peak_memory_bytes are 3 and True"),
        (json.dumps(RESULTS | {"seconds": 10**400}), "too large"),
        (json.dumps(RESULTS).replace("48.5", '"48.5"'), "sts_dev_spearman is '48.5', expected float"),
        (json.dumps(RESULTS).replace("48.5", "NaN"), "NaN is no JSON number"),
        (json.dumps(RESULTS).replace('"seconds"', '"stages": [], "seconds"'), "the key 'stages' is there twice"),
        ("[" * 100_000, "nested too deep"),
    ],
)
def test_results_that_are_none(text, message, tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(RESULTS))
    assert read_results(tmp_path, True)[1:] == (3.0, 9)
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(RunError, match=rf"results\.json: not a results file of this version \(.*{message}"):
        read_results(tmp_path, True)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"recipe": 1, "recipe": 2}', "[]"])
def test_a_run_file_that_is_none_is_refused(text, tmp_path):
    (tmp_path / RUN_FILE).write_text(text)
    for read in (card_of_run, lambda folder: earlier_run(PRESETS["smollm2-135m"], RunOptions(folder, resume=True))):
        with pytest.raises(RunError, match=RUN_FILE.replace(".", r"\.")):
            read(tmp_path)


def test_the_data_of_a_run_are_an_object(tmp_path):
    recipe = PRESETS["smollm2-135m"]
    (tmp_path / RUN_FILE).write_text(json.dumps({"recipe": as_dict(recipe), "data": "text"}))
    with pytest.raises(RunError, match="data is 'text', expected an object"):
        earlier_run(recipe, RunOptions(tmp_path, resume=True))


def test_lines_of_metrics_are_typed(tmp_path):
    line = {"stage": "mntp", "step": 1, "loss": 2.5, "lr": 1e-3, "grad_norm": 1.0, "tokens": 10, "tokens_per_s": 5.0}
    lines = [json.dumps(line | {"peak_memory_bytes": 9, "loss": loss}) for loss in (2.5, "2.5", 3.0)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    with pytest.raises(RunError, match=r"metrics\.jsonl, line 2: not a line of this log \(loss is '2\.5'"):
        StepLog(tmp_path / "metrics.jsonl", StepMetrics).read()


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"recipe": null}', '{"recipe": {}}', "\x00"])
def test_a_run_file_of_another_kind_says_nothing(content, tmp_path):
    (tmp_path / RUN_FILE).write_text(content)
    assert base_model(str(tmp_path)) == str(tmp_path)


def test_a_gpu_for_every_process_of_a_machine(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    world = World(rank=0, size=4, local_rank=0, local_size=4)
    with pytest.raises(RunError, match="4 processes on this machine, but 2 GPUs; start one a GPU"):
        chosen_device("cuda", None, world)
    with pytest.raises(RunError, match="--device cuda:1: each of 4 processes has one of its own; give --device cuda"):
        chosen_device("cuda:1", None, world)


@pytest.mark.parametrize(
    ("message", "line"),
    [("", "RuntimeError"), ("\n  ", "RuntimeError"), ("\nout of memory\nmore", "out of memory"), ("one", "one")],
)
def test_the_first_line_of_an_error_says_something(message, line):
    assert first_line(RuntimeError(message)) == line
