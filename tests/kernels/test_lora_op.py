"""lora_linears in Triton inside torch: compiled, checkpointed, what it saves and what it reads."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton")

from bivec.kernels import lora_linears
from bivec.kernels.launch import recording
from bivec.kernels.lora_triton import backward, forward, lora_linears_backward_op, lora_linears_op

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BACKENDS = ("torch", "triton")
BF16, FP32 = torch.bfloat16, torch.float32
T, RANK, SCALING = 37, 5, 1.7  # as the operands of tests/kernels/conftest.py have them
SEED = 2**40 + 3
IDS = torch.arange(T, device=DEVICE) * 7 + 3
DROPOUT = {"dropout_p": 0.3, "seed": SEED, "token_ids": IDS}


def joint(backend, **options):
    def call(x, weights, biases, lora_as, lora_bs):
        return lora_linears(x, weights, lora_as, lora_bs, SCALING, biases=biases, backend=backend, **options)

    return call


def operator_arguments(lora, dropout_p, dtype=BF16, lora_dtype=FP32):
    operands = lora.Operands(dtype, lora_dtype, tokens=5, width=7, outs=(3, 2, 4), ranks=[5, 5, 3])
    tensors = [x if x is not None else torch.empty(0, dtype=dtype, device=DEVICE) for x in operands.tensors]
    x, *matrices = operands.unpack([t.requires_grad_(t.numel() > 0) for t in tensors])
    noise = (torch.tensor([SEED], device=DEVICE), IDS[:5]) if dropout_p else (None, None)
    return x, *matrices, *noise, SCALING, dropout_p


def backward_arguments(lora, dropout_p, wanted, dtype=BF16, lora_dtype=FP32, reached=(0, 1, 2)):
    x, weights, _, lora_as, lora_bs, *noise = operator_arguments(lora, dropout_p, dtype, lora_dtype)
    *outs, h = lora_linears_op(x, weights, _, lora_as, lora_bs, *noise)
    d_outs = [d if p in reached else None for p, d in enumerate(lora.upstream(outs))]
    matrices = [[t.detach() for t in kind] for kind in (weights, lora_as, lora_bs)]
    return d_outs, x.detach(), *matrices, h.detach(), *noise, wanted


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_opcheck(dropout_p, lora):
    """Schema, fake tensors, autograd registration, and tracing with static and dynamic shapes."""
    torch.library.opcheck(lora_linears_op, operator_arguments(lora, dropout_p))
    torch.library.opcheck(lora_linears_backward_op, backward_arguments(lora, dropout_p, [True] * 13))
    wanted = [True] + [False] * 6 + [True, False, True] * 2
    torch.library.opcheck(lora_linears_backward_op, backward_arguments(lora, dropout_p, wanted, reached=(0, 2)))


@pytest.mark.parametrize(("dtype", "lora_dtype"), [(BF16, FP32), (BF16, BF16)], ids=["fp32", "bf16"])
def test_fake_results_look_like_the_real_ones(dtype, lora_dtype, lora):
    for op, arguments in (
        (lora_linears_op, operator_arguments(lora, 0.3, dtype, lora_dtype)),
        (lora_linears_backward_op, backward_arguments(lora, 0.3, [True] * 13, dtype, lora_dtype)),
        (lora_linears_backward_op, backward_arguments(lora, 0.0, [False, True] * 6 + [False], dtype, lora_dtype)),
    ):
        real = op(*arguments)
        with torch._subclasses.FakeTensorMode() as mode:
            fake = op(*torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, arguments))
        assert len(real) == len(fake)
        for a, b in zip(real, fake, strict=True):
            assert (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
            assert a.stride() == b.stride() or a.numel() == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{}, DROPOUT], ids=["plain", "dropout"])
def test_compiled_as_one_graph_it_is_the_same(options, backend, lora):
    torch._dynamo.reset()

    def step(x, *matrices):
        return [y * 2 for y in joint(backend, **options)(x.sin(), *matrices)]

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    operands = lora.Operands(BF16, FP32)
    lora.assert_equal(lora.run(compiled, operands), lora.run(step, operands))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_nothing(reentrant, lora):
    operands = lora.Operands(BF16, FP32)

    def step(*leaves):
        return tuple(y.cos() for y in joint("triton", **DROPOUT)(*operands.unpack(leaves)))

    def checkpointed(x, *matrices):
        return checkpoint(step, x, *(m for kind in matrices for m in kind), use_reentrant=reentrant)

    def direct(x, *matrices):
        return step(x, *(m for kind in matrices for m in kind))

    lora.assert_equal(lora.run(checkpointed, operands), lora.run(direct, operands))


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_saved(backend, lora):
    """Of the call's own: h of every projection, and on Triton the seed as a tensor."""
    operands = lora.Operands(BF16, FP32)
    leaves = [None if t is None else t.requires_grad_() for t in operands.tensors]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        joint(backend, **DROPOUT)(*operands.unpack(leaves))
    given = {t.data_ptr() for t in (*leaves, IDS) if t is not None}
    own = sum(t.nbytes for t in saved if t.data_ptr() not in given)
    assert own == 3 * T * RANK * 4 + (8 if backend == "triton" else 0)
    assert sum(t.data_ptr() == leaves[0].data_ptr() for t in saved) == 1  # x once


def test_there_is_no_second_derivative(lora):
    operands = lora.Operands()
    leaves = [None if t is None else t.requires_grad_() for t in operands.tensors]
    outs = joint("triton")(*operands.unpack(leaves))
    (gradient,) = torch.autograd.grad(outs[0].square().sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        gradient.sum().backward()


def test_autocast_does_not_lower_the_precision(lora):
    expected = lora.run(joint("triton", **DROPOUT), lora.Operands())

    def inside(*matrices):
        with torch.autocast(DEVICE.type, BF16):
            return joint("triton", **DROPOUT)(*matrices)

    lora.assert_equal(lora.run(inside, lora.Operands()), expected)


def test_no_value_is_read(lora):
    """Reading stalls a GPU, where torch is told to refuse it, and fails for tensors without values, on a CPU."""
    seed = torch.tensor([SEED], device=DEVICE)
    if DEVICE.type == "cuda":
        operands = lora.Operands(BF16, FP32)
        lora.run(joint("triton", **DROPOUT | {"seed": seed}), operands)  # compiles and loads the kernels
        torch.cuda.set_sync_debug_mode("error")
        try:
            for options in (DROPOUT, DROPOUT | {"seed": seed}):
                leaves = [None if t is None else t.detach().requires_grad_() for t in operands.tensors]
                sum(y.sum() for y in joint("triton", **options)(*operands.unpack(leaves))).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return
    operands = lora.Operands(BF16, FP32)
    leaves = [None if t is None else t.to("meta").requires_grad_() for t in operands.tensors]
    options = DROPOUT | {"seed": seed.to("meta"), "token_ids": IDS.to("meta")}
    sum(y.sum() for y in joint("triton", **options)(*operands.unpack(leaves))).backward()
    assert all(t is None or t.grad.shape == t.shape for t in leaves)
    x, weights, _, lora_as, lora_bs = operands.unpack([None if t is None else t.to("meta") for t in operands.tensors])
    noise = options["seed"], options["token_ids"], SCALING, 0.3
    with recording("sm_90") as launches:  # inside the operators, too
        *outs, h = forward(x, weights, [x.new_empty(0)] * 3, lora_as, lora_bs, *noise)
        backward(outs, x, weights, lora_as, lora_bs, h, *noise, [True] + [False] * 6 + [True] * 6)
    names = [launch.kernel.__name__.removeprefix("lora_") for launch in launches]
    expected = "row_keys project update update update gradient gradient gradient project project project row_keys"
    assert names == f"{expected} gradient update".split()
