"""The Triton backend of linear_cross_entropy in numbers: against float64, and against the torch backend."""

import pytest
import torch

pytest.importorskip("triton")

from bivec.kernels import linear_cross_entropy
from bivec.kernels import reference as ref
from bivec.kernels.linear_cross_entropy_triton import cross_entropy_pass, operand_dtype
from bivec.kernels.tuning import Config, overriding

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROWS, WIDTH = 11, 13  # multiples of nothing
FLOOR = 1e-6  # fp32 rounding of a sum of a few hundred terms, relative


def relative_error(value, truth):
    return ((value.double() - truth).norm() / truth.norm().clamp_min(1e-300)).item()


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


def judge(ours, hidden, weight, targets, index, **options):
    """Fails where error > 2 x that of plain torch in the same dtype + floor, NaN included."""
    truth = run(ref.linear_cross_entropy, hidden.double(), weight.double(), targets, index, **options)
    plain = run(ref.linear_cross_entropy, hidden, weight, targets, index, **options)
    assert ours[0].dtype == torch.float32 and ours[1].dtype == hidden.dtype and ours[2].dtype == weight.dtype
    ratios = {}
    for name, value, theirs, exact in zip(("loss", "hidden", "weight"), ours, plain, truth, strict=True):
        limit = 2 * relative_error(theirs, exact) + FLOOR
        ratios[name] = relative_error(value, exact) / limit
    assert all(ratio <= 1.0 for ratio in ratios.values()), ratios


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("reduction", "selected"), [("none", True), ("none", False), ("mean", True), ("sum", False)])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_matches_float64(dtype, reduction, softcap, selected):
    """In chunks of six rows or fewer."""
    inputs = example(dtype=dtype, selected=selected)
    options = {"reduction": reduction, "softcap": softcap}
    ours = run(triton, *inputs, workspace_bytes=8 * 4 * 288, **options)
    judge(ours, *inputs, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("vocab", [1, 32, 1000, 2048, 2049, 4100, 49152, 50257, 128256, 151936])
def test_vocabularies(vocab, softcap, dtype):
    """Below, at and beyond the size of a block; several blocks, where dz is written over logits of other blocks."""
    inputs = example(vocab, dtype, rows=3 if vocab > 5000 else 7)
    judge(run(triton, *inputs, softcap=softcap), *inputs, softcap=softcap)


@pytest.mark.parametrize("dtype", DTYPES)
def test_other_tiles(dtype):
    """Five blocks a row, the last of one logit."""
    inputs = example(dtype=dtype)
    with overriding({"cross_entropy_rows": Config({"BLOCK_V": 64}, num_warps=4, num_stages=1)}):
        judge(run(triton, *inputs, softcap=4.0), *inputs, softcap=4.0)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_both_backends_agree(dtype, reduction):
    inputs = example(1000, dtype)
    options = {"reduction": reduction, "softcap": 5.0, "return_stats": True}
    for name, tolerance in (("loss", 1e-6), ("hidden", None), ("weight", None)):
        i = ("loss", "hidden", "weight").index(name)
        pair = [
            run(lambda *x, b=b: linear_cross_entropy(*x, backend=b, **options)[0], *inputs)[i]
            for b in ("torch", "triton")
        ]
        assert relative_error(pair[1], pair[0].double()) <= (tolerance or max(2e-6, torch.finfo(dtype).eps)), name
    stats = [linear_cross_entropy(*inputs, backend=b, **options)[1] for b in ("torch", "triton")]
    torch.testing.assert_close(stats[1].lse, stats[0].lse, rtol=1e-6, atol=1e-6)
    assert torch.equal(stats[1].correct, stats[0].correct) and torch.equal(stats[1].count, stats[0].count)


@pytest.mark.parametrize("magnitude", [1, 20, 50, 100])
@pytest.mark.parametrize("solved", [False, True], ids=["random", "nearly solved"])
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [*(("triton", dtype) for dtype in DTYPES), ("torch", torch.float32), ("torch", torch.bfloat16)],
)
def test_gradients_are_within_one_percent(backend, dtype, solved, magnitude):
    """Row by row, in bf16 too, where plain torch is off by 10 % and more; with p(target) = 1 - 1e-7 as well.

    fp16 gradients of such rows are below its range: judged is dz as the GEMMs get it.
    """
    g = torch.Generator().manual_seed(magnitude)
    logits = (magnitude * torch.randn(8, 300, generator=g, dtype=torch.float64)).to(dtype).to(DEVICE)
    targets = torch.randint(0, 300, (8,), generator=g).to(DEVICE)
    picks = (torch.arange(8, device=DEVICE), targets)
    if solved:
        others = logits.double().index_put(picks, torch.tensor(-torch.inf, dtype=torch.float64, device=DEVICE))
        logits[picks] = (others.logsumexp(1) + torch.linspace(5, 16, 8, device=DEVICE)).to(dtype)
    exact = logits.double()
    others = exact.index_put(picks, torch.tensor(-torch.inf, dtype=torch.float64, device=DEVICE)).logsumexp(1)
    expected = exact.softmax(1)
    expected[picks] = -torch.sigmoid(others - exact[picks])
    hidden = logits.clone().requires_grad_()
    if dtype == torch.float16:
        dz, losses = in_place(logits.float(), targets, dtype)
        dz = dz.double() / 2**15
    else:
        head = torch.eye(300, dtype=dtype, device=DEVICE)
        losses = linear_cross_entropy(hidden, head, targets, reduction="none", backend=backend)
        losses.sum().backward()
        dz, losses = hidden.grad.double(), losses.detach()
    error = (dz - expected).norm(dim=1) / expected.norm(dim=1)
    assert (error <= 0.01).all(), error.tolist()
    at_target = (dz[picks] - expected[picks]).abs() / expected[picks].abs().clamp_min(1e-7)
    assert (at_target <= 0.01).all(), at_target.tolist()
    exact_loss = torch.nn.functional.softplus(others - exact[picks])
    loss_error = (losses.double() - exact_loss).abs() / exact_loss
    assert (loss_error <= 2e-5 * (1 + magnitude / 20)).all(), loss_error.tolist()


@pytest.mark.parametrize("magnitude", [1.0, 20.0, 50.0, 100.0])
@pytest.mark.parametrize("solved", [False, True], ids=["random", "nearly solved"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_hidden_and_head_are_within_one_percent(dtype, backend, solved, magnitude):
    """Of logits of that size from products; solved: every row at cosine 0.999 with its target's, where the statement
    with a softmax is 0 in float64 too."""
    g = torch.Generator().manual_seed(int(magnitude))
    weight = torch.nn.functional.normalize(torch.randn(300, 64, generator=g), dim=1)
    targets = torch.randint(0, 300, (12,), generator=g)
    hidden = torch.nn.functional.normalize(torch.randn(12, 64, generator=g), dim=1)
    if solved:
        across = torch.nn.functional.normalize(
            hidden - (hidden * weight[targets]).sum(1, keepdim=True) * weight[targets]
        )
        hidden = 0.999 * weight[targets] + (1 - 0.999**2) ** 0.5 * across
    inputs = [(magnitude * hidden).to(DEVICE, dtype), weight.to(DEVICE, dtype), targets.to(DEVICE), None]
    truth = run(without_cancellation, *(x.double() for x in inputs[:2]), *inputs[2:])
    ours = run(linear_cross_entropy, *inputs, reduction="sum", backend=backend)
    for name, value, exact in zip(("loss", "hidden", "weight"), ours, truth, strict=True):
        assert ((value.double() - exact).norm() / exact.norm()).item() <= 0.01, name


def without_cancellation(hidden, weight, targets, index):
    """The sum of log(1 + Σ_other exp(z) / exp(z_target))."""
    logits = hidden @ weight.T
    others = logits.scatter(1, targets[:, None], -torch.inf).logsumexp(1)
    return torch.nn.functional.softplus(others - logits.gather(1, targets[:, None])[:, 0], threshold=1e9).sum()


def in_place(logits, targets, dtype, **options):
    """cross_entropy_pass over ``logits`` [n, V] fp32; dz and the losses."""
    rows, vocab = logits.shape
    workspace = torch.full((rows, -(-vocab // 32) * 32), float("nan"), device=DEVICE)
    workspace[:, :vocab] = logits
    gradient = workspace.view(dtype)[:, :vocab]
    losses, lse = (torch.empty(rows, device=DEVICE) for _ in range(2))
    correct = torch.empty(rows, dtype=torch.bool, device=DEVICE)
    arguments = {"ignore_index": -100, "softcap": None, "want_gradient": True} | options
    cross_entropy_pass(workspace[:, :vocab], gradient, targets, losses, lse, correct, **arguments)
    return gradient, losses


@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_logits_stay_finite(dtype):
    hidden = torch.tensor([[100.0], [-100.0], [0.0]], dtype=dtype, device=DEVICE, requires_grad=True)
    weight = torch.tensor([[100.0], [-100.0], [0.0]], dtype=dtype, device=DEVICE, requires_grad=True)
    targets = torch.tensor([0, 0, 2], device=DEVICE)
    loss, stats = triton(hidden, weight, targets, reduction="none", return_stats=True)
    loss.sum().backward()
    torch.testing.assert_close(loss.detach().cpu(), torch.tensor([0.0, 20000.0, 1.0986123]))
    torch.testing.assert_close(stats.lse.cpu(), torch.tensor([10000.0, 10000.0, 1.0986123]))
    assert stats.correct.tolist() == [True, False, True]
    expected = torch.tensor([[0.0], [-200.0], [0.0]], dtype=dtype, device=DEVICE)
    torch.testing.assert_close(hidden.grad, expected)
    assert weight.grad.isfinite().all()


def test_fp16_gradients_do_not_overflow_where_they_are_scaled():
    """dz of -1 and 1, stored as -2^15 and 2^15, and their sums: 33 rows at one column."""
    hidden = torch.full((33, 1), 60.0, dtype=torch.float16, device=DEVICE)
    weight = torch.tensor([[60.0], [-60.0]], dtype=torch.float16, device=DEVICE)
    wrong = torch.ones(33, dtype=torch.int64, device=DEVICE)
    loss, grad_hidden, grad_weight = run(triton, hidden, weight, wrong, None, reduction="sum")
    assert loss == 33 * 7200  # of which run() takes half
    assert (grad_hidden == 60).all() and grad_weight.flatten().tolist() == [33 * 30, -33 * 30]


def test_small_probabilities_keep_their_bits_in_fp16():
    """All others have 1e-7 each, where fp16 has steps of 6e-8."""
    logits = torch.zeros(2, 3000, device=DEVICE)
    logits[:, 7] = 16.0
    targets = torch.full((2,), 7, device=DEVICE)
    dz, _ = in_place(logits, targets, torch.float16)
    p = 1 / (2999 + torch.tensor(16.0, dtype=torch.float64).exp())
    others = torch.arange(3000, device=DEVICE) != 7
    error = (dz[:, others].double() / 2**15 / p - 1).abs().max()
    assert error <= torch.finfo(torch.float16).eps
    assert ((dz[:, 7].double() / 2**15 / (-2999 * p) - 1).abs() <= torch.finfo(torch.float16).eps).all()


def test_stats_and_ties():
    hidden, weight, targets, index = example(300)
    logits = hidden[index] @ weight.T
    targets[1] = logits[1].argmax()
    weight[targets[1] - 1 if targets[1] else 1] = weight[targets[1]]  # a tie: no logit is larger
    logits = hidden[index] @ weight.T
    loss, stats = triton(hidden.requires_grad_(), weight, targets, index, return_stats=True)
    valid = targets != -100
    torch.testing.assert_close(stats.lse[valid], logits.logsumexp(1)[valid])
    picked = logits.gather(1, targets.clamp_min(0)[:, None])[:, 0]
    assert torch.equal(stats.correct, (logits.amax(1) == picked) & valid) and stats.correct[1]
    assert (stats.lse[~valid] == 0).all() and int(stats.count) == int(valid.sum())
    assert not stats.lse.requires_grad and loss.requires_grad


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("case", ["all ignored", "empty index", "no tokens"])
def test_nothing_to_score(reduction, case):
    hidden, weight, targets, index = example(dtype=torch.bfloat16)
    if case == "all ignored":
        targets = torch.full_like(targets, -100)
    elif case == "empty index":
        targets, index = targets[:0], index[:0]
    else:
        hidden, targets, index = hidden[:0], targets[:0], None
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss, stats = triton(hidden, weight, targets, index, reduction=reduction, return_stats=True)
    loss.sum().backward()
    assert (loss == 0).all() and int(stats.count) == 0 and (stats.lse == 0).all() and not stats.correct.any()
    assert (hidden.grad == 0).all() and (weight.grad == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_ignored_rows_are_not_read(dtype):
    hidden, weight, targets, index = example(dtype=dtype)
    expected = run(triton, hidden, weight, targets, index)
    hidden[index[targets == -100]] = float("nan")
    for a, b in zip(run(triton, hidden, weight, targets, index), expected, strict=True):
        assert torch.equal(a, b)


def test_other_ignore_indices():
    hidden, weight, targets, index = example(dtype=torch.bfloat16)
    expected = run(triton, hidden, weight, targets, index)
    for other in (0, 5, 2**40):
        moved = targets.where(targets != other, 1)  # nothing else is ignored
        moved = moved.where(targets != -100, other)
        same = targets.where(targets != other, 1)
        expected = run(triton, hidden, weight, same, index)
        got = run(triton, hidden, weight, moved, index, ignore_index=other)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize(("dtype", "softcap"), [(torch.float32, 3.0), (torch.bfloat16, None), (torch.float16, 3.0)])
def test_chunk_size_changes_nothing(dtype, softcap):
    inputs = example(dtype=dtype)
    whole = run(triton, *inputs, softcap=softcap)
    row = 288 * 4 + (0 if dtype == torch.float32 else WIDTH * 4)  # the interpreter upcasts
    for budget in (row, 4 * row + 5):
        parts = run(triton, *inputs, softcap=softcap, workspace_bytes=budget)
        for a, b in zip(parts, whole, strict=True):
            torch.testing.assert_close(a, b, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_runs_and_backwards_are_bit_identical(reduction):
    inputs = example(4100, torch.bfloat16)
    first, second = (run(triton, *inputs, reduction=reduction) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    hidden, weight = (x.clone().requires_grad_() for x in inputs[:2])
    loss = triton(hidden, weight, *inputs[2:], reduction=reduction).sum()
    grads = [torch.autograd.grad(loss, (hidden, weight), retain_graph=True) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_normalizer_joins_micro_batches():
    hidden, weight, targets, index = example()
    count = (targets != -100).sum()
    whole = run(triton, hidden, weight, targets, index)
    parts = [
        run(triton, hidden, weight, targets[part], index[part], normalizer=count)
        for part in (slice(0, 5), slice(5, ROWS))
    ]
    for i, expected in enumerate(whole):
        torch.testing.assert_close(parts[0][i] + parts[1][i], expected, rtol=1e-5, atol=1e-7)
    hidden.requires_grad_()
    loss = triton(hidden, weight, targets, index, normalizer=0)
    loss.backward()
    assert loss == 0 and (hidden.grad == 0).all()


@pytest.mark.parametrize(("scale", "spread"), [(100.0, 0.5), (1e-7, 1000.0)])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_the_gradient_from_above_keeps_its_bits_in_fp16(reduction, scale, spread):
    """100 times 2^15 is beyond fp16, and 1e-7 has one bit there, but gradients of 1000 times that have eleven."""
    hidden, weight, targets, index = example(dtype=torch.float16, ignored=False, spread=spread)
    ours, exact = (
        [x.detach().to(t).requires_grad_() for x in (hidden, weight)] for t in (torch.float16, torch.float64)
    )
    for function, leaves in ((triton, ours), (ref.linear_cross_entropy, exact)):
        (function(*leaves, targets, index, reduction=reduction) * scale).sum().backward()
    for ours_leaf, exact_leaf in zip(ours, exact, strict=True):
        step = 2.0**-24  # of fp16 near 0
        error = (ours_leaf.grad.double() - exact_leaf.grad).norm()
        assert error <= 1e-3 * exact_leaf.grad.norm() + step * exact_leaf.numel() ** 0.5


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_mixed_dtypes_are_multiplied_in_fp32(dtypes):
    hidden, weight, targets, index = example()
    hidden, weight = (x.to(dtype) for x, dtype in zip((hidden, weight), dtypes, strict=True))
    assert operand_dtype(hidden, weight) == torch.float32
    ours = run(triton, hidden, weight, targets, index)
    truth = run(ref.linear_cross_entropy, hidden.double(), weight.double(), targets, index)
    assert [x.dtype for x in ours[1:]] == list(dtypes)
    for value, exact in zip(ours, truth, strict=True):
        assert relative_error(value, exact) <= (0.004 if value.dtype == torch.bfloat16 else FLOOR)


def test_layouts_change_nothing():
    hidden, weight, targets, index = example(dtype=torch.bfloat16)
    expected = run(triton, hidden, weight, targets, index)
    spaced = torch.stack([targets, targets.flip(0)], 1).flatten()[::2]
    views = (hidden.T.contiguous().T, torch.cat([weight, weight], 1)[:, :WIDTH], spaced, index)
    leaves = [x.detach().requires_grad_() for x in views[:2]]
    loss = triton(*leaves, spaced, index)
    (loss * 0.5).backward()
    for a, b in zip((loss, *(x.grad for x in leaves)), expected, strict=True):
        assert torch.equal(a, b)


def test_rows_beyond_2_31_elements():
    """The third row begins 2^31 fp32 elements behind the first; 32 bits would land 2^31 elements before it.

    The memory is reserved, there as well, and hardly touched.
    """
    vocab, rows, stride, before = 70, 3, 2**30, 2**31
    try:
        memory = torch.empty(before + (rows - 1) * stride + vocab, device=DEVICE)
    except RuntimeError:
        pytest.skip("16 GB of address space cannot be reserved")
    logits = memory.as_strided((rows, vocab), (stride, 1), before)
    gradient = memory.view(torch.bfloat16).as_strided((rows, vocab), (2 * stride, 1), 2 * before)
    values = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    targets = torch.tensor([3, -100, 69], device=DEVICE)
    expected, expected_losses = in_place(values, targets, torch.bfloat16)
    logits.copy_(values)
    losses, lse = torch.empty(rows, device=DEVICE), torch.empty(rows, device=DEVICE)
    correct = torch.empty(rows, dtype=torch.bool, device=DEVICE)
    options = {"ignore_index": -100, "softcap": None, "want_gradient": True}
    cross_entropy_pass(logits, gradient, targets, losses, lse, correct, **options)
    assert torch.equal(gradient, expected) and torch.equal(losses, expected_losses)
