"""How a run starts and stops in a process that is not the first, and an error that is nobody's input."""

import pytest
import torch

from bivec.engine.run_start import start

SECOND = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}


@pytest.fixture
def as_rank(monkeypatch):
    def become(rank):
        monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
        for name, value in (SECOND | {"RANK": str(rank), "LOCAL_RANK": str(rank)}).items():
            monkeypatch.setenv(name, value)

    return become


def stopped(recipe, directory, *flags):
    """The exit code of a run that ends before its first step."""
    with pytest.raises(SystemExit) as stop, start(recipe, "a test", ["--output-dir", str(directory), *flags]):
        pytest.fail("it has started")
    return stop.value.code


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_process_alone_describes_the_run(rank, recipe, tmp_path, as_rank, capsys):
    as_rank(rank)
    assert stopped(recipe, tmp_path / "out", "--dry-run") == 0
    out, err = capsys.readouterr()
    assert bool(out) is (rank == 0) and err == ""


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_process_alone_says_that_it_was_stopped(rank, recipe, tmp_path, as_rank, capsys, monkeypatch):
    """While the processes look for each other."""

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.distributed, "TCPStore", interrupted)
    as_rank(rank)
    assert stopped(recipe, tmp_path / "out") == 130
    assert capsys.readouterr().err == ("" if rank else "stopped before anything was written\n")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.json").write_text("{}")
    assert stopped(recipe, tmp_path / "out", "--resume") == 130
    told = capsys.readouterr().err
    assert told == ("" if rank else "stopped; to go on: the same command with --resume\n")


def test_an_error_of_torch_keeps_its_traceback(recipe, tmp_path, capsys):
    """It is no input of the user's; being out of memory is, and says what to give."""
    words = ["--output-dir", str(tmp_path / "out")]
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), start(recipe, "a test", words):
        torch.ones(2, 3) @ torch.ones(2, 3)
    assert "error" not in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop, start(recipe, "a test", [*words, "--resume"]):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore lines")
    assert stop.value.code == 2
    told = capsys.readouterr().err
    assert "error: CUDA out of memory. Tried to allocate 2 GiB\ngive --memory a size" in told and "more" not in told
