"""The parts of the compiler of GPU kernels, one by one: what they read, what they refuse, and how they say it."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from bivec.kernels import aot, aot_binary, aot_cases, aot_cases_layers, aot_cases_lora
from bivec.kernels.launch import recording

AMDGCN = """\
\t.amdgcn_target "amdgpu9.42-amd-amdhsa-unknown-gfx942"
kernel:                                 ; @kernel
\ts_load_dwordx4 s[4:7], s[0:1], 0x0
\tglobal_load_dwordx4 v[0:3], v0, s[4:5]
\tbuffer_load_dword v4, off, s[4:7], 0
\tds_write_b64 v5, v[0:1]
\tds_read_b128 v[0:3], v5
\tds_bpermute_b32 v6, v5, v0
\tv_mfma_f32_16x16x16_bf16 v[0:3], v[0:1], v[2:3], 0
\tv_smfmac_f32_16x16x32_bf16 v[0:3], v[0:1], v[2:5], v6
\tv_exp_f32_e32 v0, v0
%s
\tglobal_atomic_add_f32 v0, v1, s[4:5]
\tflat_store_dword v[0:1], v2
\ts_endpgm
\t.amdgpu_metadata
---
amdhsa.kernels:
  - .agpr_count:     16
    .group_segment_fixed_size: 512
    .name:           kernel
    .private_segment_fixed_size: 40
    .sgpr_count:     19
    .sgpr_spill_count: 7
    .vgpr_count:     96
    .vgpr_spill_count: %d
...
\t.end_amdgpu_metadata
"""
SCRATCH = """\
\tscratch_store_dwordx4 off, v[0:3], off
\tscratch_load_dwordx2 v[0:1], off, off
\tscratch_load_dword v0, off, off
\tscratch_store_short off, v0, off
\tscratch_load_ubyte v0, off, off"""
CASES = """
import torch
import triton
import triton.language as tl

from bivec.kernels.aot import Case
from bivec.kernels.launch import launch


@triton.jit
def double(x_ptr, scale, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(x_ptr + at, tl.load(x_ptr + at) * scale)


def run(block=64, scale=2.0):
    arguments = dict(x_ptr=torch.empty(64, device="meta"), scale=scale, BLOCK=block)
    launch(double, (1,), arguments, num_warps=1, num_stages=1)


good = Case("other", "good", run, frozenset())
odd_block = Case("other", "odd block", lambda: run(block=48), frozenset())
strange_scale = Case("other", "strange scale", lambda: run(scale=object()), frozenset())
"""


# --- what binaries and tools say ------------------------------------------------------------------------------------


def test_amdgcn_is_counted_by_kind():
    resources = aot_binary.read_amdgcn(AMDGCN % (SCRATCH, 0))
    assert (resources.registers, resources.stack, resources.static_shared) == (96, 40, 512)
    assert resources.instructions == aot_binary.Instructions(
        total=17,
        tensor_core=2,
        mufu=1,
        global_loads=2,
        global_stores=1,
        shared_loads=1,
        shared_stores=1,
        local_loads=3,
        local_stores=2,
        atomics=1,
    )


@pytest.mark.parametrize(("registers", "bytes_"), [(0, 31), (7, 31), (8, 32)])
def test_amd_spills_are_the_larger_of_registers_and_moves(registers, bytes_):
    """16 + 8 + 4 + 2 + 1 bytes are moved; scalar registers do not count."""
    assert aot_binary.read_amdgcn(AMDGCN % (SCRATCH, registers)).spills == bytes_


def test_amdgcn_without_scratch_spills_nothing():
    assert aot_binary.read_amdgcn(AMDGCN % ("\ts_nop 0", 0)).spills == 0


def test_a_tool_that_fails_is_named_with_what_it_said():
    with pytest.raises(RuntimeError, match=rf"^{Path(sys.executable).name} failed: no such cubin$"):
        aot_binary._run(sys.executable, "-c", "raise SystemExit('no such cubin')")


def cubin(code: bytes) -> bytes:
    """An ELF file of two sections: their names, and a kernel's code."""
    names = b"\0.shstrtab\0.text.kernel\0"
    header = bytearray(64)
    struct.pack_into("<Q", header, 0x28, 64 + len(names) + len(code))
    struct.pack_into("<HHH", header, 0x3A, 64, 2, 0)
    sections = [(1, 64, len(names)), (11, 64 + len(names), len(code))]
    table = b"".join(
        struct.pack("<IIQQQQIIQQ", name, 1, 0, 0, offset, size, 0, 0, 1, 0) for name, offset, size in sections
    )
    return bytes(header) + names + code + table


@pytest.mark.parametrize(
    ("says", "message"),
    [
        ("echo '/*0000*/ MOV R1, c[0x0][0x28] ;'", "nvdisasm printed 1 instructions of code that holds 2"),
        ("echo 'not supported' >&2; exit 3", "nvdisasm failed: not supported"),
    ],
)
def test_a_disassembler_that_does_not_know_the_code_is_an_error(says, message, tmp_path, monkeypatch):
    """That of another CUDA release, for instance, where TRITON_NVDISASM_PATH names it."""
    tool = tmp_path / "nvdisasm"
    tool.write_text(f'#!/bin/sh\nif [ "$1" = --version ]; then echo "release 12.8"; else {says}; fi\n')
    tool.chmod(0o755)
    monkeypatch.setenv("TRITON_NVDISASM_PATH", str(tool))
    with pytest.raises(RuntimeError, match=rf"^{message}$"):
        aot_binary.read_cubins([cubin(bytes(32))], "sm_80")


# --- errors and the cache -------------------------------------------------------------------------------------------


def test_the_interpreter_cannot_compile(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    aot_binary.backend_for.cache_clear()
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET is on"):
        aot_binary.backend_for("sm_90")


def test_an_error_is_told_by_the_cause_that_started_it():
    errors = (
        TypeError("at 2:6:\n    tl.arange(0, 3)\n       ^"),
        RuntimeError("inner"),
        ValueError("a power of 2\n\nis needed\nat least\nhere"),
    )
    for error, cause in pairwise(errors):
        error.__cause__ = cause
    assert aot._first_lines(errors[0]) == "ValueError: a power of 2 | is needed | at least | tl.arange(0, 3)"
    assert aot._first_lines(KeyError("BLOCK"), count=1) == "KeyError: 'BLOCK'"


def test_a_report_in_the_cache_is_read_as_it_was_written(tmp_path, monkeypatch):
    counts = aot_binary.Instructions(*range(10))
    entry = aot.Report("kernel", "sm_90", {"BLOCK_M": 64, "num_warps": 4}, 255, 8, 16, 1024, 0, True, counts)
    monkeypatch.setenv("BIVEC_CACHE", str(tmp_path / "cache" / "aot"))
    assert aot._read_cache("key") is None
    for spills in (0, 8):  # a second process that compiled the same writes over it
        aot._write_cache("key", replace(entry, spills=spills))
    assert aot._read_cache("key") == entry
    assert [path.name for path in (tmp_path / "cache" / "aot").iterdir()] == ["key.json"]  # no temporary file


def test_kernels_that_do_not_compile_are_failures_beside_the_others(tmp_path):
    """In a process without the interpreter, by the functions that a worker of the pool calls."""
    (tmp_path / "our_cases.py").write_text(CASES, encoding="utf-8")
    script = """
import tempfile
from bivec.kernels import aot, aot_binary
import our_cases

def launched(case):
    (launch,) = aot._launches(case, "gfx942")
    return launch

def raised(kind, function, *arguments):
    try:
        function(*arguments)
    except kind as error:
        return str(error)
    raise AssertionError(f"{arguments} did not fail")

power = "arange's range must be a power of 2"
good, odd = (aot_binary.specialise(launched(case), "gfx942") for case in (our_cases.good, our_cases.odd_block))
aot._worker_chunks[:] = [[odd, good, odd]]
aot._worker_folder = tempfile.mkdtemp()
first, report, last = aot._compile_chunk(0)
assert first == last == aot.Failure("double", "gfx942", first.error), (first, last)
assert first.error.startswith("ValueError: " + power) and "tl.arange(0, BLOCK)" in first.error, first
assert report == aot._read_cache(good.key) and aot._read_cache(odd.key) is None
assert report == aot.compile_launch(good.launch, "gfx942").report
assert report.instructions.global_loads == report.instructions.global_stores == 1 and report.registers > 0, report
(only,) = aot_binary.compile_jobs([odd])
assert isinstance(only, Exception)

assert power in raised(type(only), aot.compile_launch, odd.launch, "gfx942")
message = raised(RuntimeError, aot.report, our_cases.strange_scale, "gfx942")
assert message.startswith("double does not compile for gfx942: TypeError: "), message
assert message.endswith("argument of type: object"), message
message = raised(RuntimeError, aot.report, our_cases.odd_block, "sm_80")
assert message.startswith("double does not compile for sm_80: ValueError: " + power), message
"""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    places = {"PYTHONPATH": path, "BIVEC_CACHE": str(tmp_path / "cache"), "TMPDIR": str(tmp_path)}
    finished = subprocess.run(
        [sys.executable, "-c", script],
        env=kept | places | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr


# --- the cases ------------------------------------------------------------------------------------------------------


def kernels_of(call, architecture="sm_90"):
    with recording(architecture) as launches:
        call()
    return {launch.kernel.__name__ for launch in launches}


PROBLEM = aot_cases.attention_problem(torch.bfloat16, 64)
LORA = (torch.bfloat16, torch.float32, 16, 2, 0.05)
NORM = (torch.bfloat16, 4096, True, True, True)


@pytest.mark.parametrize(
    ("run", "forward", "backward"),
    [
        (
            lambda passes: aot_cases.run_long(PROBLEM, passes),
            {"attention_forward"},
            aot_cases.LONG_KERNELS - {"attention_forward"},
        ),
        (
            lambda passes: aot_cases.run_short(PROBLEM, 64, passes),
            {"attention_short_forward"},
            {"attention_short_backward"},
        ),
        (
            lambda passes: aot_cases_lora.run(*LORA, passes=passes),
            {"lora_project", "lora_update"},
            {"lora_project", "lora_update", "lora_gradient"},
        ),
        (
            lambda passes: aot_cases_layers.run_rms_norm(*NORM, passes[0] if len(passes) == 1 else "both"),
            {"rms_norm_forward"},
            {"rms_norm_backward"},
        ),
    ],
    ids=["long", "short", "lora", "rms_norm"],
)
def test_a_case_of_one_pass_launches_its_kernels_only(run, forward, backward):
    assert kernels_of(lambda: run(("forward",))) >= forward
    assert kernels_of(lambda: run(("backward",))) >= backward
    assert kernels_of(lambda: run(("forward",))).isdisjoint(backward - forward)
    assert kernels_of(lambda: run(("backward",))).isdisjoint(forward - backward)
    assert kernels_of(lambda: run(("forward", "backward"))) >= forward | backward


def test_what_tuning_compiles_has_other_shapes_and_fp16_besides():
    """Each once; and each launches its kernels, those of halves with tensor cores."""
    checked, tuned = (
        {(case.family, case.label): case for case in cases} for cases in (aot_cases.cases(), aot_cases.all_cases())
    )
    assert len(tuned) == len(aot_cases.all_cases()) and set(checked) < set(tuned)
    extra = {place: case for place, case in tuned.items() if place not in checked}
    shapes = ("d80 g1", "d96 g3", "d128 g7")
    expected = {("attention_long", f"{dtype} {shape} all") for dtype in ("bf16", "fp32") for shape in shapes}
    expected |= {("attention_short", f"bf16 {shape} L64 all") for shape in shapes}
    assert {place for place in extra if not place[1].startswith("fp16")} == expected
    assert {label.split()[1] for _, label in extra if label.startswith("fp16")} == {"d64", "d256"}
    for family, label in expected:
        kernels = aot_cases.LONG_KERNELS if family == "attention_long" else aot_cases.SHORT_KERNELS
        case = extra[family, label]
        assert case.matmul == (kernels if label.startswith("bf16") else frozenset())
        assert kernels_of(case.call) >= kernels
