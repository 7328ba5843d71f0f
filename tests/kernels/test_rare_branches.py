"""What no ordinary step of a training takes: gradients nobody wants, exported graphs, machines that are not there."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from bivec.kernels import apply_rotary, flash_attention, gemm, info_nce, linear_cross_entropy, rms_norm
from bivec.kernels import launch as launching
from bivec.kernels import reference as ref
from bivec.kernels.attention_layout import hidden_keys
from bivec.kernels.attention_triton import LONG, attention_backward_op
from bivec.kernels.launch import architecture, launch, recording

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BACKENDS = ("torch", "triton")
TOKENS, POSITIONS = 5, 16


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def rotary_operands(head_dim=8):
    angles = torch.outer(torch.arange(POSITIONS).float(), 10.0 ** -torch.linspace(0, 3, head_dim // 2)).to(DEVICE)
    q, k = randn(TOKENS, 3, head_dim), randn(TOKENS, 1, head_dim, seed=1)
    return q, k, angles.cos(), angles.sin(), torch.arange(TOKENS, device=DEVICE)


# --- gradients ------------------------------------------------------------------------------------------------------


class Unused(torch.autograd.Function):
    """Somebody's operation that has no gradient for what it was given: it says None, not zeros."""

    @staticmethod
    def forward(ctx, *tensors):
        ctx.count = len(tensors)
        return torch.stack([x.sum() for x in tensors]).sum()

    @staticmethod
    def backward(ctx, _):
        return (None,) * ctx.count


def rotated(x, other, **options):
    q, k, *tables = rotary_operands()
    return apply_rotary(q * x.sum(), k * other.sum(), *tables, **options)


CALLS = {
    "info_nce": info_nce,
    "info_nce of each": lambda x, y, **o: info_nce(x, y, reduction="none", **o),
    "linear_cross_entropy": lambda x, y, **o: linear_cross_entropy(x, y, torch.arange(4, device=DEVICE), **o),
    "apply_rotary": rotated,
    "apply_rotary in place": lambda x, y, **o: rotated(x, y, inplace=True, **o),
}


@pytest.mark.parametrize(
    ("name", "backend"), [(name, b) for name in CALLS for b in BACKENDS if b == "triton" or "rotary" not in name]
)
def test_an_operation_behind_that_has_no_gradient_leaves_none(name, backend):
    """Not zeros, which an optimiser would take for a gradient, and no kernel for them."""
    x, y = (randn(4, 8, seed=seed).requires_grad_() for seed in (1, 2))
    out = CALLS[name](x, y, backend=backend)
    outputs = out if isinstance(out, tuple) else (out,)
    assert all(one.requires_grad for one in outputs)
    gradients = torch.autograd.grad(Unused.apply(*outputs), (x, y), allow_unused=True)
    assert gradients == (None, None)


@pytest.mark.parametrize("fused", [False, True])
def test_rms_norm_of_which_the_weight_alone_is_trained(fused):
    x, weight = randn(7, 6), randn(6, seed=1)
    residual = randn(7, 6, seed=2) if fused else None
    found = []
    for function in (rms_norm, ref.rms_norm):
        leaf = weight.clone().requires_grad_()
        out = function(x, leaf, 1e-5, residual=residual)
        (out[0] if fused else out).square().sum().backward()
        found.append(leaf.grad)
    torch.testing.assert_close(*found)
    assert x.grad is None


class Operations(TorchDispatchMode):
    """The names of what is computed inside."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(DEVICE.type != "cpu", reason="on a GPU the backward runs in another thread, which no mode sees")
def test_rms_norm_computes_no_gradient_of_x_that_nobody_wants():
    counts = []
    for wanted in (True, False):
        out = rms_norm(randn(7, 6).requires_grad_(wanted), randn(6, seed=1).requires_grad_(), 1e-5, backend="torch")
        with Operations() as operations:
            out.backward(randn(7, 6, seed=2))
        counts.append(operations.names.count("addcmul_.default"))
    assert counts == [1, 0]


def test_the_long_path_says_that_its_backward_needs_the_output():
    q, lse = randn(4, 2, 16), randn(2, 4)
    bounds, order = (torch.tensor(values, dtype=torch.int32, device=DEVICE) for values in ([0, 4], [0]))
    options = (LONG, 0.25, None, None, None, 0.0, None, None)
    with pytest.raises(ValueError, match="the long path needs the output of the forward"):
        attention_backward_op(q, q, q, q, None, lse, bounds, bounds, order, *options)


# --- shapes and places ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_heads_without_dimensions_are_rotated_to_nothing(backend):
    q, k, *tables = rotary_operands(head_dim=0)
    turned = apply_rotary(q, k, *tables, backend=backend)
    assert [x.shape for x in turned] == [(TOKENS, 3, 0), (TOKENS, 1, 0)]
    with recording("sm_90") as launches:
        apply_rotary(q, k, *tables, backend=backend)
    assert launches == []


def test_a_window_to_the_left_only_hides_no_key_on_the_right():
    expected = [[key < row - 1 for key in range(4)] for row in range(4)]
    assert hidden_keys(4, False, (1, -1), DEVICE).tolist() == expected
    cu_seqlens = torch.tensor([0, 6], dtype=torch.int32, device=DEVICE)
    q, k, v = (randn(6, 2, 8, seed=seed) for seed in range(3))
    found = flash_attention(q, k, v, cu_seqlens, 6, window=(2, -1), backend="torch")
    exact, _ = ref.attention(q.double(), k.double(), v.double(), cu_seqlens, window=(2, -1))
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_off_the_cpu_ignored_rows_are_not_looked_for(reduction):
    """Finding them would make a GPU wait; on the meta device there is nothing to find, so reading is an error."""
    hidden, weight = (torch.empty(shape, device="meta", requires_grad=True) for shape in ((6, 8), (11, 8)))
    targets = torch.empty(6, dtype=torch.int64, device="meta")
    losses = linear_cross_entropy(hidden, weight, targets, reduction=reduction, backend="torch")
    losses.sum().backward()
    assert losses.numel() == (6 if reduction == "none" else 1)
    assert hidden.grad.shape == (6, 8) and weight.grad.shape == (11, 8)


# --- torch.export, which runs our Python ----------------------------------------------------------------------------


class Module(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


def exported(function, *inputs):
    return torch.export.export(Module(function), inputs, strict=False).module()


@pytest.mark.parametrize("backend", BACKENDS)
def test_in_place_rotation_is_exported_without_overwriting(backend):
    """Eager, one memory for q and k is refused; a graph overwrites nothing, so it is no mistake there."""
    x, _, *tables = rotary_operands()

    def turn(x, *tables):
        return apply_rotary(x, x, *tables, inplace=True, backend=backend)

    with pytest.raises(ValueError, match="q and k are one memory"):
        turn(x.clone(), *tables)
    module, before = exported(turn, x, *tables), x.clone()
    expected = apply_rotary(x, x, *tables, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(module(x, *tables), expected, strict=True))
    assert torch.equal(x, before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_info_nce_is_exported_with_a_scale_nobody_reads(backend):
    queries, candidates = randn(4, 8), randn(4, 8, seed=1)

    def loss(queries, candidates, scale):
        return info_nce(queries, candidates, scale=scale, backend=backend)

    module = exported(loss, queries, candidates, torch.tensor(20.0, device=DEVICE))
    for scale in torch.tensor([20.0, 5.0], device=DEVICE):
        torch.testing.assert_close(module(queries, candidates, scale), loss(queries, candidates, scale))
    nowhere = torch.tensor(torch.nan, device=DEVICE)
    assert module(queries, candidates, nowhere).isnan()
    if DEVICE.type == "cpu":
        with pytest.raises(ValueError, match="scale must be finite"):
            loss(queries, candidates, nowhere)


@pytest.mark.parametrize("backend", BACKENDS)
def test_info_nce_is_exported_for_any_whole_scale(backend):
    """It is a symbol then; to check its value would tie the graph to one."""
    inputs = randn(4, 8), randn(4, 8, seed=1)

    def loss(queries, candidates, scale):
        return info_nce(queries, candidates, scale=scale, backend=backend)

    shapes = {"inputs": (None, None, torch.export.Dim.DYNAMIC)}
    module = torch.export.export(Module(loss), (*inputs, 20), dynamic_shapes=shapes, strict=False).module()
    for scale in (20, 7):
        torch.testing.assert_close(module(*inputs, scale), loss(*inputs, scale))


# --- machines that are not there ------------------------------------------------------------------------------------


class Elsewhere(Tensor):
    """A tensor that says it lies on the second GPU."""

    @staticmethod
    def __new__(cls):
        return torch.Tensor._make_wrapper_subclass(cls, (4,), device="cuda:1")

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(func)


def test_a_kernel_is_launched_on_the_gpu_of_its_tensors(monkeypatch):
    """Triton launches on the current device, which is the first one unless told."""
    events = []

    class Current:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            events.append(self.device)

        def __exit__(self, *_):
            events.append("left")

    class Kernel:
        def __getitem__(self, grid):
            return lambda **arguments: events.append((grid, arguments))

    monkeypatch.setattr(torch.cuda, "device", Current)
    x = Elsewhere()
    launch(Kernel(), (3, 1), {"n": 4, "x_ptr": x}, num_warps=2, num_stages=1)
    assert events == [
        torch.device("cuda:1"),
        ((3, 1), {"n": 4, "x_ptr": x, "num_warps": 2, "num_stages": 1}),
        "left",
    ]
    launch(Kernel(), (3, 0), {"x_ptr": x}, num_warps=2, num_stages=1)
    assert len(events) == 3  # an empty grid launches nothing


def test_the_architecture_is_the_one_of_the_tensors_gpu(monkeypatch):
    gpu = torch.device("cuda:1")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", {gpu: (10, 0)}.__getitem__)
    assert architecture(gpu) == "sm_100"
    monkeypatch.setattr(torch.version, "hip", "6.4")
    properties = type("Properties", (), {"gcnArchName": "gfx942:sramecc+:xnack-"})
    monkeypatch.setattr(torch.cuda, "get_device_properties", {gpu: properties}.__getitem__)
    assert architecture(gpu) == "gfx942"
    with recording("sm_80"):
        assert architecture(gpu) == "sm_80"


def test_a_cpu_has_an_architecture_in_the_interpreter_only(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert architecture(torch.device("cpu")) == launching.INTERPRETER_ARCHITECTURE
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(RuntimeError, match="no Triton architecture for tensors on cpu"):
        architecture(torch.device("cpu"))


def test_which_halves_the_library_multiplies_into_fp32(monkeypatch):
    gpu, matmul = torch.device("cuda"), torch.backends.cuda.matmul
    monkeypatch.setattr(torch.version, "hip", None)
    before = matmul.allow_fp16_accumulation
    try:
        for allowed in (False, True):
            matmul.allow_fp16_accumulation = allowed
            assert gemm.multiplies_halves(torch.bfloat16, gpu)
            assert gemm.multiplies_halves(torch.float16, gpu) != allowed
            assert not gemm.multiplies_halves(torch.float32, gpu)
            assert not gemm.multiplies_halves(torch.float16, torch.device("cpu"))
    finally:
        matmul.allow_fp16_accumulation = before
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert not gemm.multiplies_halves(torch.bfloat16, gpu)
