"""linear_cross_entropy against the float64 statement in kernels/reference.py; its memory bound and repeatability."""

import sys

import pytest
import torch

from bivec.kernels import linear_cross_entropy
from bivec.kernels import reference as ref
from bivec.kernels.linear_cross_entropy_torch import chunking

T, D, V, N = 37, 29, 211, 23  # multiples of nothing
FLOOR = 1e-6  # fp32 rounding of a sum of a few hundred terms, relative


def relative_error(value, truth):
    return ((value.double() - truth).norm() / truth.norm().clamp_min(1e-300)).item()


def example(dtype=torch.float32, selected=True, ignored=True, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(T, D, generator=g).to(dtype).requires_grad_()
    weight = (0.5 * torch.randn(V, D, generator=g)).to(dtype).requires_grad_()
    index = torch.randperm(T, generator=g)[:N] if selected else None
    targets = torch.randint(0, V, (N if selected else T,), generator=g)
    if ignored:
        targets[::4] = -100
    return hidden, weight, targets, index


def run(function, hidden, weight, targets, index, **options):
    hidden, weight = (x.detach().clone().requires_grad_() for x in (hidden, weight))
    loss = function(hidden, weight, targets, index, **options)
    weights = torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype).reshape(loss.shape)
    (loss * weights).sum().backward()
    return loss.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("selected", [True, False])
def test_matches_float64(dtype, reduction, softcap, selected):
    hidden, weight, targets, index = example(dtype, selected)
    options = {"reduction": reduction, "softcap": softcap}
    truth = run(ref.linear_cross_entropy, hidden.double(), weight.double(), targets, index, **options)
    plain = run(ref.linear_cross_entropy, hidden, weight, targets, index, **options)
    ours = run(linear_cross_entropy, hidden, weight, targets, index, workspace_bytes=40 * V * 4, **options)
    assert ours[0].dtype == torch.float32 and ours[1].dtype == ours[2].dtype == dtype
    for name, value, same_dtype, exact in zip(("loss", "hidden", "weight"), ours, plain, truth, strict=True):
        assert relative_error(value, exact) <= 2 * relative_error(same_dtype, exact) + FLOOR, name


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("workspace_bytes", [None, 5 * 13 * 8])
def test_gradcheck(reduction, softcap, workspace_bytes):
    g = torch.Generator().manual_seed(1)
    hidden, weight = (torch.randn(n, 4, dtype=torch.float64, generator=g).requires_grad_() for n in (9, 13))
    targets, index = torch.tensor([3, 12, -100, 0, 7, 7]), torch.tensor([8, 0, 3, 2, 5, 4])
    options = {"reduction": reduction, "softcap": softcap, "workspace_bytes": workspace_bytes}
    torch.autograd.gradcheck(lambda h, w: linear_cross_entropy(h, w, targets, index, **options), (hidden, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_chunk_size_changes_nothing(dtype, softcap):
    inputs = example(dtype)
    whole = run(linear_cross_entropy, *inputs, softcap=softcap)
    row = V * 4 * (1 if softcap is None else 2) + (0 if dtype == torch.float32 else D * 4)
    for budget in (row, 3 * row, 7 * row + 5):
        parts = run(linear_cross_entropy, *inputs, softcap=softcap, workspace_bytes=budget)
        for a, b in zip(parts, whole, strict=True):
            # one unit in the last place of the dtype: the order of fp32 sums may tip a bf16 rounding
            torch.testing.assert_close(a, b, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_mixed_dtypes_are_multiplied_in_fp32(dtypes):
    hidden, weight, targets, index = example()
    hidden, weight = (x.detach().to(dtype) for x, dtype in zip((hidden, weight), dtypes, strict=True))
    ours = run(linear_cross_entropy, hidden, weight, targets, index)
    truth = run(ref.linear_cross_entropy, hidden.double(), weight.double(), targets, index)
    assert [x.dtype for x in ours[1:]] == list(dtypes)
    for value, exact in zip(ours, truth, strict=True):
        assert relative_error(value, exact) <= (0.004 if value.dtype == torch.bfloat16 else FLOOR)


def test_stats_come_from_the_same_pass():
    hidden, weight, targets, index = example()
    logits = (hidden[index] @ weight.T).detach()
    targets[1] = logits[1].argmax()
    loss, stats = linear_cross_entropy(hidden, weight, targets, index, return_stats=True)
    valid = targets != -100
    torch.testing.assert_close(stats.lse[valid], logits.logsumexp(1)[valid])
    assert torch.equal(stats.correct, (logits.argmax(1) == targets) & valid) and stats.correct[1]
    assert (stats.lse[~valid] == 0).all() and int(stats.count) == int(valid.sum())
    assert not stats.lse.requires_grad and loss.requires_grad


def test_a_reduction_is_known_by_its_letters():
    """Not by the object that a literal makes."""
    for reduction in ("none", "mean", "sum"):
        made = "".join(list(reduction))
        for a, b in zip(
            run(linear_cross_entropy, *example(), reduction=made),
            run(linear_cross_entropy, *example(), reduction=reduction),
            strict=True,
        ):
            assert torch.equal(a, b)


def test_the_backend_that_is_asked_for_runs(monkeypatch):
    module = sys.modules[linear_cross_entropy.__module__]
    monkeypatch.setattr(module, "resolve", lambda asked, *_: asked)
    monkeypatch.setattr(module, "_triton", lambda *_: ("by triton", None, None))
    assert linear_cross_entropy(*example(), backend="".join(list("triton"))) == "by triton"  # not that very object
    assert linear_cross_entropy(*example(), backend="torch").dim() == 0


def test_extreme_logits_stay_finite():
    hidden = torch.tensor([[300.0], [-300.0], [0.0]], requires_grad=True)
    weight = torch.tensor([[3.0], [-3.0], [0.0]], requires_grad=True)
    targets = torch.tensor([0, 0, 2])
    loss, stats = linear_cross_entropy(hidden, weight, targets, reduction="none", return_stats=True)
    loss.sum().backward()
    torch.testing.assert_close(loss.detach(), torch.tensor([0.0, 1800.0, 1.0986123]))
    assert torch.isfinite(hidden.grad).all() and stats.correct.tolist() == [True, False, True]


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("case", ["all ignored", "empty index", "no tokens"])
def test_nothing_to_score(reduction, case):
    hidden, weight, targets, index = example()
    if case == "all ignored":
        targets = torch.full_like(targets, -100)
    elif case == "empty index":
        targets, index = targets[:0], index[:0]
    else:
        hidden, targets, index = hidden[:0].detach().requires_grad_(), targets[:0], None
    hidden.retain_grad()
    loss, stats = linear_cross_entropy(hidden, weight, targets, index, reduction=reduction, return_stats=True)
    loss.sum().backward()
    assert (loss == 0).all() and int(stats.count) == 0
    assert (hidden.grad == 0).all() and (weight.grad == 0).all()


def test_ignored_rows_are_not_read():
    hidden, weight, targets, index = example()
    with torch.no_grad():
        hidden[index[targets == -100]] = float("nan")
    loss, grad_hidden, grad_weight = run(linear_cross_entropy, hidden, weight, targets, index)
    assert torch.isfinite(loss) and torch.isfinite(grad_hidden).all() and torch.isfinite(grad_weight).all()


def test_normalizer_joins_micro_batches():
    hidden, weight, targets, index = example()
    count = (targets != -100).sum()
    whole = run(linear_cross_entropy, hidden, weight, targets, index)
    parts = [
        run(linear_cross_entropy, hidden, weight, targets[part], index[part], normalizer=count)
        for part in (slice(0, 9), slice(9, N))
    ]
    for i, expected in enumerate(whole):
        torch.testing.assert_close(parts[0][i] + parts[1][i], expected, rtol=1e-5, atol=1e-7)
    loss = linear_cross_entropy(hidden, weight, targets, index, normalizer=torch.tensor(0))
    loss.backward()
    assert loss == 0 and (hidden.grad == 0).all()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_each_gradient_only_where_wanted(reduction):
    hidden, weight, targets, index = example()
    _, grad_hidden, grad_weight = run(linear_cross_entropy, hidden, weight, targets, index, reduction=reduction)
    scale = torch.linspace(0.5, 1.5, N) if reduction == "none" else 0.5  # the weights of run()
    for frozen, trained, expected in ((weight, hidden, grad_hidden), (hidden, weight, grad_weight)):
        hidden.grad = weight.grad = None
        frozen.requires_grad_(False)
        (linear_cross_entropy(hidden, weight, targets, index, reduction=reduction) * scale).sum().backward()
        assert frozen.grad is None
        torch.testing.assert_close(trained.grad, expected)
        frozen.requires_grad_(True)
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, weight, targets, index).requires_grad


def test_backward_twice_and_repeated_runs_are_bit_identical():
    hidden, weight, targets, index = example()
    first, second = (run(linear_cross_entropy, hidden, weight, targets, index) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    loss = linear_cross_entropy(hidden, weight, targets, index)
    grads = [torch.autograd.grad(loss, (hidden, weight), retain_graph=True) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_autocast_does_not_lower_the_precision():
    inputs = example()
    expected = run(linear_cross_entropy, *inputs, reduction="none")
    with torch.autocast("cpu", torch.bfloat16):
        inside = run(linear_cross_entropy, *inputs, reduction="none")
    assert all(torch.equal(a, b) for a, b in zip(inside, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_stays_within_the_workspace(dtype, peak_bytes):
    rows, width, vocab, budget = 500, 16, 4001, 2**18
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, width, generator=g).to(dtype).requires_grad_()
    weight = torch.randn(vocab, width, generator=g).to(dtype)
    targets = torch.randint(0, vocab, (rows,), generator=g)

    def step():
        loss = linear_cross_entropy(hidden, weight, targets, workspace_bytes=budget)
        loss.backward()
        return loss

    gradients = 3 * rows * width * 4  # the row gradients kept for backward, their product with the scale, hidden.grad
    vectors = 12 * rows * 8  # targets, losses, LSE, masks
    assert peak_bytes(step) <= budget + gradients + vectors < rows * vocab * 4 / 8


@pytest.mark.parametrize(
    ("softcap", "reduction", "trained"), [(3.0, "mean", False), (None, "none", False), (None, "sum", True)]
)
def test_memory_with_options_stays_within_the_workspace(softcap, reduction, trained, peak_bytes):
    rows, width, vocab, budget = 1000, 2, 4001, 2**18
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, width, generator=g).requires_grad_()
    weight = torch.randn(vocab, width, generator=g).requires_grad_(trained)
    targets = torch.randint(0, vocab, (rows,), generator=g)

    def step():
        options = {"softcap": softcap, "reduction": reduction, "workspace_bytes": budget}
        loss = linear_cross_entropy(hidden, weight, targets, **options).sum()
        loss.backward()
        return loss

    gradients = (3 * rows + 2 * trained * vocab) * width * 4  # saved, and returned
    limit = budget + gradients + 12 * rows * 8
    assert peak_bytes(step) <= limit < min(2 * budget, rows * vocab * 4 / 8)


def test_the_workspace_by_default():
    """What the docstring says: 128 MiB of logits, 256 on an accelerator, never less than one row; even chunks."""
    row = 2**20

    def rows(device, budget=None, row_bytes=row, tile_row_bytes=0, num_rows=1000):
        sizes = {"row_bytes": row_bytes, "tile_row_bytes": tile_row_bytes, "workspace_bytes": budget}
        return chunking(V, num_rows, **sizes, device=torch.device(device))

    assert rows("cpu") == (125, V) and rows("cuda") == (250, V)  # of at most 128 and 256: eight and four equal chunks
    for device, fitting in (("cpu", 128), ("cuda", 256)):
        assert rows(device, num_rows=fitting) == (fitting, V)
        assert rows(device, num_rows=fitting + 1) == (fitting // 2 + 1, V)
    assert rows("cpu", row_bytes=2**28) == (1, V) and rows("cpu", num_rows=0) == (1, V)
    assert rows("cpu", 7 * row, num_rows=8) == (4, V)  # not seven and one
    # a quarter of the budget for the upcast tile, of at least one row of the weight
    assert rows("cpu", 8 * row, tile_row_bytes=row // 4) == (6, 8)
    assert rows("cpu", 2 * row, tile_row_bytes=row) == (1, 1)
    with pytest.raises(ValueError, match=f"at least {2 * row} bytes"):
        rows("cpu", 2 * row - 1, tile_row_bytes=row)


@pytest.mark.parametrize("vocab", [32000, 49152, 50257, 128256, 151936])
def test_vocabularies_of_real_models(vocab):
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(7, 8, generator=g), torch.randn(vocab, 8, generator=g)
    targets = torch.tensor([0, vocab - 1, vocab // 2, -100, 1, 31999, 5])
    truth = run(ref.linear_cross_entropy, hidden.double(), weight.double(), targets, None)
    plain = run(ref.linear_cross_entropy, hidden, weight, targets, None)
    ours = run(linear_cross_entropy, hidden, weight, targets, None, workspace_bytes=3 * vocab * 4)
    for name, value, same_dtype, exact in zip(("loss", "hidden", "weight"), ours, plain, truth, strict=True):
        assert relative_error(value, exact) <= 2 * relative_error(same_dtype, exact) + FLOOR, name


BAD = {
    "share D": lambda h, w, t, i: (h[:, :-1], w, t, i),
    "floating point": lambda h, w, t, i: (h.long(), w, t, i),
    "one per entry of index": lambda h, w, t, i: (h, w, t[:-1], i),
    r"targets must be \[23\] int64, one": lambda h, w, t, i: (h, w, t.repeat(2), i),
    r"share D; .* \(211, 29, 1\)": lambda h, w, t, i: (h, w[..., None], t, i),
    "one per row of hidden": lambda h, w, t, i: (h, w, t, None),
    r"index must be \[N\] int64": lambda h, w, t, i: (h, w, t, i.int()),
    "must not repeat": lambda h, w, t, i: (h, w, t, i.where(i != i[0], i[1])),
    r"targets must lie in \[0, 211\)": lambda h, w, t, i: (h, w, t + V, i),
    r"row numbers in \[0, 37\)": lambda h, w, t, i: (h, w, t, i + T),
    r"found -1 … ": lambda h, w, t, i: (h, w, t.index_fill(0, i[:1] % N, -1), i),
    r"row numbers in .*found -1 … ": lambda h, w, t, i: (h, w, t, i.where(i != i[0], -1)),
    r"found .* … 211$": lambda h, w, t, i: (h, w, t.index_fill(0, i[:1] % N, V), i),
    "weight is on meta, hidden on cpu": lambda h, w, t, i: (h, w.to("meta"), t, i),
    "targets is on meta, hidden on cpu": lambda h, w, t, i: (h, w, t.to("meta"), i),
    "index is on meta, hidden on cpu": lambda h, w, t, i: (h, w, t, i.to("meta")),
    r"share D; got \(37,\)": lambda h, w, t, i: (h[:, 0], w, t, i),
    r"share D; .* \(211,\)": lambda h, w, t, i: (h, w[:, 0], t, i),
    "and weight must be floating point": lambda h, w, t, i: (h, w.long(), t, i),
    r"targets must be \[23\] int64": lambda h, w, t, i: (h, w, t.int(), i),
    r"index must be \[N\] int64; got \(23, 1\)": lambda h, w, t, i: (h, w, t, i[:, None]),
}


def test_hidden_states_of_a_padded_batch_are_refused():
    with pytest.raises(ValueError, match=r"hidden \[T, D\] and weight \[V, D\] must share D; got \(2, 4, 4\)"):
        linear_cross_entropy(torch.ones(2, 4, 4), torch.ones(5, 4), torch.zeros(2, dtype=torch.long))


@pytest.mark.parametrize("index", [None, torch.tensor([1])])
def test_one_row_alone(index):
    """The smallest target and row are the largest ones too."""
    hidden, weight, targets = torch.randn(1 if index is None else 3, 4), torch.randn(5, 4), torch.tensor([2])
    rows = hidden if index is None else hidden[index]
    expected = torch.nn.functional.cross_entropy(rows @ weight.T, targets)
    torch.testing.assert_close(linear_cross_entropy(hidden, weight, targets, index), expected)


def test_any_number_can_be_ignored():
    hidden, weight, targets = torch.randn(4, 4), torch.randn(5, 4), torch.tensor([1, 3, 0, 4])
    expected = torch.nn.functional.cross_entropy(hidden @ weight.T, targets, ignore_index=3)
    torch.testing.assert_close(linear_cross_entropy(hidden, weight, targets, ignore_index=3), expected)


def test_targets_of_minus_100_are_ignored():
    """As torch.nn.functional.cross_entropy ignores them."""
    hidden, weight = torch.randn(3, 4), torch.randn(5, 4)
    targets = torch.tensor([1, -100, 4])
    expected = torch.nn.functional.cross_entropy(hidden @ weight.T, targets)
    torch.testing.assert_close(linear_cross_entropy(hidden, weight, targets), expected)


@pytest.mark.parametrize("message", BAD)
def test_bad_tensors_are_refused(message):
    inputs = BAD[message](*(x if x is None else x.detach() for x in example(ignored=False)))
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(*inputs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction": "median"}, "reduction must be"),
        ({"softcap": 0.0}, "softcap must be"),
        ({"softcap": -1.0}, "softcap must be"),
        ({"softcap": float("inf")}, "softcap must be"),
        ({"softcap": float("nan")}, "softcap must be"),
        ({"workspace_bytes": 0}, "at least 844 bytes"),
        ({"normalizer": 3, "reduction": "sum"}, "normalizer needs"),
        ({"normalizer": torch.ones(2)}, "normalizer must hold one number"),
        ({"workspace_bytes": V * 4 - 1}, "at least 844 bytes"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(*example(), **options)
