"""What ``bivec doctor`` checks. What goes wrong inside a check is its result."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bivec import __version__
from bivec.engine.cli.versions import OPTIONAL, PYTHON, REQUIRED, importable, install_hint, installed, older, owner

OK, FAILED, MISSING, SKIPPED = "ok", "failed", "missing", "skipped"
NO_TRITON = "triton is not installed: there are no kernels here, every operator takes torch"
GET_TRITON = f"pip install 'triton>={OPTIONAL['triton'][0]}'"
DEFAULT_ARCHITECTURE = "sm_90"
INTERPRETER = "TRITON_INTERPRET"


@dataclass(frozen=True)
class Check:
    """One line of the report."""

    section: str
    name: str
    status: str  # "ok" | "failed" | "missing" (optional, not installed) | "skipped"
    detail: str


def versions() -> list[Check]:
    """Python, this package, what it needs and what some commands need."""
    python = platform.python_version()
    found = [_version("python", python, PYTHON, ""), Check("versions", "bivec", OK, __version__)]
    for package, oldest in REQUIRED.items():
        found.append(_version(package, installed(package), oldest, f"pip install '{package}>={oldest}'"))
    for package, (oldest, _) in OPTIONAL.items():
        version = installed(package)
        if version is not None:
            found.append(_version(package, version, oldest, f"pip install '{package}>={oldest}'"))
        elif package == "triton" and importable(package):  # AMD's and Windows' builds have names of their own
            found.append(
                Check("versions", package, OK, owner(package) or "a module that no package says to be its own")
            )
        else:
            found.append(Check("versions", package, MISSING, install_hint(package)))
    return found


def _version(package: str, version: str | None, oldest: str, remedy: str) -> Check:
    if version is None:
        return Check("versions", package, FAILED, f"is not installed: {remedy}")
    if older(version, oldest):
        return Check("versions", package, FAILED, f"{version} is older than {oldest}: {remedy}".rstrip(": "))
    if package != "python" and not importable(package):
        return Check("versions", package, FAILED, _gone(package, version))
    return Check("versions", package, OK, version)


def _gone(package: str, version: str) -> str:
    return f"{version} is recorded as installed, its module is gone: pip install --force-reinstall --no-deps {package}"


def devices() -> list[Check]:
    """The CPU and the GPUs."""
    import torch

    memory = ""
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        memory = f", {os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB"
    cpu = f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads{memory}"
    found = [Check("devices", "cpu", OK, cpu)]
    found += [_gpu(number) for number in range(torch.cuda.device_count())]
    if len(found) == 1:
        built = torch.version.cuda or torch.version.hip
        why = "torch sees none" if built else "this torch is built for CPUs only"
        found.append(Check("devices", "gpu", SKIPPED, why))
    return found


def _gpu(number: int) -> Check:
    import torch

    from bivec.kernels.launch import architecture

    name = f"cuda:{number}"
    try:
        device = torch.device(name)
        properties = torch.cuda.get_device_properties(device)
        torch.ones(8, device=device).sum().item()
        memory = properties.total_memory / 2**30
        return Check("devices", name, OK, f"{properties.name}, {architecture(device)}, {memory:.0f} GiB")
    except Exception as error:  # noqa: BLE001 - a driver can fail in any way
        return Check("devices", name, FAILED, _first_line(error))


def backends() -> list[Check]:
    """For every operator and kind of device: the backend that a call without ``backend=`` takes, and why."""
    import torch

    from bivec.engine.cli.selftest import OPS

    kinds = ("cpu", *(["cuda"] if torch.cuda.is_available() else []))
    return [_backend(op, kind) for kind in kinds for op in OPS]


def _backend(op: str, kind: str) -> Check:
    """On a GPU it is Triton and elsewhere torch, unless the environment says otherwise."""
    import torch

    from bivec.kernels import backend

    name = f"{op} on {kind}"
    expected = os.environ.get("BIVEC_BACKEND") or ("triton" if kind == "cuda" else "torch")
    try:
        choice = backend.resolve(None, op, torch.device(kind))
        explained, reason = backend.explain(None, op, torch.device(kind))
    except (RuntimeError, ValueError) as error:  # the environment asks for what is not here
        return Check("backends", name, FAILED, _first_line(error))
    if choice == expected == explained:
        return Check("backends", name, OK, f"{choice}: {reason}")
    remedy = "" if backend.TRITON_INSTALLED else f": {_without_triton('', '').detail}"
    return Check("backends", name, FAILED, f"{choice} in place of {expected}{remedy}")


def _without_triton(section: str, name: str) -> Check:
    """What it means that there is no module triton: a broken installation, a GPU in vain, or nothing bad."""
    import torch

    version = installed("triton")
    if version is not None:
        return Check(section, name, FAILED, f"triton {_gone('triton', version)}")
    if torch.cuda.is_available() and os.environ.get("BIVEC_BACKEND") != "torch":
        return Check(section, name, FAILED, f"triton is not installed, the GPU has no kernels: {GET_TRITON}")
    return Check(section, name, SKIPPED, NO_TRITON)


def aot(*, full: bool) -> list[Check]:
    """Compiles kernels ahead of time, in another process: here Triton's interpreter may be on.

    Args:
        full: all of them for every architecture, not one case of each family for one.
    """
    from bivec.kernels.backend import TRITON_INSTALLED

    if not TRITON_INSTALLED:
        return [_without_triton("aot", "kernels")]
    try:
        chosen = [] if full else ["--arch", _architecture(), "--cases", "bivec.engine.cli.checks:few_cases"]
    except RuntimeError as error:  # a GPU that is too old for the kernels
        return [Check("aot", "kernels", FAILED, _first_line(error))]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.json"
        done = _python("-m", "bivec.kernels.aot", "--check", "--json", str(file), *chosen, interpret=False)
        try:
            rows = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return [Check("aot", "kernels", FAILED, f"the compiler's process ended: {_last(done)}")]
    families: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        families.setdefault(row["family"], []).append(row)
    return [_family(name, members) for name, members in families.items()]


def few_cases() -> list[Any]:
    """The first case of every family of kernels."""
    from bivec.kernels.aot_cases import cases

    first: dict[str, Any] = {}
    for case in cases():
        first.setdefault(case.family, case)
    return list(first.values())


def _family(name: str, rows: Sequence[dict[str, Any]]) -> Check:
    where = ", ".join(sorted({row["outcome"]["architecture"] for row in rows}))
    for row in rows:
        if row["problems"]:
            outcome = row["outcome"]
            place = f"{outcome['kernel']} ({row['label']}, {outcome['architecture']})"
            return Check("aot", name, FAILED, f"{place} {'; '.join(row['problems'])}")
    return Check("aot", name, OK, f"{len(rows)} compiled for {where}")


def _architecture() -> str:
    """That of the GPU here, as the tables have it; where there is none, a common one."""
    import torch

    from bivec.kernels.launch import architecture
    from bivec.kernels.tuning import table_architecture

    return table_architecture(architecture(torch.device("cuda"))) if torch.cuda.is_available() else DEFAULT_ARCHITECTURE


def numerics(*, interpret: bool) -> list[Check]:
    """Every operator against float64: torch's on the CPU, on a GPU both, and Triton's in the interpreter if asked."""
    import torch

    from bivec.engine.cli import selftest
    from bivec.kernels.backend import TRITON_INSTALLED

    outcomes = selftest.run("torch", "cpu")
    if torch.cuda.is_available():
        outcomes += selftest.run("torch", "cuda")
        outcomes += selftest.run("triton", "cuda") if TRITON_INSTALLED else []
    found = _by_op(outcomes)
    if not TRITON_INSTALLED:
        found += [_without_triton("numerics", "triton on cuda")] if torch.cuda.is_available() else []
        return [*found, *([_without_triton("numerics", "interpreter")] if interpret else [])]
    if interpret:
        done = _python("-m", "bivec.engine.cli.selftest", "--backend", "triton", interpret=True)
        try:
            outcomes = [selftest.Outcome(**one) for one in json.loads(done.stdout)]
        except ValueError:
            detail = f"its process ended: {_last(done)}"
            return [*found, Check("numerics", "interpreter", FAILED, detail)]
        found += _by_op(outcomes, "the interpreter")
    return found


def _by_op(outcomes: Sequence[Any], place: str | None = None) -> list[Check]:
    """One check for every operator, backend, device and dtype."""
    groups: dict[tuple[str, str], list[Any]] = {}
    for one in outcomes:
        name = f"{one.op}, {one.backend} on {place or one.device}, {one.dtype}"
        groups.setdefault((name, one.op), []).append(one)
    found = []
    for (name, _), members in groups.items():
        bad = [f"{one.label or 'forward and backward'}: {one.problem}" for one in members if not one.ok]
        worst = max((one.error for one in members if one.error is not None), default=0.0)
        detail = "; ".join(bad) or f"{100 * worst:.2g} % of the tolerance"
        found.append(Check("numerics", name, FAILED if bad else OK, detail))
    return found


def _python(*arguments: str, interpret: bool) -> subprocess.CompletedProcess[str]:
    """Another Python with Triton's interpreter on or off, which it must know before it imports anything."""
    environment = {name: value for name, value in os.environ.items() if name != INTERPRETER}
    environment |= {INTERPRETER: "1"} if interpret else {}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def _last(done: subprocess.CompletedProcess[str]) -> str:
    lines = (done.stderr or done.stdout).strip().splitlines()
    return f"{lines[-1] if lines else 'no message'} (exit code {done.returncode})"


def _first_line(error: BaseException) -> str:  # that of engine/errors.py needs torch, which may be what is broken
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
