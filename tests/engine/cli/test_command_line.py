"""The command itself: help, version, exit codes, where output goes, and what it costs to ask for help."""

import json
import os
import re
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

import bivec as package
from bivec.engine import encoder_config
from bivec.engine.cli import COMMANDS, main
from bivec.engine.cli.models import POOLINGS
from bivec.engine.errors import RunError
from bivec.engine.presets import PRESETS

README = Path(__file__).parents[3] / "README.md"
HEAVY = ("torch", "transformers", "numpy", "datasets", "triton", "yaml")


def test_the_readme_names_every_command_and_preset():
    """That what it shows can be run, tests/test_readmes.py says."""
    section = README.read_text(encoding="utf-8").split("\n## Command line\n")[1].split("\n## ")[0]
    assert set(re.findall(r"^bivec ([a-z]+)", section, re.MULTILINE)) == set(COMMANDS)
    told = section.split("The presets are the recipes' settings:")[1].split("for any other decoder")[0]
    assert set(re.findall(r"`([\w.-]+)`", told)) == set(PRESETS)


def test_the_poolings_are_all_there():
    assert set(POOLINGS) == set(encoder_config.POOLINGS)


def test_help_names_every_command(bivec):
    printed, _ = bivec("--help")
    for name, (_, what) in COMMANDS.items():
        assert f"  {name:7}  {what}" in printed
    assert "exit codes: 0 done, 1 failed, 2 wrong usage, 130 stopped" in printed
    assert bivec("--version")[0] == f"bivec {package.__version__}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command(bivec, name):
    printed, _ = bivec(name, "--help")
    assert f"usage: bivec {name}" in printed and "examples:" in printed and f"bivec {name}" in printed
    options = printed.split("\noptions:")[1].split("\nexamples:")[0]
    flags = [line for line in options.splitlines() if line.startswith("  -")]
    assert "--json" in options and len(flags) > 1
    for line, following in zip(options.splitlines(), [*options.splitlines()[1:], ""], strict=True):
        if line.startswith("  -"):  # explained on its own line or on the next one
            assert "  " in line[4:] or following.startswith(" " * 10), line


@pytest.mark.parametrize("words", [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)])
def test_help_imports_nothing_heavy(words, tmp_path):
    """``convert`` alone takes its help from the recipes, which are made of torch's models."""
    script = (
        f"import sys\nfrom bivec.engine.cli import main\ntry:\n    main({words})\nexcept SystemExit:\n    pass\n"
        f"print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    loaded = done.stderr.strip()
    assert loaded == "[]" if words[0] != "convert" else "torch" in loaded and "transformers" not in loaded


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "usage: bivec"),
        (["transform"], "invalid choice: 'transform'"),
        (["encode"], "the following arguments are required: model, input, -o/--output"),
        (["encode", "m", "i", "-o", "o.npy", "--nonsense"], "unrecognized arguments: --nonsense"),
        (["export", "m", "o", "--format", "onnx"], "invalid choice: 'onnx'"),
        (["doctor", "--only", "versions,gpus"], "--only 'gpus': choose of versions,devices"),
        (["eval", "m", "--pairs", "0"], "argument --pairs: '0' is no number of at least 1"),
        (["eval", "m", "--sentences", "all"], "argument --sentences: 'all' is no number of at least 1"),
        (["convert"], "--model is needed, or a --preset that has one"),
        (["convert", "--preset", "mistral"], "argument --preset: invalid choice: 'mistral' (choose from"),
        (["convert", "--model", "m", "--stages", "bi,mlm"], "argument --stages: 'mlm' is none of bi, mntp, simcse"),
        (["convert", "--model", "m", "--stages", ","], "argument --stages: ',' is none of bi, mntp, simcse"),
        (["convert", "--model", "m", "--device", "zz"], "argument --device: 'zz' is no device of torch"),
        (["convert", "--model", "m", "--dtype", "f32"], "argument --dtype: 'f32' is none of float32"),
        (["eval", "m", "--device", "zz"], "argument --device: 'zz' is no device of torch, such as cuda"),
        (["convert", "--model", "m", "--dtype", "int8"], "argument --dtype: 'int8' is none of float32"),
        (["encode", "m", "i", "-o", "o.npy", "--dtype", "int8"], "argument --dtype: 'int8' is none of float32"),
        (["eval", "m", "--dtype", "zz"], "argument --dtype: 'zz' is none of float32, bfloat16, float16"),
        (["encode", "m", "i", "-o", "o.npy", "--pooling", "max"], "argument --pooling: invalid choice: 'max'"),
    ],
)
def test_wrong_usage_is_2(bivec, words, message):
    printed, error = bivec(*words, code=2)
    assert printed == "" and "usage: bivec" in error and message in error


def test_an_error_is_one_line_and_1(process, tiny_llama_dir, tmp_path):
    for words, message in (
        (("encode", tmp_path / "nowhere", "texts.txt", "-o", "o.npy"), "texts.txt does not exist"),
        (("eval", tmp_path / "nowhere"), "nowhere"),
        (("convert", "--config", "nowhere.yaml"), "nowhere.yaml: cannot be read"),
    ):
        done = process(*words)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith("bivec: error: ") and message in done.stderr
        assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("variable", ["RANK", "SLURM_PROCID"])
def test_of_several_processes_each_says_who_it_is(bivec, monkeypatch, variable):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv(variable, "3")
    assert bivec("bench", "slow", code=2)[1].startswith("bivec: rank 3: error: there is no benchmark 'slow'")


def test_a_bug_keeps_its_traceback(monkeypatch):
    def broken(*_):
        raise ZeroDivisionError("a bug of ours")

    monkeypatch.setattr("bivec.engine.cli.bench.benchmarks", broken)
    with pytest.raises(ZeroDivisionError):
        main(["bench"])


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            ModuleNotFoundError("No module named 'mteb'", name="mteb.tasks"),
            'mteb, which is not installed: pip install "',
        ),
        (ModuleNotFoundError("No module named 'sklearn'", name="sklearn"), 'pip install "bivec[eval]"'),
        (OSError(28, "No space left on device"), "No space left on device"),
        (RunError("the loss is NaN"), "the loss is NaN"),
        (RuntimeError("CUDA out of memory. Tried to allocate 20 GiB.\nmore"), "20 GiB.; give a smaller --tokens-per-"),
    ],
)
def test_what_a_user_can_mend_has_no_traceback(bivec, monkeypatch, error, message):
    def fails(*_):
        raise error

    monkeypatch.setattr("bivec.engine.cli.bench.benchmarks", fails)
    printed, said = bivec("bench", code=1)
    assert printed == "" and said.startswith("bivec: error: ") and message in said


def test_a_module_of_nobody_is_a_bug(monkeypatch):
    def fails(*_):
        raise ModuleNotFoundError("No module named 'bivec.engin'", name="bivec.engin")

    monkeypatch.setattr("bivec.engine.cli.bench.benchmarks", fails)
    with pytest.raises(ModuleNotFoundError):
        main(["bench"])


def test_ctrl_c_is_130(tmp_path):
    """A command that waits for standard input, stopped as a terminal does it."""
    command = [sys.executable, "-m", "bivec.engine.cli", "encode", "model", "-", "-o", "o.npy"]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    heeds = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # what a shell starts in the background ignores it
    started = subprocess.Popen(command, cwd=tmp_path, **pipes, text=True, preexec_fn=heeds)  # noqa: PLW1509 - takes no lock
    started.stdin.write("x" * 100_000 + "\n")  # more than a pipe holds: written when the command reads
    started.stdin.flush()
    started.send_signal(signal.SIGINT)
    printed, error = started.communicate(timeout=60)
    assert (started.returncode, printed) == (130, "")
    assert error.splitlines() == ["bivec: the same command without --overwrite goes on", "bivec: stopped"]


def test_a_reader_that_goes_early(tmp_path):
    """As in ``bivec bench | head -1``: no traceback."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "bivec.engine.cli", "bench"]
    done = subprocess.run(command, cwd=tmp_path, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")


def test_libraries_print_to_stderr(process, tiny_llama_dir, tmp_path):
    """stdout is one JSON document, whatever is said on the way."""
    (tmp_path / "texts.txt").write_text("a b\nc\n")
    done = process("encode", tiny_llama_dir, "texts.txt", "-o", "o.npy", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["texts"] == 2
