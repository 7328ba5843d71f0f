"""bivec doctor: what it reports here, and that each of its checks can fail."""

import json
import os
import runpy
from importlib import metadata
from pathlib import Path

import pytest
import setuptools
import torch

from bivec import kernels
from bivec.engine.cli import checks, selftest, versions
from bivec.kernels import AttentionPlan, CrossEntropyStats, InfoNceStats
from bivec.kernels import backend as backends

ROOT = Path(__file__).parents[3]
CPU_ONLY = pytest.mark.skipif(torch.cuda.is_available(), reason="states what a machine without a GPU says")


def by_name(document, section):
    return {check["name"]: check for check in document["checks"] if check["section"] == section}


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("BIVEC_BACKEND", raising=False)


def test_everything_but_the_compiler(bivec, bivec_json):
    sections = "versions,devices,backends,numerics"
    document = bivec_json("doctor", "--only", sections)
    assert document["ok"] and document["failed"] == []
    assert {check["section"] for check in document["checks"]} == set(sections.split(","))
    assert by_name(document, "versions")["torch"]["detail"] == metadata.version("torch")  # without "+cu130"
    assert "cores" in by_name(document, "devices")["cpu"]["detail"]
    assert {name.split()[0] for name in by_name(document, "backends")} == set(selftest.OPS)
    assert {name.split(",")[0] for name in by_name(document, "numerics")} == set(selftest.OPS)
    printed, said = bivec("doctor", "--only", sections)
    assert said == "" and printed.endswith("no check has failed\n")
    assert all(f"\n{section}\n" in f"\n{printed}" for section in sections.split(","))


def test_every_operator_is_tested():
    plain = {name for name in kernels.__all__ if callable(getattr(kernels, name))}
    others = {"attention_plan", "fold_seed", "BackendError"}
    others |= {kind.__name__ for kind in (AttentionPlan, CrossEntropyStats, InfoNceStats)}
    assert set(selftest.OPS) == plain - others == {case.op for case in selftest.cases()}


def wrong_output(op):
    def call(*given, **named):
        found = op(*given, **named)
        return tuple(y * 1.001 for y in found) if isinstance(found, tuple) else found * 1.001

    return call


def wrong_gradient(op):
    class Late(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.clone()

        @staticmethod
        def backward(ctx, dy):
            return dy * 1.001

    def call(*given, **named):
        found = op(*given, **named)
        return tuple(map(Late.apply, found)) if isinstance(found, tuple) else Late.apply(found)

    return call


def raises(op):
    def call(*given, **named):
        raise RuntimeError("no kernel image is available\nfor execution on the device")

    return call


@pytest.mark.parametrize("name", selftest.OPS)
@pytest.mark.parametrize("broken", [wrong_output, wrong_gradient, raises])
def test_a_broken_operator_fails_and_is_named(bivec_json, monkeypatch, name, broken):
    monkeypatch.setattr(kernels, name, broken(getattr(kernels, name)))
    document = bivec_json("doctor", "--only", "numerics", code=1)
    assert not document["ok"] and document["failed"]
    assert {failed.split(",")[0] for failed in document["failed"]} == {f"numerics: {name}"}
    words = {"wrong_output": "output 0 is off by", "wrong_gradient": "the gradient of", "raises": "no kernel image"}
    details = [check["detail"] for check in document["checks"] if check["status"] == "failed"]
    assert all(words[broken.__name__] in detail and "for execution" not in detail for detail in details)


def test_a_failure_is_said_on_stderr(bivec, monkeypatch):
    monkeypatch.setattr(kernels, "swiglu", wrong_output(kernels.swiglu))
    printed, said = bivec("doctor", "--only", "numerics", code=1)
    assert said.startswith("bivec: error: numerics: swiglu, torch on cpu, float32: ") and "  failed " in printed
    assert "no check has failed" not in printed


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_is_no_small_error(value):
    assert selftest._error(torch.tensor([1.0, value]), torch.tensor([1.0, 2.0])) == float("inf")
    assert selftest._error(torch.ones(2), torch.ones(3)) == float("inf")
    assert selftest._error(torch.tensor([1.0, 2.5]), torch.tensor([1.0, 2.0])) == 0.25


@CPU_ONLY
def test_triton_in_the_interpreter(bivec_json):
    """In both widths; what multiplies takes fp16, as the interpreter does not multiply bf16."""
    pytest.importorskip("triton")
    document = bivec_json("doctor", "--only", "numerics", "--interpret")
    found = {name for name in by_name(document, "numerics") if "the interpreter" in name}
    half = {op: "float16" if op in selftest.MULTIPLYING else "bfloat16" for op in selftest.OPS}
    expected = {(op, dtype) for op in selftest.OPS for dtype in ("float32", half[op])}
    expected.add(("linear_cross_entropy", "float16"))
    assert found == {f"{op}, triton on the interpreter, {dtype}" for op, dtype in expected}
    assert not [name for name in by_name(bivec_json("doctor", "--only", "numerics"), "numerics") if "triton" in name]


def test_the_selftest_by_itself(process, monkeypatch, capsys):
    assert selftest.main([]) == 0
    assert len(json.loads(capsys.readouterr().out)) == sum(len(case.dtypes) for case in selftest.cases())
    monkeypatch.setattr(kernels, "rms_norm", raises(None))
    assert selftest.main(["--backend", "torch", "--device", "cpu"]) == 1


@CPU_ONLY
def test_backends_and_why(bivec_json, monkeypatch):
    def details():
        return {check["detail"] for check in bivec_json("doctor", "--only", "backends")["checks"]}

    assert details() == {"torch: the default on a CPU, where Triton runs in its interpreter only"}
    monkeypatch.setenv("BIVEC_BACKEND", "torch")
    assert details() == {"torch: the environment variable BIVEC_BACKEND=torch"}
    monkeypatch.setenv("BIVEC_BACKEND", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    document = bivec_json("doctor", "--only", "backends", code=1)
    assert len(document["failed"]) == len(selftest.OPS) and "backends: rms_norm on cpu" in document["failed"]


@pytest.fixture
def gpu(monkeypatch):
    """torch says that there is a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def on_cuda():
    return [check for check in checks.backends() if check.name.endswith("on cuda")]


@pytest.mark.parametrize("recorded", ["3.9", None])
def test_a_gpu_takes_triton_where_it_is_there(gpu, monkeypatch, recorded):
    """Also under another package's name."""
    monkeypatch.setattr(backends, "TRITON_INSTALLED", True)
    monkeypatch.setattr(checks, "installed", lambda name: recorded)
    assert [check.name for check in on_cuda()] == [f"{op} on cuda" for op in selftest.OPS]
    assert {(check.status, check.detail) for check in on_cuda()} == {("ok", "triton: the default on a GPU")}


def test_a_choice_that_is_not_the_expected_one_fails(gpu, bivec_json, monkeypatch):
    monkeypatch.setattr(backends, "TRITON_INSTALLED", True)
    monkeypatch.setattr(backends, "resolve", lambda backend, op, device: "torch")
    document = bivec_json("doctor", "--only", "backends", code=1)
    assert document["failed"] == [f"backends: {op} on cuda" for op in selftest.OPS]
    assert {check.detail for check in on_cuda()} == {"torch in place of triton"}


def test_a_choice_for_another_reason_fails(bivec_json, monkeypatch):
    """The one place that chooses, and what it says of itself, go apart."""
    monkeypatch.setattr(backends, "explain", lambda backend, op, device: ("triton", "because"))
    monkeypatch.setattr(backends, "resolve", lambda backend, op, device: "torch")
    document = bivec_json("doctor", "--only", "backends", code=1)
    assert "backends: rms_norm on cpu" in document["failed"]


def test_a_gpu_without_triton_fails(gpu, bivec_json, monkeypatch):
    monkeypatch.setattr(backends, "TRITON_INSTALLED", False)
    monkeypatch.setattr(checks, "installed", lambda name: None)
    monkeypatch.setattr(selftest, "run", lambda backend, device: [])
    document = bivec_json("doctor", "--only", "backends,aot,numerics", "--interpret", code=1)
    assert document["failed"] == [
        *(f"backends: {op} on cuda" for op in selftest.OPS),
        *("aot: kernels", "numerics: triton on cuda", "numerics: interpreter"),
    ]
    details = [check["detail"] for check in document["checks"] if check["status"] == "failed"]
    assert all(detail.endswith("pip install 'triton>=3.6'") for detail in details)
    monkeypatch.setenv("BIVEC_BACKEND", "torch")  # who asks for torch wants no kernels
    assert bivec_json("doctor", "--only", "backends,aot,numerics")["ok"]


def test_a_record_of_triton_without_its_module_fails(bivec_json, monkeypatch):
    monkeypatch.setattr(backends, "TRITON_INSTALLED", False)
    monkeypatch.setattr(checks, "installed", lambda name: "3.9.0")
    monkeypatch.setattr(checks, "importable", lambda name: name != "triton")
    document = bivec_json("doctor", "--only", "versions,aot,numerics", "--interpret", code=1)
    broken = {check["name"]: check["detail"] for check in document["checks"] if check["status"] == "failed"}
    assert {"triton", "kernels", "interpreter"} <= broken.keys()
    assert all("its module is gone: pip install --force-reinstall" in broken[name] for name in ("triton", "kernels"))


@pytest.mark.parametrize("owner", ["pytorch-triton 3.6.0", None])
def test_triton_of_another_package_is_there(monkeypatch, owner):
    known = versions.installed
    monkeypatch.setattr(checks, "installed", lambda name: None if name == "triton" else known(name))
    monkeypatch.setattr(checks, "importable", lambda name: True)
    monkeypatch.setattr(checks, "owner", lambda module: owner)
    (check,) = [check for check in checks.versions() if check.name == "triton"]
    assert check.status == "ok" and (owner or "no package") in check.detail


def test_what_can_be_imported(monkeypatch, tmp_path):
    assert versions.importable("torch") and versions.importable("pyyaml") and not versions.importable("no-such-thing")
    assert versions.owner("torch") == f"torch {versions.installed('torch')}" and versions.owner("no_such_thing") is None
    assert versions.installed("no-such-thing") is None
    (tmp_path / "emptied" / "__pycache__").mkdir(parents=True)  # what an uninstallation leaves
    monkeypatch.syspath_prepend(tmp_path)
    assert not versions.importable("emptied")


@CPU_ONLY
def test_a_few_kernels_are_compiled(bivec_json, tmp_path, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("BIVEC_CACHE", str(tmp_path))
    document = bivec_json("doctor", "--only", "aot")
    families = {case.family for case in checks.few_cases()}
    found = by_name(document, "aot")
    assert found.keys() == families and len(checks.few_cases()) == len(families) > 5
    assert all(check["detail"].endswith("compiled for sm_90") for check in found.values())


def rows(*problems):
    outcome = {"kernel": "rms_forward", "architecture": "sm_90"}
    return [{"family": "rms_norm", "label": "bf16", "outcome": outcome, "problems": list(problems)}]


def test_a_kernel_that_does_not_compile_is_named(bivec_json, monkeypatch):
    asked = []

    def compiler(*words, interpret):
        asked.append((words, interpret))
        Path(words[words.index("--json") + 1]).write_text(json.dumps(rows("spills 64 bytes")))

    monkeypatch.setattr(backends, "TRITON_INSTALLED", True)
    monkeypatch.setattr(checks, "_python", compiler)
    document = bivec_json("doctor", "--only", "aot", code=1)
    assert document["failed"] == ["aot: rms_norm"]
    assert by_name(document, "aot")["rms_norm"]["detail"] == "rms_forward (bf16, sm_90) spills 64 bytes"
    bivec_json("doctor", "--only", "aot", "--full", code=1)
    few, full = (words for words, _ in asked)
    assert "--arch" in few and "bivec.engine.cli.checks:few_cases" in few
    assert "--arch" not in full and "--cases" not in full and not any(interpret for _, interpret in asked)


def test_a_compiler_that_crashes(bivec_json, monkeypatch):
    def crash(*words, interpret):
        code = "import sys; print('LLVM ERROR: out of registers', file=sys.stderr); sys.exit(-6)"
        return python("-c", code, interpret=interpret)

    python = checks._python
    monkeypatch.setattr(backends, "TRITON_INSTALLED", True)
    monkeypatch.setattr(checks, "_python", crash)
    document = bivec_json("doctor", "--only", "aot", code=1)
    (check,) = document["checks"]
    assert "LLVM ERROR: out of registers (exit code 250)" in check["detail"]
    document = bivec_json("doctor", "--only", "numerics", "--interpret", code=1)
    assert document["failed"] == ["numerics: interpreter"]


def test_the_other_python_has_the_interpreter_on_or_off(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    script = "import os; print(os.environ.get('TRITON_INTERPRET'))"
    assert checks._python("-c", script, interpret=False).stdout.strip() == "None"
    monkeypatch.delenv("TRITON_INTERPRET")
    assert checks._python("-c", script, interpret=True).stdout.strip() == "1"
    assert "TRITON_INTERPRET" not in os.environ


@CPU_ONLY
def test_without_triton_it_says_so(bivec_json, monkeypatch):
    monkeypatch.setattr(backends, "TRITON_INSTALLED", False)
    monkeypatch.setattr(checks, "installed", lambda name: None)
    document = bivec_json("doctor", "--only", "aot,numerics", "--interpret")
    for section, name in (("aot", "kernels"), ("numerics", "interpreter")):
        check = by_name(document, section)[name]
        assert check["status"] == "skipped" and check["detail"].startswith("triton is not installed")


def test_versions(bivec_json, monkeypatch):
    found = {"torch": "2.10.1+cpu", "safetensors": None, "transformers": "5.1.9", "mteb": None, "triton": "3.6"}
    known = versions.installed
    monkeypatch.setattr(checks, "installed", lambda name: found[name] if name in found else known(name))
    document = bivec_json("doctor", "--only", "versions", code=1)
    checked = by_name(document, "versions")
    assert document["failed"] == ["versions: torch", "versions: safetensors", "versions: transformers"]
    assert checked["torch"]["detail"] == "2.10.1+cpu is older than 2.13: pip install 'torch>=2.13'"
    assert checked["safetensors"]["detail"].startswith("is not installed: pip install 'safetensors>=")
    assert (checked["mteb"]["status"], checked["mteb"]["detail"]) == ("missing", 'pip install "bivec[eval]"')
    assert checked["triton"]["status"] == "ok"


@pytest.mark.parametrize(
    ("version", "oldest", "expected"),
    [
        ("2.11.0+cu130", "2.11", False),
        ("2.9", "2.11", True),
        ("2.11", "2.11.1", True),
        ("5.2rc1", "5.2", False),
        ("10", "9.9.9", False),
    ],
)
def test_older(version, oldest, expected):
    assert versions.older(version, oldest) is expected


def test_the_versions_are_those_of_setup(monkeypatch):
    given = {}
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: given.update(arguments))
    runpy.run_path(str(ROOT / "setup.py"))
    assert given["python_requires"] == f">={versions.PYTHON}"
    assert {tuple(line.split(">=")) for line in given["install_requires"]} == set(versions.REQUIRED.items())
    for package, (oldest, extra) in versions.OPTIONAL.items():
        assert f"{package}>={oldest}" in given["extras_require"][extra], package


def test_a_section_that_breaks_stops_no_other(bivec_json, monkeypatch):
    def broken():
        raise ImportError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr(checks, "devices", broken)
    document = bivec_json("doctor", "--only", "devices,backends", code=1)
    assert document["failed"] == ["devices: the check itself"] and by_name(document, "backends")
    assert "libcuda.so.1" in by_name(document, "devices")["the check itself"]["detail"]


def test_a_gpu_that_does_not_work_is_a_failure(monkeypatch):
    def broken(*_):
        raise RuntimeError("CUDA error: device-side assert triggered\nmore")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", broken)
    _, gpu = checks.devices()
    assert (gpu.name, gpu.status, gpu.detail) == ("cuda:0", "failed", "CUDA error: device-side assert triggered")
