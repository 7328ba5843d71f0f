"""lora_linear and lora_linears in Triton against float64, against the torch backend, and inside torch."""

from itertools import product

import pytest
import torch
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton")

from bivec.kernels import BackendError, lora_linear, lora_linears, lora_triton
from bivec.kernels import reference as ref
from bivec.kernels.aot_cases_lora import all_cases, cases
from bivec.kernels.dropout import linear_keep_mask
from bivec.kernels.launch import recording
from bivec.kernels.lora_kernels import gradient, project_, update_
from bivec.kernels.lora_triton import backward, forward, lora_linears_backward_op, lora_linears_op
from bivec.kernels.tuning import ARCHITECTURES, config_of, read_table

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BACKENDS = ("torch", "triton")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
PAIRS = [(BF16, FP32), (FP16, FP32), (BF16, BF16), (FP32, FP32)]  # base, LoRA
T, IN, OUTS, RANK, SCALING = 37, 45, (33, 17, 70), 5, 1.7  # multiples of nothing, a tile and more
SEED = 2**40 + 3
IDS = torch.arange(T, device=DEVICE) * 7 + 3
DROPOUT = {"dropout_p": 0.3, "seed": SEED, "token_ids": IDS}
FLOOR = 1e-6  # relative, Frobenius: a few roundings of fp32


def randn(*shape, seed=0, dtype=FP32, scale=1.0):
    return (torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * scale).to(
        DEVICE, dtype
    )


class Operands:
    """x, weights, biases (the second is None), A and B; as one list of leaves and back."""

    def __init__(self, dtype=FP32, lora_dtype=None, *, tokens=T, width=IN, outs=OUTS, ranks=None, bias=True):
        lora_dtype, ranks = lora_dtype or dtype, ranks or [RANK] * len(outs)
        self.count = len(outs)
        self.tensors = [
            randn(tokens, width, dtype=dtype),
            *(randn(out, width, seed=10 + p, dtype=dtype, scale=0.2) for p, out in enumerate(outs)),
            *(randn(out, seed=20 + p, dtype=dtype) if bias and p != 1 else None for p, out in enumerate(outs)),
            *(randn(rank, width, seed=30 + p, dtype=lora_dtype, scale=0.2) for p, rank in enumerate(ranks)),
            *(
                randn(out, rank, seed=40 + p, dtype=lora_dtype, scale=0.4)
                for p, (out, rank) in enumerate(zip(outs, ranks, strict=True))
            ),
        ]

    def unpack(self, leaves):
        x, *others = leaves
        return x, *(others[i * self.count : (i + 1) * self.count] for i in range(4))

    def double(self):
        other = object.__new__(Operands)
        other.count, other.tensors = self.count, [None if t is None else t.double() for t in self.tensors]
        return other


def upstream(outs):
    """Rounded to bf16, so that every dtype sees the same numbers."""
    return [randn(*o.shape, seed=90 + p, dtype=BF16).to(o.dtype) for p, o in enumerate(outs)]


def run(function, operands, trained=None, reached=None):
    """The outputs, and the gradients of the operands (None of an absent bias and of what is not trained).

    ``trained`` are positions in ``operands.tensors``, ``reached`` the outputs that something depends on; default all.
    """
    count = len(operands.tensors)
    trained = set(range(count)) if trained is None else set(trained)
    leaves = [
        None if t is None else t.detach().clone().requires_grad_(i in trained) for i, t in enumerate(operands.tensors)
    ]
    outs = function(*operands.unpack(leaves))
    chosen = [p for p in range(len(outs)) if reached is None or p in reached]
    gradients = upstream(outs)
    torch.autograd.backward([outs[p] for p in chosen], [gradients[p] for p in chosen])
    return [o.detach() for o in outs], [None if t is None else t.grad for t in leaves]


def joint(backend, **options):
    def call(x, weights, biases, lora_as, lora_bs):
        return lora_linears(x, weights, lora_as, lora_bs, SCALING, biases=biases, backend=backend, **options)

    return call


def separate(backend, **options):
    def call(x, *matrices):
        return [
            lora_linear(x, w, a, b, SCALING, bias=bias, backend=backend, **options)
            for w, bias, a, b in zip(*matrices, strict=True)
        ]

    return call


def plain(dropout_p=0.0, seed=None, token_ids=IDS):
    """The reference; over a narrower base, the update in the dtype of its matrices."""

    def call(x, *matrices):
        outs = []
        keep = linear_keep_mask(seed, token_ids, x.shape[1], dropout_p) if dropout_p else None
        for w, bias, a, b in zip(*matrices, strict=True):
            options = {"dropout_p": dropout_p, "keep_mask": keep}
            if a.dtype == x.dtype:
                outs.append(ref.lora_linear(x, w, a, b, SCALING, bias=bias, **options))
            else:
                update = ref.lora_linear(x.to(a.dtype), w.to(a.dtype) * 0, a, b, SCALING, **options)
                outs.append(torch.nn.functional.linear(x, w, bias) + update.to(x.dtype))
        return outs

    return call


def flat(results):
    outs, gradients = results
    return [*outs, *(g for g in gradients if g is not None)]


def assert_equal(found, expected):
    for a, b in zip(flat(found), flat(expected), strict=True):
        assert torch.equal(a, b)


def assert_near(found, expected, tolerance=2e-6):
    """Relative to the norm: sums in another order."""
    for a, b in zip(flat(found), flat(expected), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert (a.double() - b.double()).norm() <= tolerance * b.double().norm()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{}, DROPOUT], ids=["plain", "dropout"])
@pytest.mark.parametrize(("dtype", "lora_dtype"), PAIRS, ids=lambda d: str(d).removeprefix("torch."))
def test_matches_float64(dtype, lora_dtype, options, backend):
    operands = Operands(dtype, lora_dtype)
    ours = run(joint(backend, **options), operands)
    same_dtype, exact = (run(plain(**options), o) for o in (operands, operands.double()))
    assert [o.dtype for o in ours[0]] == [dtype] * 3
    assert [g.dtype for g in ours[1] if g is not None] == [t.dtype for t in operands.tensors if t is not None]
    for i, (a, b, c) in enumerate(zip(flat(ours), flat(same_dtype), flat(exact), strict=True)):
        error, limit = ((x.double() - c).norm() / c.norm() for x in (a, b))
        assert error <= 2 * limit + FLOOR, f"{i}: {error} > 2 x {limit}"


@pytest.mark.parametrize("options", [{}, DROPOUT], ids=["plain", "dropout"])
@pytest.mark.parametrize("lora_dtype", [FP32, BF16], ids=str)
def test_jointly_is_as_one_by_one(lora_dtype, options):
    """With the same mask; sums are formed in another order."""
    operands = Operands(FP32 if lora_dtype == FP32 else BF16, lora_dtype)
    together, apart = (run(form("triton", **options), operands) for form in (joint, separate))
    assert_near(together, apart, 4 * torch.finfo(operands.tensors[0].dtype).eps)


@pytest.mark.parametrize("options", [{}, DROPOUT], ids=["plain", "dropout"])
def test_both_backends_agree(options):
    assert_near(run(joint("triton", **options), Operands()), run(joint("torch", **options), Operands()))


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("width", [16, 70])
def test_the_mask_has_the_same_bits(dtype, width):
    """Through identities an output, a gradient of x and one of A show nothing but a mask. A rank of 70 takes blocks."""
    tokens, outs, p = 67, (width, width), 0.5
    ids = torch.arange(tokens, device=DEVICE) - 2**40
    mask = linear_keep_mask(5, ids, width, p)
    x, identity = torch.ones(tokens, width, device=DEVICE, dtype=dtype), torch.eye(width, device=DEVICE, dtype=dtype)
    x.requires_grad_()
    lora_as = [identity.clone().requires_grad_() for _ in outs]
    options = {"dropout_p": p, "seed": 5, "token_ids": ids, "backend": "triton"}
    ys = lora_linears(x, [torch.zeros_like(identity)] * 2, lora_as, [identity] * 2, 1.0, **options)
    assert all(torch.equal(y, 2.0 * mask.to(dtype)) for y in ys) and 0.3 < mask.float().mean() < 0.7
    sum(y.sum() for y in ys).backward()
    assert torch.equal(x.grad, 4.0 * mask.to(dtype))
    for lora_a in lora_as:  # the same for every row of A
        assert torch.equal(lora_a.grad, (2.0 * mask.sum(0)).to(dtype).expand(width, width))


@pytest.mark.parametrize("tokens", [0, 1, 65])
@pytest.mark.parametrize(
    ("width", "outs", "ranks"), [(1, (1,), [1]), (3, (130, 1), [16, 2]), (129, (16,), [64]), (33, (20, 5), [70, 3])]
)
def test_any_shape(tokens, width, outs, ranks):
    operands = Operands(tokens=tokens, width=width, outs=outs, ranks=ranks)
    ids = torch.arange(tokens, device=DEVICE)
    for options in ({}, DROPOUT | {"token_ids": ids}):
        ours = run(joint("triton", **options), operands)
        exact = run(plain(**options), operands.double())
        for a, b in zip(flat(ours), flat(exact), strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=2e-5)


def test_nothing_in_nothing_out():
    for width, out in ((0, 7), (7, 0)):
        ours, torchs = (run(joint(b), Operands(width=width, outs=(out,), bias=False)) for b in ("triton", "torch"))
        assert_equal(ours, torchs)


def test_runs_repeat_bit_for_bit_and_long_sums_have_parts():
    """More tokens than one part of a sum over them; partial sums reach neither other parts nor lack any row."""
    operands = Operands(BF16, FP32, tokens=300, width=20, outs=(18, 3))
    options = {"dropout_p": 0.1, "seed": SEED, "token_ids": torch.arange(300, device=DEVICE)}
    first, second = (run(joint("triton", **options), operands) for _ in range(2))
    assert_equal(first, second)
    exact = run(plain(**options), operands.double())
    for found, truth in list(zip(first[1], exact[1], strict=True))[5:]:  # of A and B
        assert (found.double() - truth).norm() <= 1e-5 * truth.norm()
    for tokens, parts in ((1, 1), (256, 1), (257, 2), (4096, 16), (4097, 9), (10**6, 16)):
        with recording("sm_90") as launches:
            gradient(torch.empty(tokens, 4, device="meta"), torch.empty(tokens, 16, device="meta"), FP32, 1.0)
        assert launches[0].arguments["parts_ptr"].shape[0] == parts
        assert launches[0].arguments["part_rows"] % launches[0].arguments["BLOCK_T"] == 0


TRAINED = {"lora": range(7, 13), "x": [0], "one A": [8], "one B": [12], "base": range(1, 7), "x and one B": [0, 10]}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{}, DROPOUT], ids=["plain", "dropout"])
@pytest.mark.parametrize("trained", TRAINED.values(), ids=TRAINED)
def test_any_subset_may_be_trained(trained, options, backend):
    operands = Operands()
    outs, everything = run(joint(backend, **options), operands)
    found, some = run(joint(backend, **options), operands, trained)
    for i, (one, other) in enumerate(zip(some, everything, strict=True)):
        assert (one is None) == (i not in trained or other is None)
    assert_near((found, some), (outs, [g if i in trained else None for i, g in enumerate(everything)]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{}, DROPOUT], ids=["plain", "dropout"])
@pytest.mark.parametrize("reached", [[0], [2], [0, 2]], ids=str)
def test_outputs_that_nothing_depends_on(reached, options, backend):
    """Their operands get no gradient, the others and x what they get without them."""
    operands = Operands()
    found = run(joint(backend, **options), operands, reached=reached)
    expected = run(separate(backend, **options), operands, reached=reached)
    assert [g is None for g in found[1]] == [g is None for g in expected[1]]
    assert_near(found, expected)


def test_no_work_for_what_nobody_wants(monkeypatch):
    calls = []
    for name in ("project_", "update_", "gradient"):
        real = getattr(lora_triton, name)
        monkeypatch.setattr(lora_triton, name, lambda *a, name=name, real=real: calls.append(name) or real(*a))
    operands = Operands()

    def counts(trained, reached=None):
        calls.clear()
        run(joint("triton", **DROPOUT), operands, trained, reached)
        return [calls.count(name) for name in ("project_", "update_", "gradient")]

    forward_alone = [1, 3, 0]
    for trained, reached, more in (
        (range(7, 13), None, [3, 0, 4]),  # LoRA under a frozen base and input: three dB, one dA of all
        (range(7, 13), [1], [1, 0, 2]),
        ([0, *range(7, 13)], None, [3, 1, 4]),
        ([0], [2], [1, 1, 0]),
        ([12], None, [0, 0, 1]),
        ([9], None, [1, 0, 1]),
        (range(1, 7), None, [0, 0, 0]),
        ([12], [0], [0, 0, 0]),
    ):
        assert counts(trained, reached) == [a + b for a, b in zip(forward_alone, more, strict=True)], (trained, reached)
    with torch.no_grad():
        calls.clear()
        joint("triton")(*operands.unpack(operands.tensors))
    assert calls == ["project_", "update_", "update_", "update_"]


def test_the_seed_may_be_a_tensor():
    for backend in BACKENDS:
        expected = run(joint(backend, **DROPOUT), Operands())
        for seed in (torch.tensor([SEED], device=DEVICE), torch.tensor(SEED, device=DEVICE)):
            assert_equal(run(joint(backend, **DROPOUT | {"seed": seed}), Operands()), expected)
        other = run(joint(backend, **DROPOUT | {"seed": 1}), Operands())
        assert not torch.equal(other[0][0], expected[0][0])


def test_token_ids_count_by_default():
    ids = torch.arange(T, device=DEVICE)
    expected = run(joint("triton", **DROPOUT | {"token_ids": ids}), Operands())
    assert_equal(run(joint("triton", dropout_p=0.3, seed=SEED), Operands()), expected)
    strided = torch.stack([ids, ids + 1], 1)[:, 0]
    assert_equal(run(joint("triton", **DROPOUT | {"token_ids": strided}), Operands()), expected)


def test_layouts():
    """Rows further apart than ``in``, columns that are not neighbours, transposed matrices, a broadcast gradient."""
    operands = Operands()
    x, weights, biases, lora_as, lora_bs = operands.unpack(operands.tensors)
    expected = joint("triton", **DROPOUT)(x, weights, biases, lora_as, lora_bs)

    def turned(matrices):
        return [m.t().contiguous().t() for m in matrices]

    wide = torch.zeros(T, 3 * IN, device=DEVICE)
    for place in (slice(IN, 2 * IN), slice(None, None, 3)):
        wide[:, place] = x
        found = joint("triton", **DROPOUT)(wide[:, place], turned(weights), biases, turned(lora_as), turned(lora_bs))
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    results = []
    for upper in (torch.ones(T, OUTS[0], device=DEVICE), torch.ones((), device=DEVICE).expand(T, OUTS[0])):
        leaf = x.clone().requires_grad_()
        lora_linear(leaf, weights[0], lora_as[0], lora_bs[0], SCALING, backend="triton").backward(upper)
        results.append(leaf.grad)
    assert torch.equal(*results)


def test_offsets_beyond_2_31_elements():
    """Rows 2^26 elements apart: the later ones begin behind 2^31. The memory is reserved and hardly touched."""
    rows, stride, width = 40, 2**26, 4
    try:
        memory = torch.empty(2**31 + rows * stride, dtype=FP16, device=DEVICE)
    except RuntimeError:
        pytest.skip("there is no room for 9 GB")
    far = memory.as_strided((rows, width), (stride, 1), 2**31)
    near, m, h = randn(rows, width, dtype=FP16), randn(2, width), randn(rows, 2)
    far.copy_(near)
    found, expected = torch.empty_like(h), torch.empty_like(h)
    project_(found, far, m, 1.0), project_(expected, near, m, 1.0)
    assert torch.equal(found, expected)
    assert torch.equal(gradient(far, h, FP32, 1.0), gradient(near, h, FP32, 1.0))
    update_(far, h, m, 1.0), update_(near, h, m, 1.0)
    assert torch.equal(far, near)


# --- inside torch -----------------------------------------------------------------------------------------------------


def operator_arguments(dropout_p, dtype=BF16, lora_dtype=FP32):
    operands = Operands(dtype, lora_dtype, tokens=5, width=7, outs=(3, 2, 4), ranks=[5, 5, 3])
    tensors = [x if x is not None else randn(0, dtype=dtype) for x in operands.tensors]
    x, *matrices = operands.unpack([t.requires_grad_(t.numel() > 0) for t in tensors])
    noise = (torch.tensor([SEED], device=DEVICE), IDS[:5]) if dropout_p else (None, None)
    return x, *matrices, *noise, SCALING, dropout_p


def backward_arguments(dropout_p, wanted, dtype=BF16, lora_dtype=FP32, reached=(0, 1, 2)):
    x, weights, _, lora_as, lora_bs, *noise = operator_arguments(dropout_p, dtype, lora_dtype)
    *outs, h = lora_linears_op(x, weights, _, lora_as, lora_bs, *noise)
    d_outs = [d if p in reached else None for p, d in enumerate(upstream(outs))]
    matrices = [[t.detach() for t in kind] for kind in (weights, lora_as, lora_bs)]
    return d_outs, x.detach(), *matrices, h.detach(), *noise, wanted


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_opcheck(dropout_p):
    """Schema, fake tensors, autograd registration, and tracing with static and dynamic shapes."""
    torch.library.opcheck(lora_linears_op, operator_arguments(dropout_p))
    torch.library.opcheck(lora_linears_backward_op, backward_arguments(dropout_p, [True] * 13))
    wanted = [True] + [False] * 6 + [True, False, True] * 2
    torch.library.opcheck(lora_linears_backward_op, backward_arguments(dropout_p, wanted, reached=(0, 2)))


@pytest.mark.parametrize(("dtype", "lora_dtype"), [(BF16, FP32), (BF16, BF16)], ids=["fp32", "bf16"])
def test_fake_results_look_like_the_real_ones(dtype, lora_dtype):
    for op, arguments in (
        (lora_linears_op, operator_arguments(0.3, dtype, lora_dtype)),
        (lora_linears_backward_op, backward_arguments(0.3, [True] * 13, dtype, lora_dtype)),
        (lora_linears_backward_op, backward_arguments(0.0, [False, True] * 6 + [False], dtype, lora_dtype)),
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
def test_compiled_as_one_graph_it_is_the_same(options, backend):
    torch._dynamo.reset()

    def step(x, *matrices):
        return [y * 2 for y in joint(backend, **options)(x.sin(), *matrices)]

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    operands = Operands(BF16, FP32)
    assert_equal(run(compiled, operands), run(step, operands))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_nothing(reentrant):
    operands = Operands(BF16, FP32)

    def step(*leaves):
        return tuple(y.cos() for y in joint("triton", **DROPOUT)(*operands.unpack(leaves)))

    def checkpointed(x, *matrices):
        return checkpoint(step, x, *(m for kind in matrices for m in kind), use_reentrant=reentrant)

    def direct(x, *matrices):
        return step(x, *(m for kind in matrices for m in kind))

    assert_equal(run(checkpointed, operands), run(direct, operands))


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_saved(backend):
    """Of the call's own: h of every projection, and on Triton the seed as a tensor."""
    operands = Operands(BF16, FP32)
    leaves = [None if t is None else t.requires_grad_() for t in operands.tensors]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        joint(backend, **DROPOUT)(*operands.unpack(leaves))
    given = {t.data_ptr() for t in (*leaves, IDS) if t is not None}
    own = sum(t.nbytes for t in saved if t.data_ptr() not in given)
    assert own == 3 * T * RANK * 4 + (8 if backend == "triton" else 0)
    assert sum(t.data_ptr() == leaves[0].data_ptr() for t in saved) == 1  # x once


def test_there_is_no_second_derivative():
    operands = Operands()
    leaves = [None if t is None else t.requires_grad_() for t in operands.tensors]
    outs = joint("triton")(*operands.unpack(leaves))
    (gradient,) = torch.autograd.grad(outs[0].square().sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        gradient.sum().backward()


def test_autocast_does_not_lower_the_precision():
    expected = run(joint("triton", **DROPOUT), Operands())

    def inside(*matrices):
        with torch.autocast(DEVICE.type, BF16):
            return joint("triton", **DROPOUT)(*matrices)

    assert_equal(run(inside, Operands()), expected)


def test_no_value_is_read():
    """Reading stalls a GPU, where torch is told to refuse it, and fails for tensors without values, on a CPU."""
    seed = torch.tensor([SEED], device=DEVICE)
    if DEVICE.type == "cuda":
        operands = Operands(BF16, FP32)
        run(joint("triton", **DROPOUT | {"seed": seed}), operands)  # compiles and loads the kernels
        torch.cuda.set_sync_debug_mode("error")
        try:
            for options in (DROPOUT, DROPOUT | {"seed": seed}):
                leaves = [None if t is None else t.detach().requires_grad_() for t in operands.tensors]
                sum(y.sum() for y in joint("triton", **options)(*operands.unpack(leaves))).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return
    operands = Operands(BF16, FP32)
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


# --- errors and tables ------------------------------------------------------------------------------------------------


def test_float64_is_refused():
    for lora_dtype in (FP32, torch.float64):
        with pytest.raises(BackendError, match=r'^lora_linears: .*float64.*backend="torch"'):
            run(joint("triton"), Operands(torch.float64, lora_dtype))
    x, w, a, b = torch.ones(2, 3), torch.ones(4, 3), torch.ones(1, 3), torch.ones(4, 1)
    with pytest.raises(BackendError, match=r"^lora_linear: .*float64"):
        lora_linear(*(t.double() for t in (x, w, a, b)), 1.0, backend="triton")


def test_on_a_cpu_the_interpreter_is_needed(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    x, w, a, b = torch.ones(2, 3), torch.ones(4, 3), torch.ones(1, 3), torch.ones(4, 1)
    for call in (lambda: lora_linear(x, w, a, b, 1.0, backend="triton"),):
        with pytest.raises(BackendError, match="TRITON_INTERPRET=1"):
            call()
    with pytest.raises(BackendError, match="TRITON_INTERPRET=1"):
        lora_linears(x, [w], [a], [b], 1.0, backend="triton")


def test_the_table_has_every_row():
    table = read_table("lora")
    keys = [(r["kernel"], r["arch"], r["key"]["itemsize"], r["key"]["lora_itemsize"]) for r in table]
    kernels, itemsizes = ("lora_gradient", "lora_project", "lora_update"), ((2, 2), (2, 4), (4, 4))
    assert sorted(keys) == sorted((k, a, *sizes) for k, a, sizes in product(kernels, ARCHITECTURES, itemsizes))
    for row in table:
        assert row["compiled"]["spills"] == 0 and 0 < row["compiled"]["registers"] <= 255
        assert row["arch"] != "sm_80" or row["compiled"]["shared"] <= 99 * 1024


@pytest.mark.parametrize("target", ARCHITECTURES)
def test_what_is_compiled_ahead_of_time_uses_every_row(target):
    rows = [row for row in read_table("lora") if row["arch"] == target]
    table = {(r["kernel"], str(config_of(r).blocks), config_of(r).num_warps, config_of(r).num_stages) for r in rows}
    for these in (cases(), all_cases()):
        with recording(target) as launches:
            for case in these:
                case.call()
        found = set()
        for launch in launches:
            blocks = {
                name: launch.arguments[name] for name in ("BLOCK_T", "BLOCK_K", "BLOCK_N") if name in launch.arguments
            }
            if launch.kernel.__name__ != "lora_row_keys":
                found.add((launch.kernel.__name__, str(blocks), launch.num_warps, launch.num_stages))
        assert found == table
