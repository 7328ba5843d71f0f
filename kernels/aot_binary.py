"""From one launch to its binary, and what the binary says it costs; ``kernels/aot.py`` does so for all.

When a kernel counts as spilling is decided on what it does, not on how large a frame it reserves. On NVIDIA, ``spills``
is the sum of the widths of the LDL and STL instructions in the code. In seven spilling matmuls compiled for sm_80,
sm_90 and sm_100 (696 to 8348 bytes) that sum equalled, to the byte, the "bytes spill loads" and "bytes spill stores"
which ptxas printed; an array indexed at run time, which ptxas does not call a spill, is also local memory and counts
too. A STACK without any LDL or STL is only reserved, and is reported beside it as ``stack``. On AMD, LLVM moves
registers to the accumulator half of the register file before it moves them to scratch memory (240 spilled registers,
of which 17 in scratch, in a matmul of 256 x 256 with 4 wavefronts); both are copies that a smaller tile does not need,
so ``spills`` is four bytes for each spilled vector register, or the widths of the scratch instructions where these are
more. Scalar registers are spilled to single lanes of a vector register, once in a kernel and not in memory: they do
not count.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import re
import struct
import subprocess
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

from bivec.kernels.launch import Launch, interpreting
from bivec.kernels.tuning import ARCHITECTURES

REPORT_FORMAT = 1  # raise it when a Report changes its meaning: cached ones are then ignored

# cuobjdump counts the kilobyte that the driver reserves on these in every block; the limit of a block does not
RESERVED_SHARED = {"sm_80": 0, "sm_90": 1024, "sm_100": 1024}
DISASSEMBLER_NAMES = {"sm_80": "SM80", "sm_90": "SM90a", "sm_100": "SM100a"}

_SASS = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")
_SASS_KINDS = {
    "tensor_core": r"(?:UTC)?[HQIBDO]G?MMA",
    "mufu": r"MUFU",
    "global_loads": r"LDG|LDGSTS|LD|UBLKCP|UTMALDG",
    "global_stores": r"STG|ST|UTMASTG",
    "shared_loads": r"LDS|LDSM",
    "shared_stores": r"STS|STSM",
    "local_loads": r"LDL",
    "local_stores": r"STL",
    "atomics": r"ATOM|ATOMG|RED|REDG|REDAS|UTMAREDG",
}
_AMDGCN = re.compile(r"^\t((?:s|v|ds|global|buffer|flat|scratch)_\w+)", re.MULTILINE)
_AMDGCN_KINDS = {
    "tensor_core": r"v_s?mfmac?_\w+",
    "mufu": r"v_(?:exp|log|rcp|rsq|sqrt|sin|cos)_\w+",
    "global_loads": r"(?:global|buffer|flat)_load_\w+",
    "global_stores": r"(?:global|buffer|flat)_store_\w+",
    "shared_loads": r"ds_(?:read|load)\w*",  # not ds_bpermute and ds_swizzle, which exchange registers
    "shared_stores": r"ds_(?:write|store)\w*",
    "local_loads": r"scratch_load_\w+",
    "local_stores": r"scratch_store_\w+",
    "atomics": r"(?:global|buffer|flat)_atomic_\w+",
}


@dataclass(frozen=True)
class Instructions:
    """How many instructions of each kind the code has, each counted once however often it runs."""

    total: int
    tensor_core: int  # HMMA, HGMMA, UTCHMMA and their kin; v_mfma
    mufu: int  # exp2, log2, reciprocal, square root, sine, cosine
    global_loads: int  # those that copy to shared memory included
    global_stores: int
    shared_loads: int
    shared_stores: int
    local_loads: int
    local_stores: int
    atomics: int  # on global memory


@dataclass(frozen=True)
class Resources:
    """What the binary says of a kernel."""

    registers: int  # a thread's; on AMD the accumulator registers are among them
    spills: int  # bytes; see the module's docstring
    stack: int  # bytes of local memory reserved for each thread
    static_shared: int  # bytes
    instructions: Instructions


@dataclass(frozen=True)
class Report:
    """What one compiled kernel costs."""

    kernel: str
    architecture: str
    config: dict[str, int]  # BLOCK_* and the like, num_warps, num_stages
    registers: int  # a thread's; on AMD the accumulator registers are among them
    spills: int  # bytes; see the module's docstring
    stack: int  # bytes of local memory reserved for each thread
    shared: int  # bytes of a block, static and dynamic
    tensor_memory: int  # columns, sm_100
    serialized: bool  # ptxas warns that it could not let wgmma run asynchronously (sm_90)
    instructions: Instructions


@dataclass(frozen=True)
class Compiled:
    """A compiled kernel."""

    report: Report
    binary: bytes  # cubin or hsaco
    assembly: str  # SASS or amdgcn


@dataclass(frozen=True)
class Job:
    """A launch, specialised: what triton.compile is given."""

    launch: Launch
    architecture: str
    source: Any  # triton.compiler.ASTSource
    options: dict[str, Any]
    key: str  # hash of the above and of the compiler


def compile_launch(launch: Launch, architecture: str) -> Compiled:
    """Compiles the kernel of ``launch`` in this process, without the cache.

    Args:
        launch: as :func:`bivec.kernels.launch.recording` noted it.
        architecture: one of ``bivec.kernels.tuning.ARCHITECTURES``.

    Returns:
        The report, the binary and its assembly.

    Raises:
        ValueError: the architecture is none of ours.
        RuntimeError: Triton's interpreter is on.
        Exception: whatever the compiler raises.
    """
    backend_for(architecture)
    with tempfile.TemporaryDirectory() as folder, quiet_compiler(folder):
        (outcome,) = compile_jobs([specialise(launch, architecture)])
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


@cache
def backend_for(architecture: str) -> Any:
    """Triton's compiler backend for ``architecture``; raises as :func:`compile_launch`."""
    if interpreting():
        raise RuntimeError("TRITON_INTERPRET is on: Triton's interpreter cannot compile; unset it for this process")
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture is {architecture!r}, expected one of {', '.join(ARCHITECTURES)}")
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend

    if architecture.startswith("gfx"):
        return make_backend(GPUTarget("hip", architecture, 64))
    return make_backend(GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32))


def specialise(launch: Launch, architecture: str) -> Job:
    """Specialises ``launch`` with the very functions of ``JITFunction.run``.

    Their rules differ from one Triton release to the next (pointers within 2 GB on AMD, for instance), and a copy of
    them would drift.
    """
    backend = backend_for(architecture)
    from triton._C.libtriton import get_cache_invalidating_env_vars
    from triton.compiler import ASTSource
    from triton.runtime.cache import get_cache_key
    from triton.runtime.jit import create_function_from_signature

    kernel = launch.kernel
    arguments = launch.arguments | {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, extra = binder(**arguments)
    pack = kernel._pack_args  # noqa: SLF001 - what ``run`` calls
    options, signature, constexprs, attributes = pack(backend, arguments, bound, specialization, extra)
    source = ASTSource(kernel, signature, constexprs, attributes)
    # Triton's own key: the text of the kernel and of all it calls, signature, constexprs, attributes, options,
    # environment, and the files of Triton and ptxas
    key = get_cache_key(source, backend, options, get_cache_invalidating_env_vars())
    digest = hashlib.sha256(f"{REPORT_FORMAT} {architecture} {key}".encode()).hexdigest()
    return Job(launch, architecture, source, dict(options.__dict__), digest)


@contextlib.contextmanager
def quiet_compiler(folder: str) -> Iterator[None]:
    """Triton compiles always, prints ptxas' log, and leaves nothing outside ``folder``."""
    from triton import knobs

    default = tempfile.tempdir
    with knobs.cache.scope(), knobs.compilation.scope(), knobs.nvidia.scope(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")  # we compile with the user's default
        knobs.cache.dir = folder
        knobs.compilation.always_compile = True
        knobs.nvidia.dump_ptxas_log = True
        tempfile.tempdir = folder  # where ptxas fails, Triton leaves its input behind
        try:
            yield
        finally:
            tempfile.tempdir = default


def compile_jobs(jobs: Sequence[Job]) -> list[Compiled | Exception]:
    """Compiles jobs of one architecture."""
    import triton

    architecture = jobs[0].architecture
    target = backend_for(architecture).target
    outcomes: list[Any] = []
    for job in jobs:
        log = io.StringIO()
        try:
            with contextlib.redirect_stdout(log):
                kernel = triton.compile(job.source, target=target, options=job.options)
            outcomes.append((job, kernel, log.getvalue()))
        except Exception as error:  # noqa: BLE001 - Triton, MLIR and ptxas each have their own kinds
            outcomes.append(error)
    compiled = [outcome for outcome in outcomes if not isinstance(outcome, Exception)]
    if architecture.startswith("gfx"):
        read = [(read_amdgcn(kernel.asm["amdgcn"]), kernel.asm["amdgcn"]) for _, kernel, _ in compiled]
    else:
        read = read_cubins([kernel.asm["cubin"] for _, kernel, _ in compiled], architecture) if compiled else []
    readings = iter(read)
    for index, outcome in enumerate(outcomes):
        if not isinstance(outcome, Exception):
            job, kernel, log = outcome
            outcomes[index] = _compiled(job, kernel, log, *next(readings))
    return outcomes


def _compiled(job: Job, kernel: Any, log: str, resources: Resources, assembly: str) -> Compiled:
    launch, metadata = job.launch, kernel.metadata
    config = {name: value for name, value in launch.arguments.items() if name.startswith("BLOCK_")}
    result = Report(
        kernel=launch.kernel.__name__,
        architecture=job.architecture,
        config=config | {"num_warps": launch.num_warps, "num_stages": launch.num_stages},
        registers=resources.registers,
        spills=resources.spills,
        stack=resources.stack,
        shared=metadata.shared + resources.static_shared,
        tensor_memory=getattr(metadata, "tmem_size", None) or 0,
        serialized="wgmma.mma_async instructions are serialized" in log,
        instructions=resources.instructions,
    )
    return Compiled(result, kernel.kernel, assembly)


# --- what a binary says ---------------------------------------------------------------------------------------------


def read_cubins(cubins: Sequence[bytes], architecture: str) -> list[tuple[Resources, str]]:
    """What each cubin costs, and its instructions.

    Args:
        cubins: one kernel each, for ``architecture``.
        architecture: "sm_80", "sm_90" or "sm_100".

    Returns:
        For each cubin its resources and its disassembly, one instruction a line.
    """
    return [
        (_cubin_resources(cubin, lines, architecture), "\n".join(lines))
        for cubin, lines in zip(cubins, _disassemble(cubins, architecture), strict=True)
    ]


def read_amdgcn(assembly: str) -> Resources:
    """What a kernel costs, from the assembly and the metadata that its code object is made of."""
    metadata = dict(re.findall(r"^\s+\.(\w+):\s+(\d+)$", assembly, re.MULTILINE))
    opcodes = _AMDGCN.findall(assembly)
    scratch = sum(_scratch_width(opcode) for opcode in opcodes if opcode.startswith("scratch_"))
    return Resources(
        registers=int(metadata["vgpr_count"]),
        spills=max(4 * int(metadata["vgpr_spill_count"]), scratch),
        stack=int(metadata["private_segment_fixed_size"]),
        static_shared=int(metadata["group_segment_fixed_size"]),
        instructions=_count(opcodes, _AMDGCN_KINDS),
    )


def _cubin_resources(cubin: bytes, lines: list[str], architecture: str) -> Resources:
    usage = _cuobjdump_usage(cubin)
    opcodes = [match[2] for match in map(_SASS.search, lines) if match and match[2] != "NOP"]
    return Resources(
        registers=usage["REG"],
        spills=sum(_local_width(opcode) for opcode in opcodes if opcode.split(".")[0] in ("LDL", "STL")),
        stack=usage["STACK"],
        static_shared=max(usage["SHARED"] - RESERVED_SHARED[architecture], 0),
        instructions=_count([opcode.split(".")[0] for opcode in opcodes], _SASS_KINDS),
    )


def _cuobjdump_usage(cubin: bytes) -> dict[str, int]:
    """REG, STACK and SHARED of the kernel; where it calls functions, the largest of theirs."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        output = _run(knobs.nvidia.cuobjdump.path, "-res-usage", file.name)
    return {name: max(map(int, re.findall(rf"\b{name}:(\d+)", output))) for name in ("REG", "STACK", "SHARED")}


def _disassemble(cubins: Sequence[bytes], architecture: str) -> list[list[str]]:
    """The instruction lines of each cubin.

    One nvdisasm call takes them all, as raw code end to end: it needs 0.25 to 0.45 s to start, the time in which a
    small kernel compiles, and 0.02 s for each kernel.
    """
    from triton import knobs

    codes = [_code(cubin) for cubin in cubins]
    with tempfile.NamedTemporaryFile(suffix=".raw") as file:
        file.write(b"".join(codes))
        file.flush()
        output = _run(knobs.nvidia.nvdisasm.path, "--binary", DISASSEMBLER_NAMES[architecture], file.name)
    instructions = [line.strip() for line in output.splitlines() if _SASS.search(line)]
    ends = list(accumulate(len(code) // 16 for code in codes))  # an instruction has 16 bytes
    if len(instructions) != ends[-1]:
        raise RuntimeError(f"nvdisasm printed {len(instructions)} instructions of code that holds {ends[-1]}")
    return [instructions[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def _code(cubin: bytes) -> bytes:
    """The code of all functions in a cubin: its ELF sections named ``.text.*``, in the file's order."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    entry_size, entries, names_index = struct.unpack_from("<HHH", cubin, 0x3A)
    sections = [struct.unpack_from("<IIQQQQIIQQ", cubin, table + index * entry_size) for index in range(entries)]
    names = sections[names_index][4]
    code = b""
    for name, _, _, _, offset, size, *_ in sections:
        if cubin.startswith(b".text.", names + name):
            code += cubin[offset : offset + size]
    return code


def _run(*command: str) -> str:
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode != 0:
        raise RuntimeError(f"{Path(command[0]).name} failed: {finished.stderr.strip()}")
    return finished.stdout


def _local_width(opcode: str) -> int:
    """The bytes that an LDL or STL moves, from its modifiers: none is four."""
    widths = {"64": 8, "128": 16, "U8": 1, "S8": 1, "U16": 2, "S16": 2}
    return next((widths[modifier] for modifier in opcode.split(".") if modifier in widths), 4)


def _scratch_width(opcode: str) -> int:
    if "byte" in opcode:
        return 1
    if "short" in opcode:
        return 2
    multiple = re.search(r"dwordx(\d)", opcode)
    return 4 * int(multiple[1]) if multiple else 4


def _count(opcodes: list[str], kinds: dict[str, str]) -> Instructions:
    tally = Counter(opcodes)
    counts = {
        kind: sum(count for opcode, count in tally.items() if re.fullmatch(pattern, opcode))
        for kind, pattern in kinds.items()
    }
    return Instructions(total=len(opcodes), **counts)
