"""Asks the database of known vulnerabilities about every package that bivec needs, in the versions installed here.

    python .ci/audit.py [EXTRA]      # the extra whose packages count too (default: all)

pip-audit does the asking: its command must be on PATH. Without an answer (no network, a mirror without the database)
this says so and ends with 0, since nothing is known to be wrong; it ends with 1 when a known vulnerability is found
that ``IGNORED`` does not name, or when pip-audit is not there or fails in another way.
"""

import json
import re
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

IGNORED: dict[str, str] = {}  # a vulnerability's name, and why it does not concern bivec
UNREACHABLE = re.compile(
    r"could not connect|connection (error|refused|reset|aborted)|max retries exceeded|timed out|failed to resolve|"
    r"name resolution|network is unreachable|proxy ?error|blocking this service",
    re.IGNORECASE,
)
USAGE = re.compile(r"^usage: ", re.MULTILINE)  # it was called wrongly: its own fault, or ours


def main(extra: str) -> int:
    """The exit code."""
    packages = closure("bivec", extra)
    if not packages:
        print("bivec is not installed for this Python: nothing to audit", file=sys.stderr)
        return 1
    try:
        answer = ask(packages)
    except FileNotFoundError:
        print("pip-audit is not installed: nothing was audited (pip install pip-audit)", file=sys.stderr)
        return 1
    if isinstance(answer, str):
        if UNREACHABLE.search(answer) and not USAGE.search(answer):
            print(f"the database of vulnerabilities could not be reached: nothing was audited\n{answer.strip()[-500:]}")
            return 0
        print(f"pip-audit has failed:\n{answer}", file=sys.stderr)
        return 1
    found, ignored, unknown = judged(answer)
    for name, reason in ignored.items():
        print(f"{name}: ignored, {reason}")
    if unknown:
        print(f"not in the database that answered, so not audited: {len(unknown)} packages, {', '.join(unknown)}")
    audited = len(packages) - len(unknown)
    if found:
        print("\n".join(found), file=sys.stderr)
        return 1
    if not audited:
        print("the database of vulnerabilities knows none of the packages: nothing was audited")
    else:
        print(f"{audited} of {len(packages)} packages audited: no known vulnerability")
    return 0


def closure(package: str, extra: str) -> dict[str, str]:
    """What a package needs, directly or not, and is installed: name and version, the package itself left out."""
    versions: dict[str, str] = {}
    waiting, seen = [(package, extra)], set()
    while waiting:
        name, extra = waiting.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        try:
            found = metadata.distribution(name)
        except metadata.PackageNotFoundError:  # an extra that was not installed
            continue
        if name != package:
            versions[name] = found.version.partition("+")[0]  # 2.13.0+cpu is a build of 2.13.0
        for line in found.requires or ():
            needed = Requirement(line)
            if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                normal = re.sub(r"[-_.]+", "-", needed.name).lower()
                waiting += [(normal, one) for one in ("", *needed.extras)]
    return dict(sorted(versions.items()))


def ask(packages: dict[str, str]) -> dict[str, Any] | str:
    """pip-audit's document, or what it says where it has none.

    Raises:
        FileNotFoundError: there is no pip-audit.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "packages.txt"
        file.write_text("".join(f"{name}=={version}\n" for name, version in packages.items()), encoding="utf-8")
        options = ["--no-deps", "--disable-pip", "--format", "json", "--progress-spinner", "off", "--timeout", "10"]
        command = ["pip-audit", "--requirement", str(file), *options]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        return json.loads(done.stdout)
    except json.JSONDecodeError:
        return f"{done.stderr}\nexit code {done.returncode}"


def judged(answer: dict[str, Any]) -> tuple[list[str], dict[str, str], list[str]]:
    """The vulnerabilities that count, those that do not with the reason, and the packages that the database lacks."""
    found, ignored, unknown = [], {}, []
    for package in answer["dependencies"]:
        if "skip_reason" in package:
            unknown.append(package["name"])
        for one in package.get("vulns", ()):
            names = {one["id"], *one.get("aliases", ())}
            known = sorted(names & set(IGNORED))
            if known:
                ignored |= {name: IGNORED[name] for name in known}
                continue
            fixed = ", ".join(one.get("fix_versions", ())) or "no version yet"
            found.append(f"{package['name']} {package['version']}: {'/'.join(sorted(names))}, fixed in {fixed}")
    return found, ignored, unknown


if __name__ == "__main__":
    if len(sys.argv) > 2:
        sys.exit("usage: python .ci/audit.py [EXTRA]")
    sys.exit(main(sys.argv[1] if len(sys.argv) == 2 else "all"))
