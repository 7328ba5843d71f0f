"""The compiler of GPU kernels without a GPU. pytest's process has Triton's interpreter on, so all run in others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

MODULE = """
import os

import torch
import triton
import triton.language as tl

from bivec.kernels.aot import Case
from bivec.kernels.launch import launch


@triton.jit
def matmul(a_ptr, b_ptr, c_ptr, k, bias_ptr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    rows, columns, inner = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, k, BLOCK_K):
        a = tl.load(a_ptr + rows[:, None] * k + (start + inner)[None, :])
        b = tl.load(b_ptr + (start + inner)[:, None] * BLOCK_N + columns[None, :])
        total = tl.dot(a, b, total)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + columns)[None, :]
    tl.store(c_ptr + rows[:, None] * BLOCK_N + columns[None, :], total.to(c_ptr.dtype.element_ty))


@triton.jit
def exponential(x_ptr, y_ptr, n, scale, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.exp2(tl.load(x_ptr + at, mask=at < n) * scale), mask=at < n)


def run_matmul(m, n, warps, k=64):
    def tensor(*shape):
        return torch.empty(shape, dtype=torch.bfloat16, device="meta")

    launch(
        matmul,
        (1,),
        dict(a_ptr=tensor(m, k), b_ptr=tensor(k, n), c_ptr=tensor(m, n), k=k, bias_ptr=None,
             BLOCK_M=m, BLOCK_N=n, BLOCK_K=32),
        num_warps=warps,
        num_stages=2,
    )


def run_exponential(block=256):
    x = torch.empty(4096, device="meta")
    launch(exponential, (16,), dict(x_ptr=x, y_ptr=x, n=4096, scale=0.5, BLOCK=block), num_warps=4, num_stages=1)


def raises():
    raise ValueError("no such row")


def crash(source, **options):
    os._exit(7)


def good():
    both = lambda: (run_matmul(64, 64, 4), run_exponential())
    again = lambda: run_matmul(64, 64, 4)
    return [Case("matmul", "bf16 both", both, frozenset({"matmul"})), Case("matmul", "again", again, frozenset())]


def elementwise():
    return [Case("other", "plain", run_exponential, frozenset())]


def bad():
    spilling = lambda: run_matmul(128, 64, 1)
    return [
        Case("matmul", "spilling", spilling, frozenset({"matmul"})),
        Case("other", "no dot", run_exponential, frozenset({"exponential"})),
        Case("other", "not launched", run_exponential, frozenset({"matmul"})),
        Case("other", "odd block", lambda: run_exponential(100), frozenset()),
        Case("other", "raises", raises, frozenset()),
    ]


def crashing():
    compile = triton.compile
    triton.compile = lambda source, **options: (
        crash(source) if source.fn.__name__ == "matmul" else compile(source, **options)
    )
    return good()
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "our_cases.py").write_text(MODULE, encoding="utf-8")
    return tmp_path


def _environment(folder: Path, **extra: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    places = {"PYTHONPATH": str(folder), "BIVEC_CACHE": str(folder / "cache"), "TMPDIR": str(folder)}
    return kept | places | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"} | extra


def _aot(folder: Path, function: str, *options: str, **extra: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bivec.kernels.aot", "--cases", f"our_cases:{function}", "--json", "rows.json"]
    return subprocess.run(
        [*command, *options], cwd=folder, env=_environment(folder, **extra), capture_output=True, text=True, timeout=300
    )


def _outcomes(folder: Path) -> list[dict]:
    return [row["outcome"] for row in json.loads((folder / "rows.json").read_text(encoding="utf-8"))]


def test_check_passes_on_all_architectures_and_reads_the_cache_the_second_time(folder: Path) -> None:
    first = _aot(folder, "good", "--check")
    assert first.returncode == 0, first.stdout + first.stderr
    assert "12 kernels of 2 cases: 0 failed, 8 compiled, 0 from the cache" in first.stdout  # the repeated one once
    outcomes = _outcomes(folder)
    for outcome in outcomes:
        counts = outcome["instructions"]
        is_matmul = outcome["kernel"] == "matmul"
        assert outcome["spills"] == 0 and 0 < outcome["registers"] <= 255
        assert (counts["tensor_core"] > 0) == (outcome["shared"] > 0) == (counts["shared_loads"] > 0) == is_matmul
        assert (counts["mufu"] > 0) == (not is_matmul)
        assert counts["global_loads"] > 0 and counts["global_stores"] > 0 and counts["total"] > 20
        assert counts["local_loads"] == counts["local_stores"] == counts["atomics"] == 0
    assert {outcome["architecture"] for outcome in outcomes} == {"sm_80", "sm_90", "sm_100", "gfx942"}
    assert {outcome["tensor_memory"] for outcome in outcomes if outcome["architecture"] == "sm_100"} == {0, 64}
    assert outcomes[0]["config"] == {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}
    assert {path.name for path in folder.iterdir()} == {"our_cases.py", "rows.json", "cache"}  # no temporary files

    second = _aot(folder, "good", "--check")
    assert second.returncode == 0
    assert "0 compiled, 8 from the cache" in second.stdout
    assert _outcomes(folder) == outcomes


def test_a_corrupt_cache_entry_is_compiled_again(folder: Path) -> None:
    _aot(folder, "elementwise", "--arch", "sm_90")
    expected = _outcomes(folder)
    (entry,) = (folder / "cache").iterdir()
    for text in ("{", '{"kernel": "exponential"}'):
        entry.write_text(text, encoding="utf-8")
        result = _aot(folder, "elementwise", "--arch", "sm_90", "--check")
        assert "1 compiled, 0 from the cache" in result.stdout
        assert _outcomes(folder) == expected


def test_a_changed_kernel_is_compiled_again(folder: Path) -> None:
    _aot(folder, "elementwise", "--arch", "sm_80")
    module = folder / "our_cases.py"
    module.write_text(MODULE.replace("tl.exp2(", "tl.log2("), encoding="utf-8")
    assert "1 compiled, 0 from the cache" in _aot(folder, "elementwise", "--arch", "sm_80", "--check").stdout
    module.write_text(MODULE, encoding="utf-8")
    assert "0 compiled, 1 from the cache" in _aot(folder, "elementwise", "--arch", "sm_80", "--check").stdout


def test_check_names_what_fails_and_why(folder: Path) -> None:
    result = _aot(folder, "bad", "--check", "--arch", "sm_90")
    assert result.returncode == 1
    failures = {line.split("  ")[3]: line for line in result.stdout.splitlines() if line.startswith("FAILED")}
    assert set(failures) == {"spilling", "no dot", "not launched", "odd block", "raises"}
    assert "matmul: spills " in failures["spilling"]
    assert "exponential: is a matmul without tensor-core instructions" in failures["no dot"]
    assert "does not launch matmul" in failures["not launched"]
    assert "exponential: does not compile: ValueError: arange's range must be a power of 2" in failures["odd block"]
    assert "ValueError: no such row" in failures["raises"]
    spilling = _outcomes(folder)[2]
    assert spilling["registers"] == 255 and spilling["stack"] > 0
    assert spilling["instructions"]["local_loads"] > 0 and spilling["instructions"]["local_stores"] > 0
    assert "Traceback" not in result.stdout + result.stderr


def test_spilled_bytes_are_those_ptxas_prints(folder: Path) -> None:
    script = """
import re, tempfile, triton
from bivec.kernels import aot, aot_binary, launch
import our_cases
with launch.recording("sm_80") as launches:
    our_cases.run_matmul(128, 64, 1)
report = aot.compile_launch(launches[0], "sm_80").report
job = aot_binary.specialise(launches[0], "sm_80")
triton.knobs.nvidia.dump_ptxas_log = True
triton.knobs.cache.dir = tempfile.mkdtemp()
import contextlib, io
log = io.StringIO()
with contextlib.redirect_stdout(log):
    triton.compile(job.source, target=aot_binary.backend_for("sm_80").target, options=job.options)
pattern = r"(\\d+) bytes stack frame, (\\d+) bytes spill stores, (\\d+) bytes spill loads"
((stack, stores, loads),) = re.findall(pattern, log.getvalue())
(registers,) = re.findall(r"Used (\\d+) registers", log.getvalue())
assert report.spills == int(stores) + int(loads) > 0, (report, log.getvalue())
assert (report.stack, report.registers) == (int(stack), int(registers))
"""
    finished = subprocess.run(
        [sys.executable, "-c", script], env=_environment(folder), capture_output=True, text=True, timeout=300
    )
    assert finished.returncode == 0, finished.stderr


def test_batched_raw_disassembly_counts_what_nvdisasm_finds_in_each_cubin(folder: Path) -> None:
    script = """
import subprocess, re, triton
from bivec.kernels import aot, aot_binary, launch
import our_cases
for architecture in ("sm_80", "sm_90", "sm_100"):
    with launch.recording(architecture) as launches:
        our_cases.run_exponential()
        our_cases.run_matmul(64, 64, 4)
    compiled = [aot.compile_launch(one, architecture) for one in launches]
    together = aot_binary.read_cubins([one.binary for one in compiled], architecture)
    for one, (resources, text) in zip(compiled, together):
        assert resources.instructions == one.report.instructions
        open("one.cubin", "wb").write(one.binary)
        plain = subprocess.run([triton.knobs.nvidia.nvdisasm.path, "-c", "one.cubin"], capture_output=True, text=True)
        opcode = re.compile(r"/\\*[0-9a-f]{4,}\\*/\\s+(?:@!?U?P\\w+\\s+)?([A-Z][\\w.]*)")
        assert opcode.findall(text) == opcode.findall(plain.stdout) != []
"""
    finished = subprocess.run(
        [sys.executable, "-c", script],
        cwd=folder,
        env=_environment(folder),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr


def test_too_much_shared_memory_fails(folder: Path) -> None:
    script = """
import dataclasses
from bivec.kernels import aot, launch
import our_cases
case, = our_cases.elementwise()
report, = aot.report(case, "gfx942")
assert aot._problems(report, case) == ()
assert aot._problems(dataclasses.replace(report, shared=65536), case) == ()
assert aot._problems(dataclasses.replace(report, shared=65552), case) == (
    "needs 65552 bytes of shared memory, a block has 65536",)
assert aot._problems(dataclasses.replace(report, tensor_memory=513), case) == (
    "needs 513 columns of tensor memory, there are 512",)
try:
    aot.report(case, "sm_70")
except ValueError as error:
    assert "sm_70" in str(error)
else:
    raise AssertionError("sm_70 was accepted")
"""
    finished = subprocess.run(
        [sys.executable, "-c", script], env=_environment(folder), capture_output=True, text=True, timeout=300
    )
    assert finished.returncode == 0, finished.stderr


def test_a_crash_of_the_compiler_is_the_failure_of_its_kernel_only(folder: Path) -> None:
    result = _aot(folder, "crashing", "--check", "--arch", "sm_80", "--match", "both")
    assert result.returncode == 1, result.stderr
    failures = [line for line in result.stdout.splitlines() if line.startswith("FAILED")]
    assert len(failures) == 1 and "matmul: does not compile: the compiler crashed" in failures[0]


def test_the_table_shows_the_chosen_cases(folder: Path) -> None:
    result = _aot(folder, "good", "--arch", "gfx942", "--match", "again")
    assert result.returncode == 0
    header, row, summary = result.stdout.splitlines()
    assert header.split()[:5] == ["family", "case", "arch", "kernel", "config"]
    assert row.split()[:4] == ["matmul", "again", "gfx942", "matmul"]
    assert summary.startswith("1 kernels of 1 cases: 0 failed")
    assert _aot(folder, "good", "--family", "nothing").returncode == 2


def test_the_interpreter_is_refused(folder: Path) -> None:
    result = _aot(folder, "good", "--check", TRITON_INTERPRET="1")
    assert result.returncode == 2
    assert "TRITON_INTERPRET is on" in result.stderr
