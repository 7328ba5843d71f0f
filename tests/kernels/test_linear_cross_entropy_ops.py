"""The Triton backend of linear_cross_entropy inside torch: the operator, torch.compile, checkpointing, its errors."""

from importlib import import_module

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton")

from bivec.kernels import BackendError, linear_cross_entropy
from bivec.kernels.launch import recording
from bivec.kernels.linear_cross_entropy_triton import cross_entropy_op, sweep

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROWS, WIDTH = 11, 13  # multiples of nothing


def example(vocab=257, dtype=torch.float32, *, rows=ROWS, width=WIDTH, selected=True, ignored=True, spread=0.5, seed=0):
    """Rows of which every fourth is ignored; ``spread`` is that of the weight."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows + 4, width, generator=g).to(dtype)
    weight = (spread * torch.randn(vocab, width, generator=g)).to(dtype)
    index = torch.randperm(rows + 4, generator=g)[:rows] if selected else None
    targets = torch.randint(0, vocab, (rows if selected else rows + 4,), generator=g)
    if ignored:
        targets[::4] = -100
    return [x if x is None else x.to(DEVICE) for x in (hidden, weight, targets, index)]


def triton(*inputs, **options):
    return linear_cross_entropy(*inputs, backend="triton", **options)


def run(function, hidden, weight, targets, index, **options):
    """The loss and the gradients of a weighted sum of it."""
    hidden, weight = (x.detach().clone().requires_grad_() for x in (hidden, weight))
    loss = function(hidden, weight, targets, index, **options)
    weights = torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype, device=loss.device).reshape(loss.shape)
    (loss * weights).sum().backward()
    return loss.detach(), hidden.grad, weight.grad


def test_a_target_outside_the_vocabulary_is_nan_where_values_are_not_checked(monkeypatch):
    """And reads nothing else: its row alone is NaN."""
    door = import_module("bivec.kernels.linear_cross_entropy")  # the package has a function of that name
    monkeypatch.setattr(door, "checks_values", lambda device: False)
    hidden, weight, targets, _ = example(selected=False, ignored=False)
    expected = triton(hidden, weight, targets, reduction="none")
    for wrong in (257, -1, 2**33):
        targets[3] = wrong
        loss = triton(hidden, weight, targets, reduction="none")
        assert loss[3].isnan() and torch.equal(loss[:3], expected[:3]) and torch.equal(loss[4:], expected[4:])


def test_too_small_a_workspace():
    upcast = 0 if DEVICE.type == "cuda" else 4 * WIDTH  # a row of the weight
    for dtype, minimum in ((torch.float32, 4 * 288), (torch.bfloat16, 4 * 288 + upcast)):
        for softcap in (None, 3.0):  # needs no second buffer
            with pytest.raises(ValueError, match=f"a vocabulary of 257 needs at least {minimum} bytes"):
                triton(*example(dtype=dtype), workspace_bytes=minimum - 1, softcap=softcap)
            triton(*example(dtype=dtype), workspace_bytes=minimum, softcap=softcap)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_each_gradient_only_where_wanted(reduction):
    hidden, weight, targets, index = example(dtype=torch.bfloat16)
    _, grad_hidden, grad_weight = run(triton, hidden, weight, targets, index, reduction=reduction)
    scale = torch.linspace(0.5, 1.5, ROWS, device=DEVICE) if reduction == "none" else 0.5  # the weights of run()
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    for frozen, trained, expected in ((weight, hidden, grad_hidden), (hidden, weight, grad_weight)):
        hidden.grad = weight.grad = None
        frozen.requires_grad_(False)
        (triton(hidden, weight, targets, index, reduction=reduction) * scale).sum().backward()
        assert frozen.grad is None
        assert torch.equal(trained.grad, expected)
        frozen.requires_grad_(True)
    with torch.no_grad():
        assert not triton(hidden, weight, targets, index).requires_grad


def test_a_frozen_head_costs_no_product_and_an_evaluation_neither(monkeypatch):
    module = "bivec.kernels.linear_cross_entropy_triton"
    shapes, gradients = [], []

    def multiply(out, a, b, **_):
        shapes.append(tuple(out.shape))

    def record(*args, want_gradient, **_):
        gradients.append(want_gradient)

    monkeypatch.setattr(f"{module}.multiply_", multiply)
    monkeypatch.setattr(f"{module}.cross_entropy_pass", record)
    hidden, weight, targets, _ = example(selected=False)
    n = len(hidden)
    hidden.requires_grad_()
    triton(hidden, weight, targets)
    with torch.no_grad():
        triton(hidden, weight.clone().requires_grad_(), targets)
    triton(hidden, weight.clone().requires_grad_(), targets)
    assert shapes == [(n, 257), (n, WIDTH), (n, 257), (n, 257), (n, WIDTH), (257, WIDTH)]
    assert gradients == [True, False, True]


def operator_arguments(reduction, selected=True):
    hidden, weight, targets, index = example(dtype=torch.bfloat16, selected=selected)
    factor = None if reduction == "none" else torch.tensor(0.25, device=DEVICE)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    return (*leaves, targets, index, factor, None, -100, 5.0, None, True, reduction != "none")


@pytest.mark.parametrize(("reduction", "selected"), [("none", True), ("mean", False)])
def test_opcheck(reduction, selected):
    """Schema, fake tensors, autograd registration, and tracing with static and dynamic shapes."""
    arguments = operator_arguments(reduction, selected)
    torch.library.opcheck(torch.ops.bivec.linear_cross_entropy.default, arguments)
    row_scale = torch.linspace(-1, 1, len(arguments[2]), device=DEVICE)
    detached = [x.detach() for x in arguments[:2]]
    again = (*detached, *arguments[2:4], None, row_scale, *arguments[6:9], False, True)
    torch.library.opcheck(torch.ops.bivec.linear_cross_entropy.default, again)


@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True), (False, False)])
def test_fake_results_look_like_the_real_ones(wanted):
    for factor in (None, torch.tensor(1.0, device=DEVICE)):
        hidden, weight, targets, index = example(dtype=torch.bfloat16)
        arguments = (hidden, weight, targets, index, factor, None, -100, None, None, *wanted)
        real = cross_entropy_op(*arguments)
        with torch._subclasses.FakeTensorMode() as mode:
            fake = cross_entropy_op(*(mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in arguments))
        for a, b in zip(real, fake, strict=True):
            assert (a.shape, a.dtype, a.stride(), a.device) == (b.shape, b.dtype, b.stride(), b.device)


@pytest.mark.parametrize(("reduction", "selected"), [("none", True), ("mean", True), ("sum", False)])
def test_compiled_as_one_graph_it_is_the_same(selected, reduction):
    torch._dynamo.reset()
    inputs = example(dtype=torch.bfloat16, selected=selected)

    def step(hidden, weight, targets, index, **_):
        loss, stats = triton(2 * hidden, weight, targets, index, reduction=reduction, softcap=9.0, return_stats=True)
        return loss + 0 * stats.lse.sum() + stats.count

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for a, b in zip(run(compiled, *inputs), run(step, *inputs), strict=True):
        assert torch.equal(a, b)


def test_other_numbers_of_rows_do_not_compile_again():
    """A batch masks another number of tokens each time: the first change makes a symbol of it."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def step(hidden, weight, targets, index, **_):
        return triton(hidden, weight, targets, index)

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for rows in (5, 7, 4, 6):
        inputs = example(dtype=torch.bfloat16, rows=rows)
        for a, b in zip(run(compiled, *inputs), run(step, *inputs), strict=True):
            assert torch.equal(a, b)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_checkpointing_changes_nothing(reduction, reentrant):
    inputs = example(dtype=torch.bfloat16)

    def step(hidden, weight, targets, index):
        return triton(hidden * 2, weight, targets, index, reduction=reduction)

    got = run(lambda *x: checkpoint(step, *x, use_reentrant=reentrant), *inputs)
    for a, b in zip(got, run(step, *inputs), strict=True):
        assert torch.equal(a, b)


def test_there_is_no_second_derivative():
    hidden, weight, targets, index = example()
    hidden.requires_grad_()
    loss = triton(hidden, weight, targets, index).square()
    (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()


def test_autocast_does_not_lower_the_precision():
    inputs = example()
    expected = run(triton, *inputs, reduction="none")
    with torch.autocast(DEVICE.type, torch.bfloat16):
        inside = run(triton, *inputs, reduction="none")
    assert all(torch.equal(a, b) for a, b in zip(inside, expected, strict=True))


def test_no_value_is_read_unasked(monkeypatch):
    """Reading stalls a GPU, where torch is told to refuse it, and fails for tensors without values, on a CPU."""
    monkeypatch.delenv("BIVEC_CHECK", raising=False)
    inputs = example(dtype=torch.bfloat16)
    if DEVICE.type == "cuda":
        run(triton, *inputs)  # compiles and loads the kernels
        torch.cuda.set_sync_debug_mode("error")
        try:
            run(triton, *inputs), run(triton, *inputs, reduction="none")
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return
    for reduction in ("none", "mean", "sum"):
        hidden, weight, targets, index = (x.to("meta") for x in inputs)
        hidden.requires_grad_(), weight.requires_grad_()
        triton(hidden, weight, targets, index, reduction=reduction, return_stats=True)[0].sum().backward()
        assert hidden.grad.shape == hidden.shape and weight.grad.shape == weight.shape
    with recording("sm_90") as launches:  # inside the operator, too
        options = {"ignore_index": -100, "softcap": 2.0, "workspace_bytes": 8 * 4 * 288}
        sweep(hidden.detach(), weight.detach(), targets, index, None, **options, want_rows=True, want_weight=True)
    assert [launch.kernel.__name__ for launch in launches] == ["cross_entropy_rows"] * 2
    assert [launch.grid for launch in launches] == [(6,), (5,)]


def test_on_amd_dz_is_fp32():
    """Its barrier does not wait for loads, so that a lane must not overwrite what another reads."""
    hidden, weight, targets, _ = (
        x if x is None else x.to("meta") for x in example(dtype=torch.bfloat16, selected=False)
    )
    options = {"ignore_index": -100, "softcap": None, "workspace_bytes": None, "want_rows": True, "want_weight": True}
    for architecture, dtype in (("sm_90", torch.bfloat16), ("gfx942", torch.float32)):
        with recording(architecture) as launches:
            sweep(hidden, weight, targets, None, None, **options)
        assert launches[0].arguments["gradient_ptr"].dtype == dtype


@pytest.mark.skipif(DEVICE.type == "cuda", reason="there the other tests run it")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_gemm_of_gpus_is_one_that_torch_has(dtype, monkeypatch):
    """A CPU can only say that the overload exists and takes these arguments."""
    monkeypatch.setattr("bivec.kernels.gemm.multiplies_halves", lambda dtype, device: True)
    with pytest.raises(NotImplementedError, match=r"aten::addmm\.dtype_out"):
        triton(*example(dtype=dtype))


def test_float64_is_refused():
    hidden, weight, targets, index = example()
    for operands in ((hidden.double(), weight.double()), (hidden, weight.double())):
        with pytest.raises(BackendError, match=r'float64.*backend="torch"'):
            triton(*operands, targets, index)


def test_on_a_cpu_the_interpreter_is_needed(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    hidden, weight, targets, _ = (x if x is None else x.cpu() for x in example(selected=False))
    with pytest.raises(BackendError, match="TRITON_INTERPRET=1"):
        triton(hidden, weight, targets)
