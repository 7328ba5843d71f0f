"""The numerics self-test takes every path of the kernels, and `bivec doctor --interpret` fails where one is broken."""

import contextlib
import importlib
import io
import pkgutil
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from bivec import kernels
from bivec.engine.cli import checks, selftest
from bivec.kernels import launch as door
from bivec.kernels.tuning import ARCHITECTURES, FOLDER, read_table

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="breaks kernels in the interpreter")


def in_16_bits(name):
    return lambda a: a[name].element_size() == 2


def both(*conditions):
    return lambda a: all(condition(a) for condition in conditions)


# operator, kernel, what it writes, the launches that take the path
PATHS = {
    "short, 64": ("flash_attention", "attention_short_forward", "out_ptr", lambda a: a["BLOCK_N"] == 64),
    "short, 128": ("flash_attention", "attention_short_forward", "out_ptr", lambda a: a["BLOCK_N"] == 128),
    "short backward, 64": ("flash_attention", "attention_short_backward", "d_k_ptr", lambda a: a["BLOCK_N"] == 64),
    "short backward, 128": ("flash_attention", "attention_short_backward", "d_q_ptr", lambda a: a["BLOCK_N"] == 128),
    "long": (
        "flash_attention",
        "attention_forward",
        "out_ptr",
        both(in_16_bits("q_ptr"), lambda a: not a["HAS_WINDOW"] and a["BLOCK_D"] == 64),
    ),
    "long, window": (
        "flash_attention",
        "attention_forward",
        "out_ptr",
        both(in_16_bits("q_ptr"), lambda a: a["HAS_WINDOW"] and a["HAS_DROPOUT"] and a["HAS_SOFTCAP"]),
    ),
    "long, fp32": ("flash_attention", "attention_forward", "out_ptr", lambda a: a["q_ptr"].dtype == torch.float32),
    "long, 256 dims": ("flash_attention", "attention_forward", "out_ptr", lambda a: a["BLOCK_D"] == 256),
    "long backward, queries": ("flash_attention", "attention_backward_q", "d_q_ptr", in_16_bits("q_ptr")),
    "long backward, keys": ("flash_attention", "attention_backward_kv", "d_v_ptr", in_16_bits("q_ptr")),
    "whole blocks": (
        "linear_cross_entropy",
        "cross_entropy_rows",
        "gradient_ptr",
        lambda a: a["vocab"] > a["BLOCK_V"] and a["WANT_GRADIENT"] and a["HAS_ROW_SCALE"],
    ),
    "no last block": (
        "linear_cross_entropy",
        "cross_entropy_rows",
        "losses_ptr",
        lambda a: a["vocab"] == a["BLOCK_V"],
    ),
    "fp16": (
        "linear_cross_entropy",
        "cross_entropy_rows",
        "gradient_ptr",
        lambda a: a["gradient_ptr"].dtype == torch.float16,
    ),
    "slopes in bf16": ("info_nce", "info_nce_scores", "slopes_ptr", lambda a: a["IN_PLACE_HALF"]),
    "several blocks": ("info_nce", "info_nce_scores", "losses_ptr", lambda a: a["end"] > a["BLOCK_N"]),
    "margin": ("info_nce", "info_nce_scores", "losses_ptr", lambda a: a["HAS_MARGIN"]),
    "own negatives": ("info_nce", "info_nce_scores", "losses_ptr", lambda a: a["own_inverse_ptr"] is not None),
    "wide projection": ("info_nce", "info_nce_project", "grad_ptr", lambda a: a["width"] > a["BLOCK_D"]),
    "wide": ("rms_norm", "rms_norm_forward", "y_ptr", lambda a: a["DIM"] > a["BLOCK_D"]),
    "wide backward": ("rms_norm", "rms_norm_backward", "dx_ptr", lambda a: a["DIM"] > a["BLOCK_D"]),
    "wide weight": ("rms_norm", "rms_norm_backward", "partial_ptr", lambda a: a["DIM"] > a["BLOCK_D"]),
    "several tiles": ("rms_norm", "rms_norm_backward", "dx_ptr", lambda a: a["tiles_per_program"] > 1),
    "frozen": ("rms_norm", "rms_norm_backward", "dx_ptr", lambda a: a["partial_ptr"] is None),
    "blocks of heads": ("apply_rotary", "rotary", "q_out_ptr", lambda a: a["Q_HEADS"] > a["BLOCK_Q_HEADS"]),
    "in place": ("apply_rotary", "rotary", "k_out_ptr", lambda a: a["k_out_ptr"] is a["k_ptr"]),
    "gaps": ("swiglu", "gated_unit_forward", "out_ptr", lambda a: a["gate_stride"] > a["width"] > a["BLOCK_N"]),
    "overwriting": (
        "swiglu",
        "gated_unit_backward",
        "d_up_ptr",
        lambda a: a["d_up_ptr"].data_ptr() == a["up_ptr"].data_ptr(),
    ),
    "sequences": ("segment_pool", "segment_pool_backward", "d_hidden_ptr", lambda a: a["order_ptr"] is None),
    "spans": ("segment_pool", "segment_pool_backward", "d_hidden_ptr", lambda a: a["order_ptr"] is not None),
    "wide pooling": ("segment_pool", "segment_pool_forward", "out_ptr", lambda a: a["DIM"] > a["BLOCK_D"]),
    "weighted": ("segment_pool", "segment_pool_forward", "out_ptr", lambda a: a["WEIGHTED"]),
    "fp32 adapters": (
        "lora_linear",
        "lora_gradient",
        "parts_ptr",
        both(in_16_bits("x_ptr"), lambda a: a["FP32_OPERANDS"] and a["num_tokens"] > a["part_rows"]),
    ),
    "16-bit adapters": ("lora_linear", "lora_gradient", "parts_ptr", lambda a: not a["FP32_OPERANDS"]),
    "ranks": ("lora_linear", "lora_project", "h_ptr", lambda a: a["rank"] > a["BLOCK_R"]),
    "no dropout": ("lora_linear", "lora_update", "y_ptr", lambda a: not a["HAS_DROPOUT"]),
}


def tuned_kernels():
    return {row["kernel"] for table in FOLDER.glob("*.json") for row in read_table(table.stem)}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_and_path_is_launched(architecture):
    """As a GPU would launch them; 16 bits of a kind that the interpreter takes, with the tiles of bf16."""
    with door.recording(architecture) as launches:
        outcomes = selftest.run("triton", "cpu")
    assert [one for one in outcomes if one.error is None] == []
    launched = {launch.kernel.__name__ for launch in launches}
    assert launched == tuned_kernels() | {"lora_row_keys"}
    on_amd = architecture.startswith("gfx")
    taken = {
        name
        for name, (_, kernel, _, takes) in PATHS.items()
        for launch in launches
        if launch.kernel.__name__ == kernel and takes(launch.arguments)
    }
    assert PATHS.keys() - taken <= ({"slopes in bf16", "fp16"} if on_amd else set())


def taking(path):
    """A case that takes the path, in the one dtype in which it does."""
    op, kernel, _, takes = PATHS[path]
    for case in selftest.cases():
        for dtype in case.dtypes if case.op == op else ():
            with door.recording(door.INTERPRETER_ARCHITECTURE) as launches:
                selftest._outcome(case, "triton", "cpu", selftest._possible(op, "triton", "cpu", dtype))
            if any(one.kernel.__name__ == kernel and takes(one.arguments) for one in launches):
                return replace(case, dtypes=(dtype,))
    raise AssertionError(f"no case takes the path {path}")


def break_launches(monkeypatch, kernel, written, takes):
    """What these launches write is doubled."""
    launch = door.launch

    def doubling(called, grid, arguments, **options):
        launch(called, grid, arguments, **options)
        if called.__name__ == kernel and takes(arguments):
            arguments[written].mul_(2)

    for found in pkgutil.iter_modules(kernels.__path__, "bivec.kernels."):
        module = importlib.import_module(found.name)
        if getattr(module, "launch", None) is launch:
            monkeypatch.setattr(module, "launch", doubling)


@pytest.mark.parametrize("path", PATHS)
def test_a_broken_path_fails_and_its_operator_is_named(bivec_json, monkeypatch, path):
    op, kernel, written, takes = PATHS[path]
    only = taking(path)
    monkeypatch.setattr(selftest, "cases", lambda: [only])

    def here(*words, interpret):
        assert words[:2] == ("-m", "bivec.engine.cli.selftest") and interpret
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            selftest.main(words[2:])
        return SimpleNamespace(stdout=printed.getvalue())

    monkeypatch.setattr(checks, "_python", here)
    break_launches(monkeypatch, kernel, written, takes)
    document = bivec_json("doctor", "--only", "numerics", "--interpret", code=1)
    (failed,) = document["failed"]
    assert failed.startswith(f"numerics: {op}, triton on the interpreter")


IN_ANOTHER = {
    "rms_norm": "import bivec.kernels.rms_norm_triton as module\n"
    "def launch(kernel, grid, given, launch=module.launch, **options):\n"
    "    launch(kernel, grid, given, **options)\n"
    "    if 'y_ptr' in given and given['DIM'] > given['BLOCK_D']:\n"
    "        given['y_ptr'].mul_(2)\n"
    "module.launch = launch\n",
    "flash_attention": "import bivec.kernels.attention_triton as module\n"
    "def short(*given, forward=module.short_forward):\n"
    "    out, lse = forward(*given)\n"
    "    return out * 2, lse\n"
    "module.short_forward = short\n",
}


@pytest.mark.parametrize("op", IN_ANOTHER)
def test_in_a_process_of_its_own(bivec_json, monkeypatch, op):
    """As ``doctor`` starts it."""
    start = subprocess.run

    def broken(command, **options):
        assert command[1:3] == ["-m", "bivec.engine.cli.selftest"]
        script = f"{IN_ANOTHER[op]}import sys\nfrom bivec.engine.cli import selftest\nfound = selftest.cases()\n"
        script += f"selftest.cases = lambda: [case for case in found if case.op == {op!r}][:2]\n"
        return start([sys.executable, "-c", f"{script}sys.exit(selftest.main())", *command[3:]], **options)

    monkeypatch.setattr(subprocess, "run", broken)
    document = bivec_json("doctor", "--only", "numerics", "--interpret", code=1)
    assert {name.split(",")[0] for name in document["failed"]} == {f"numerics: {op}"}
