"""Checks this machine: versions, devices, the backend of every operator, the kernels' compilation, the numerics.

versions   what is installed, and which extra installs what is not
devices    the CPU and the GPUs that torch sees
backends   which implementation each operator takes here, and why
aot        kernels compiled for a GPU (this one's architecture, else sm_90): no spills, tensor cores, a launch that fits
numerics   every operator, forward and backward, by every path that a shape or dtype chooses, against float64; with a
           GPU its Triton kernels, too, which the first time are compiled

The exit code is 1 if anything fails; what has failed is named on stderr.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict

from bivec.engine.cli.checks import FAILED, Check
from bivec.engine.cli.output import command_parser, results_only, say, write_document

SECTIONS = ("versions", "devices", "backends", "aot", "numerics")
EPILOG = """examples:
  bivec doctor
  bivec doctor --only versions,backends --json
  bivec doctor --full               # compiles every kernel for every architecture: minutes
  bivec doctor --interpret          # runs the Triton kernels in its interpreter, on a CPU"""


def main(arguments: Sequence[str]) -> int:
    """Checks the machine; returns the exit code."""
    parser = _parser()
    given = parser.parse_args(arguments)
    asked = [name.strip() for name in given.only.split(",")]
    unknown = [name for name in asked if name not in SECTIONS]
    if unknown:
        parser.error(f"--only {unknown[0]!r}: choose of {','.join(SECTIONS)}")
    found: list[Check] = []
    with results_only() as stdout:
        for name in (name for name in SECTIONS if name in asked):
            checks = _section(name, given)
            found += checks
            if not given.json:
                print(_text(name, checks), file=stdout, flush=True)
        failed = [check for check in found if check.status == FAILED]
        if given.json:
            document = {"ok": not failed, "failed": [f"{one.section}: {one.name}" for one in failed]}
            write_document(stdout, document | {"checks": [asdict(check) for check in found]})
        elif not failed:
            print("no check has failed", file=stdout)
    for check in failed:
        say(f"error: {check.section}: {check.name}: {check.detail}")
    return 1 if failed else 0


def _section(name: str, given: argparse.Namespace) -> list[Check]:
    """The checks of a section; one that breaks, for want of torch for instance, has failed and stops no other."""
    from bivec.engine.cli import checks

    made: dict[str, Callable[[], list[Check]]] = {
        "versions": checks.versions,
        "devices": checks.devices,
        "backends": checks.backends,
        "aot": lambda: checks.aot(full=given.full),
        "numerics": lambda: checks.numerics(interpret=given.interpret),
    }
    try:
        return made[name]()
    except Exception as error:  # noqa: BLE001 - whatever it is, it is what this command is to find
        return [Check(name, "the check itself", FAILED, f"{type(error).__name__}: {error}")]


def _text(name: str, checks: Sequence[Check]) -> str:
    width = max((len(check.name) for check in checks), default=0)
    lines = [f"  {check.status:8}{check.name:{width}}  {check.detail}".rstrip() for check in checks]
    return "\n".join([name, *lines, ""])


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("doctor", __doc__, EPILOG)
    add = parser.add_argument
    add("--only", default=",".join(SECTIONS), metavar="NAMES", help="some of the above (default: all)")
    add("--full", action="store_true", help="aot: every kernel for every architecture, not a few for one")
    add("--interpret", action="store_true", help="numerics: the Triton kernels too, in its interpreter, on the CPU")
    add("--json", action="store_true", help="print the checks as JSON")
    return parser
