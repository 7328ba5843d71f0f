"""The command where hardly anybody runs it: several processes, a GPU made up, a system without a memory figure."""

from __future__ import annotations

import importlib
import json
import os
import socket
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bivec.engine.cli import checks, main
from bivec.engine.cli.convert import parse
from bivec.engine.encoder import Encoder
from bivec.engine.evaluation import local_tasks
from bivec.kernels import backend as backends

FLAGS = [
    *("--set", "mntp.optim.steps=2", "--set", "mntp.optim.warmup_steps=0", "--set", "mntp.batch_size=2"),
    *("--set", "mntp.sequence_length=24", "--set", "data_limit=40", "--set", "eval_pairs=12", "--stages", "bi,mntp"),
]


def test_the_module_runs_nothing_when_it_is_imported(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bivec", "transform"])  # wrong usage, which would end the process
    monkeypatch.delitem(sys.modules, "bivec.engine.cli.__main__", raising=False)
    assert importlib.import_module("bivec.engine.cli.__main__").main is main


@pytest.fixture
def gpu(monkeypatch):
    """gpu(major, minor): one GPU of this compute capability, as torch would show it; its tensors are the CPU's."""
    ones = torch.ones

    def make(major, minor):
        properties = SimpleNamespace(name="NVIDIA H200", total_memory=139 * 2**30)
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, minor))
        monkeypatch.setattr(torch, "ones", lambda size, device: ones(size))

    return make


def test_a_gpu_is_described(gpu):
    gpu(9, 0)
    cpu, found = checks.devices()
    assert (cpu.name, found.name, found.status) == ("cpu", "cuda:0", checks.OK)
    assert found.detail == "NVIDIA H200, sm_90, 139 GiB"


def test_a_gpu_that_is_too_old_for_the_kernels(gpu, monkeypatch):
    gpu(6, 1)
    monkeypatch.setattr(backends, "TRITON_INSTALLED", True)
    (found,) = checks.aot(full=False)
    assert (found.name, found.status) == ("kernels", checks.FAILED)
    assert found.detail.startswith("sm_61: the Triton kernels need compute capability 8.0")


@pytest.mark.parametrize("has_names", [True, False])
def test_a_system_that_does_not_tell_its_memory(monkeypatch, has_names):
    """Windows has no sysconf; another system may lack the name."""
    assert checks.devices()[0].detail.endswith(" GiB")
    if has_names:
        monkeypatch.setattr(os, "sysconf_names", {})
    else:
        monkeypatch.delattr(os, "sysconf")
    assert checks.devices()[0].detail.endswith(" threads")


def test_null_in_a_file_is_the_default_of_a_flag(tmp_path):
    (tmp_path / "a.yaml").write_text("model: m\nmemory: null\nseed: null\n")
    (tmp_path / "b.yaml").write_text("model: m\n")
    given, default = (parse(["--config", str(tmp_path / name)]) for name in ("a.yaml", "b.yaml"))
    assert given == default


@pytest.fixture
def second_of_two(monkeypatch):
    """This process is rank 1."""
    for name, value in {"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_the_second_process_does_not_tell_of_a_dry_run(bivec, second_of_two, flags):
    assert bivec("convert", "--preset", "mistral-7b", "--dry-run", *flags) == ("", "")


def test_standard_input_is_not_shared(bivec, second_of_two, tiny_llama_dir, tmp_path):
    printed, said = bivec("encode", tiny_llama_dir, "-", "-o", tmp_path / "e.npy", code=1)
    assert printed == "" and "2 processes cannot share standard input; give a file" in said
    assert not list(tmp_path.iterdir())


def test_ctrl_c_before_anything_was_written(bivec, tiny_llama_dir, tmp_path, monkeypatch):
    """There is nothing to go on with."""

    def stops(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("bivec.engine.run_start.Run", stops)
    words = ["convert", "--preset", "smollm2-135m", "--model", tiny_llama_dir, "--output-dir", tmp_path / "run"]
    printed, said = bivec(*words, code=130)
    assert printed == "" and said == "bivec: stopped\n" and not (tmp_path / "run").exists()


def test_scores_of_tasks_as_a_table(bivec, bivec_json, tiny_llama_dir, tmp_path, monkeypatch):
    make, sizes = local_tasks.local_tasks, local_tasks.LocalSizes(20, 10, 12, 6, 3, 6)
    monkeypatch.setattr(local_tasks, "local_tasks", lambda folder: make(folder, sizes))
    command = ["eval", tiny_llama_dir, "--output-dir", tmp_path, "--tasks", "LocalSTS"]
    score = bivec_json(*command)["tasks"]["LocalSTS"]
    lines = bivec(*command)[0].splitlines()
    assert lines[lines.index("| task | main score x 100 |") + 1 :][:2] == ["|---|---:|", f"| LocalSTS | {score:.2f} |"]


def in_two_processes(*words):
    """(stdout, stderr) of either rank of a command, both of which must end well."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(2):
        variables = {"SLURM_PROCID": rank, "SLURM_STEP_NUM_TASKS": 2, "SLURM_LOCALID": rank, "MASTER_PORT": port}
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **{name: str(value) for name, value in variables.items()}}
        command = [sys.executable, "-m", "bivec.engine.cli", *map(str, words), "--timeout", "250"]
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen(command, env=environment, **options))
    try:
        outputs = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs
    return outputs


@pytest.mark.slow
def test_two_processes_speak_once(tiny_llama_dir, tmp_path):
    """And train one encoder, of which both make embeddings."""
    words = ["convert", "--preset", "smollm2-135m", "--model", tiny_llama_dir, "--output-dir", tmp_path / "run"]
    (printed, _), (nothing, _) = in_two_processes(*words, *FLAGS)
    assert nothing == "" and "| bi+mntp | mean |" in printed
    assert printed.endswith(f"The encoder is in {tmp_path / 'run' / 'merged'}\n")
    texts = ["a choir sang", "the river runs north", "old kings"]
    (tmp_path / "texts.txt").write_text("\n".join(texts) + "\n")
    words = ["encode", tmp_path / "run", tmp_path / "texts.txt", "-o", tmp_path / "e.npy", "--slice-texts", "1"]
    (printed, _), (nothing, _) = in_two_processes(*words, "--json")
    assert nothing == "" and json.loads(printed)["texts"] == 3
    expected = Encoder.from_pretrained(tmp_path / "run").encode(texts)
    np.testing.assert_allclose(np.load(tmp_path / "e.npy"), expected, rtol=0, atol=1e-5)
