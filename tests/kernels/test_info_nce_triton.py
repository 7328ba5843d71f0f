"""info_nce's Triton backend against float64, beside plain torch, the torch backend and an all-bf16 implementation."""

from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton")

from bivec.kernels import info_nce as public_info_nce
from bivec.kernels import info_nce_kernels
from bivec.kernels import reference as ref
from bivec.kernels.backend import BackendError
from bivec.kernels.info_nce_kernels import Columns, Rows, project_rows, score_rows
from bivec.kernels.info_nce_plan import Options
from bivec.kernels.info_nce_triton import info_nce_op, info_nce_pass
from bivec.kernels.tuning import Config, overriding

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FLOOR = 2e-6  # fp32 rounding of logits up to 20, seen through exp, relative
SIZES = (6, 9, 4, 3, 24)  # B, N, M, K, D
SMALL_BLOCKS = {  # several blocks a row: the rows of these tests fit one block of the tables
    "info_nce_scores": Config({"BLOCK_N": 16}, 1, 1),
    "info_nce_project": Config({"BLOCK_D": 16}, 1, 1),
}
CHOICES = {  # one or more settings of every option
    "targets": {"targets": True},
    "shared": {"hard": "shared"},
    "own": {"hard": "own"},
    "hard ids": {"hard_negative_ids": True, "query_ids": True},
    "query-query": {"include_query_query": True},
    "ids": {"query_ids": True, "candidate_ids": True},
    "margin": {"margin": 0.05},
    "dot products": {"normalize": False, "scale": 0.2},
    "symmetric": {"symmetric": True},
    "matryoshka": {"matryoshka_dims": [17, 5], "matryoshka_weights": [1.0, 2.0]},
    "none": {"reduction": "none"},
    "sum": {"reduction": "sum"},
}
REFUSED = {("targets", "symmetric")}
PAIRS = [pair for pair in combinations(CHOICES, 2) if pair not in REFUSED]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def info_nce(*args, **options):
    return public_info_nce(*args, backend="triton", **options)


def example(options, dtype=torch.float32, sizes=SIZES, seed=0):
    """Returns (differentiable tensors, keyword arguments); the losses are neither solved nor hopeless."""
    options, g = dict(options), torch.Generator().manual_seed(seed)
    B, N, M, K, D = sizes
    num, hard = B if options.get("symmetric") else N, options.pop("hard", None)
    if options.get("hard_negative_ids") and hard is None:
        hard = "own"
    tensors = {
        "queries": torch.randn(B, D, generator=g) * 3,
        "candidates": torch.randn(num, D, generator=g) / 2,
        "scale": torch.tensor(options.pop("scale", 20.0), device=DEVICE),
    }
    tensors["candidates"][:B] += 0.08 * tensors["queries"]
    if hard is not None:
        tensors["hard_negatives"] = torch.randn(*((M,) if hard == "shared" else (B, K)), D, generator=g)
    for name, x in tensors.items():
        tensors[name] = x if name == "scale" else x.to(DEVICE, dtype)
    ids = {"query_ids": (B,), "candidate_ids": (num,), "hard_negative_ids": (M,) if hard == "shared" else (B, K)}
    for name, shape in ids.items():  # few identities: duplicates among queries, positives and negatives
        if options.get(name):
            options[name] = torch.randint(0, 6, shape, generator=g).to(DEVICE)
    if options.get("query_ids") is not None and not {"candidate_ids", "hard_negative_ids"} & set(options):
        options.pop("query_ids")
    if options.get("targets"):
        options["targets"] = torch.randint(0, num, (B,), generator=g).to(DEVICE)
    return tensors, options


def run(function, tensors, options, dtype=None):
    tensors = {name: (x if dtype is None else x.to(dtype)).detach().requires_grad_() for name, x in tensors.items()}
    loss = function(**tensors, **options)
    weights = torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype, device=loss.device).reshape(loss.shape)
    (loss * weights).sum().backward()
    return {"loss": loss.detach()} | {name: x.grad for name, x in tensors.items()}


def relative_error(value, truth):
    return ((value.double() - truth).norm() / truth.norm().clamp_min(1e-300)).item()


def check(tensors, options, floor=FLOOR, **ours_only):
    """At most twice plain torch's error in the dtype, and at most 1 %."""
    truth = run(ref.info_nce, tensors, options, torch.float64)
    plain = run(ref.info_nce, tensors, options)
    ours = run(info_nce, tensors, options | ours_only)
    assert ours["loss"].dtype == torch.float32
    for name, value in ours.items():
        assert name == "loss" or value.dtype == tensors[name].dtype
        error = relative_error(value, truth[name])
        assert error <= 2 * relative_error(plain[name], truth[name]) + floor, name
        assert error <= 0.01, name
    return ours


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CHOICES)
def test_matches_float64(name, dtype):
    """Several blocks a row and several chunks."""
    with overriding(SMALL_BLOCKS):
        check(*example(CHOICES[name], dtype, (5, 35, 19, 3, 24)), workspace_bytes=6000)


@pytest.mark.parametrize("pair", PAIRS, ids=", ".join)
def test_options_in_pairs(pair):
    options = CHOICES[pair[0]] | CHOICES[pair[1]]
    if "query_ids" in options and "symmetric" in options:
        options = options | {"candidate_ids": True}
    check(*example(options, DTYPES[PAIRS.index(pair) % 3], (4, 6, 3, 2, 24)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_all_options_together(dtype, reduction):
    options = {"hard": "own", "include_query_query": True, "margin": 0.1, "symmetric": True, "reduction": reduction}
    options |= CHOICES["ids"] | CHOICES["hard ids"] | CHOICES["matryoshka"]
    with overriding(SMALL_BLOCKS):
        check(*example(options, dtype), workspace_bytes=8000)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_parity_of_the_backends(reduction):
    """Stats included; a margin that no similarity is near."""
    tensors, options = example({"hard": "own", "include_query_query": True, "margin": 0.1} | CHOICES["ids"])
    results = []
    for backend in ("torch", "triton"):
        stats = []

        def call(backend=backend, stats=stats, **arguments):
            loss, found = public_info_nce(**arguments, return_stats=True, backend=backend)
            stats.append(found)
            return loss

        results.append(run(call, tensors, options | {"reduction": reduction}) | {"stats": stats[0]})
    theirs, ours = results
    for name in (*tensors, "loss"):
        torch.testing.assert_close(ours[name], theirs[name], rtol=2e-5, atol=1e-6)
    for name in ("lse", "positive"):
        torch.testing.assert_close(getattr(ours["stats"], name), getattr(theirs["stats"], name), rtol=1e-6, atol=1e-5)
        assert not getattr(ours["stats"], name).requires_grad
    assert torch.equal(ours["stats"].correct, theirs["stats"].correct)
    assert torch.equal(ours["stats"].accuracy, theirs["stats"].accuracy)


def nearly_solved(size, width):
    g = torch.Generator().manual_seed(0)
    queries, noise = torch.randn(size, width, generator=g), torch.randn(size, width, generator=g)
    unit = F.normalize(queries, dim=1)
    tangent = F.normalize(noise - unit * (noise * unit).sum(1, keepdim=True), dim=1)
    return queries, 2 * (0.999 * unit + (1 - 0.999**2) ** 0.5 * tangent)


def all_bf16(queries, candidates, scale, **_):
    """What is usual: unit vectors, their products and the softmax of them in bf16."""
    logits = F.normalize(queries, dim=1) @ F.normalize(candidates, dim=1).T * scale.to(queries.dtype)
    return F.cross_entropy(logits, torch.arange(len(queries), device=queries.device), reduction="sum")


@pytest.mark.parametrize("solved", [True, False], ids=["solved", "random"])
@pytest.mark.parametrize("scale", [1.0, 20.0, 50.0, 100.0])
def test_gradients_survive_saturation(solved, scale):
    g = torch.Generator().manual_seed(5)
    queries, candidates = nearly_solved(16, 96)
    if not solved:
        candidates = torch.randn(16, 96, generator=g)
    hard = torch.randn(16, 2, 96, generator=g)
    for dtype in (torch.float32, torch.bfloat16):
        tensors = {"queries": queries, "candidates": candidates, "hard_negatives": hard}
        tensors = {name: x.to(DEVICE, dtype) for name, x in tensors.items()}
        tensors["scale"] = torch.tensor(scale, device=DEVICE)
        # fp32 rounding of logits up to the scale, seen through exp
        check(tensors, {"reduction": "sum"}, floor=max(FLOOR, 1e-7 * scale))
        if dtype == torch.bfloat16:
            del tensors["hard_negatives"]
            truth = run(ref.info_nce, tensors, {"reduction": "sum"}, torch.float64)
            usual, ours = run(all_bf16, tensors, {}), run(info_nce, tensors, {"reduction": "sum"})
            for name in ("queries", "candidates"):
                mine, theirs = (relative_error(x[name], truth[name]) for x in (ours, usual))
                assert mine <= 0.01
                assert mine <= theirs / (10 if solved and scale > 1 else 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_chunk_size_changes_nothing_beyond_rounding(dtype):
    tensors, options = example({"hard": "own", "include_query_query": True} | CHOICES["ids"], dtype)
    whole = run(info_nce, tensors, options)
    with pytest.raises(ValueError, match="need at least") as error:
        info_nce(**tensors, **options, workspace_bytes=1)
    minimum = int(str(error.value).split("at least ")[1].split()[0])
    for budget in (minimum, 2 * minimum + 3):
        for name, value in run(info_nce, tensors, options | {"workspace_bytes": budget}).items():
            rtol = 2 * torch.finfo(value.dtype).eps if value.dtype in (torch.bfloat16, torch.float16) else 1e-5
            torch.testing.assert_close(value, whole[name], rtol=rtol, atol=1e-6)


def test_runs_and_backwards_are_bit_identical():
    options = {"symmetric": True, "include_query_query": True, "hard": "own", "matryoshka_dims": [24, 7]}
    tensors, options = example(options, torch.bfloat16)
    first, second = (run(info_nce, tensors, options) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    loss = info_nce(**leaves, **options)
    grads = [torch.autograd.grad(loss, tuple(leaves.values()), retain_graph=True) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_dtypes_may_differ():
    tensors, options = example({"hard": "shared"}, torch.float32)
    tensors["queries"], tensors["hard_negatives"] = tensors["queries"].bfloat16(), tensors["hard_negatives"].half()
    truth = run(ref.info_nce, tensors, options, torch.float64)
    for name, value in run(info_nce, tensors, options | {"workspace_bytes": 4000}).items():
        assert relative_error(value, truth[name]) <= (0.004 if value.dtype == torch.bfloat16 else 5e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts_change_nothing(dtype):
    """Transposed, every second column, an expanded query, expanded and spaced ids and targets."""
    tensors, options = example({"hard": "own", "targets": True} | CHOICES["ids"] | CHOICES["hard ids"], dtype)
    tensors["queries"] = tensors["queries"][:1].repeat(6, 1)
    options["query_ids"], options["reduction"] = options["query_ids"][:1].repeat(6), "none"
    spaced = torch.stack([options["targets"], options["targets"].flip(0)], 1)[:, 0]
    other = options | {"query_ids": options["query_ids"][:1].expand(6), "targets": spaced}
    other["hard_negative_ids"] = options["hard_negative_ids"].T.contiguous().T
    views = tensors | {
        "candidates": tensors["candidates"].T.contiguous().T,
        "hard_negatives": torch.stack([tensors["hard_negatives"]] * 2, -1)[..., 0],
        "queries": tensors["queries"][:1].expand(6, -1),
    }
    assert not any(views[name].is_contiguous() for name in ("candidates", "hard_negatives", "queries"))
    leaves = {name: x.detach().requires_grad_() for name, x in views.items()}
    loss = info_nce(**leaves, **other)
    assert not leaves["candidates"].is_contiguous()
    loss.backward(torch.ones((), device=DEVICE).expand(6))
    packed = {name: x.detach().contiguous().requires_grad_() for name, x in tensors.items()}
    expected = info_nce(**packed, **options)
    expected.sum().backward()
    torch.testing.assert_close(loss, expected)
    for name, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad, packed[name].grad, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize(("reduction", "hard"), [("mean", "own"), ("none", "shared")])
@pytest.mark.parametrize("wanted", ["queries", "candidates", "hard_negatives", "scale"])
def test_each_gradient_only_where_wanted(wanted, reduction, hard):
    tensors, options = example({"hard": hard, "include_query_query": True})
    expected = run(lambda **x: info_nce(**x, reduction="mean") * 2, tensors, options)  # run halves a scalar
    inputs = {name: x.detach().requires_grad_(name == wanted) for name, x in tensors.items()}
    info_nce(**inputs, **options, reduction=reduction).mean().backward()
    for name, x in inputs.items():
        if name == wanted:
            torch.testing.assert_close(x.grad, expected[name], rtol=1e-5, atol=1e-7)
        else:
            assert x.grad is None
    with torch.no_grad():
        assert not info_nce(**inputs, **options).requires_grad


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_a_query_without_negatives_has_loss_and_gradients_zero(reduction, dtype):
    one = {"queries": torch.ones(1, 4), "candidates": torch.eye(1, 4)}
    ids = torch.full((3,), 7, device=DEVICE)
    masked = {"queries": torch.randn(3, 4), "candidates": torch.randn(3, 4), "hard_negatives": torch.randn(3, 2, 4)}
    options = {"query_ids": ids, "candidate_ids": ids, "hard_negative_ids": ids[:, None].expand(3, 2)}
    none = one | {"hard_negatives": torch.zeros(1, 0, 4)}
    empty = {"queries": torch.zeros(0, 4), "candidates": torch.randn(3, 4), "hard_negatives": torch.zeros(0, 4)}
    nothing = {"queries": torch.zeros(0, 4), "candidates": torch.zeros(0, 4)}
    cases = ((one, {}), (one, {"include_query_query": True}), (masked, options), (none, {}), (empty, {}), (nothing, {}))
    for given, extra in cases:
        tensors = {name: x.to(DEVICE, dtype) for name, x in given.items()} | {"scale": torch.tensor(50.0).to(DEVICE)}
        for symmetric in (False, True) if len(tensors["queries"]) == len(tensors["candidates"]) else (False,):
            result = run(info_nce, tensors, extra | {"reduction": reduction, "symmetric": symmetric})
            assert all((value == 0).all() for value in result.values())


def test_duplicated_id_of_the_own_positive_is_masked_and_the_positive_is_not():
    queries = torch.eye(3, 4, device=DEVICE)
    candidates = torch.cat([queries, queries[:1]])  # row 3 is the positive of query 0 once more
    ids = torch.tensor([-(2**62), 11, 12], device=DEVICE)
    everyone = torch.cat([ids, ids[:1]])
    masked = info_nce(queries, candidates, query_ids=ids, candidate_ids=everyone, reduction="none")
    without = info_nce(queries, candidates[:3], reduction="none")
    torch.testing.assert_close(masked[0], without[0])
    assert masked[1] > without[1]  # the other queries still see it
    near = everyone + torch.tensor([0, 0, 0, 2**32], device=DEVICE)  # int32 would see the same
    assert info_nce(queries, candidates, query_ids=ids, candidate_ids=near, reduction="none")[0] > masked[0] + 0.1


def test_targets_repeat():
    tensors, options = example({}, torch.float32)
    check(tensors, options | {"targets": torch.full((6,), 4, device=DEVICE)})


@pytest.mark.parametrize("symmetric", [True, False])
def test_zero_vectors_have_cosine_zero_and_no_gradient(symmetric):
    g = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(4, 6, generator=g).to(DEVICE) for name in ("queries", "candidates")}
    tensors["queries"][1], tensors["candidates"][2] = 0.0, 1e-20
    tensors["scale"] = torch.tensor(20.0, device=DEVICE)
    result = run(info_nce, tensors, {"symmetric": symmetric, "include_query_query": True})
    assert all(torch.isfinite(value).all() for value in result.values())
    assert (result["queries"][1] == 0).all() and (result["candidates"][2] == 0).all()
    assert (result["queries"][0] != 0).any()
    losses = info_nce(tensors["queries"], tensors["candidates"], reduction="none")
    torch.testing.assert_close(losses[1], torch.tensor(4.0, device=DEVICE).log())


@pytest.mark.parametrize("size", [1e-9, 1e9])
def test_norms_do_not_matter(size):
    tensors, options = example({"hard": "shared"}, torch.bfloat16)
    for name in ("queries", "candidates", "hard_negatives"):
        tensors[name] = tensors[name] * size
    check(tensors, options)


def test_small_slopes_of_fp16_keep_their_bits():
    """p * scale of these queries is below 1e-8, and fp16 ends at 6e-8."""
    queries, candidates = (x.to(DEVICE, torch.float16) for x in nearly_solved(8, 96))
    tensors = {"queries": queries, "candidates": candidates, "scale": torch.tensor(30.0, device=DEVICE)}
    weighted = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    (info_nce(**weighted) * 2.0**34).backward()  # a loss scaler's, so that the results fit fp16
    wide = {name: x.double().detach().requires_grad_() for name, x in tensors.items()}
    (ref.info_nce(**wide) * 2.0**34).backward()
    for name in tensors:
        assert relative_error(weighted[name].grad, wide[name].grad) <= 0.002


@pytest.mark.skipif(DEVICE.type != "cpu", reason="counts the CPU's allocations")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("extra", [{}, {"margin": 0.2, "include_query_query": True}, {"symmetric": True}])
def test_memory_stays_within_the_workspace(dtype, extra, monkeypatch, peak_bytes):
    """Launches are counted instead of made: what is allocated is the same."""
    launched = []
    monkeypatch.setattr(info_nce_kernels, "launch", lambda kernel, *_, **__: launched.append(kernel))
    size, width, budget = 2000, 8, 2**19
    queries, candidates = (torch.randn(size, width).to(dtype).requires_grad_() for _ in range(2))

    def step():
        loss = info_nce(queries, candidates, workspace_bytes=budget, **extra)
        loss.backward()
        return loss

    gradients = 2 * size * width * (4 + dtype.itemsize)  # fp32 sums kept for backward, and the results
    vectors = 10 * size * 8  # targets, losses, LSE, positives, flags, norms
    assert peak_bytes(step) <= budget + gradients + vectors < size * size * 4 / 8
    assert len(launched) > 20


# --- inside torch -----------------------------------------------------------------------------------------------


ALL = {"hard": "own", "include_query_query": True, "margin": 0.1, "symmetric": True} | CHOICES["ids"]


def gradients(function, tensors):
    leaves = {name: x.detach().clone().requires_grad_() for name, x in tensors.items()}
    loss = function(leaves)
    loss.backward()
    return [loss.detach(), *(x.grad for x in leaves.values())]


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled_as_one_graph_and_checkpointed_it_is_the_same(reduction):
    torch._dynamo.reset()
    tensors, options = example(ALL, torch.bfloat16)

    def step(leaves):
        inputs = leaves | {"queries": leaves["queries"] * 2}
        return info_nce(**inputs, **options, reduction=reduction).sum() * 3

    expected = gradients(step, tensors)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for other in (compiled, lambda x: checkpoint(step, x, use_reentrant=False)):
        for a, b in zip(gradients(other, tensors), expected, strict=True):
            assert torch.equal(a, b)

    names, values = list(tensors), [x.detach().clone().requires_grad_() for x in tensors.values()]
    checkpoint(lambda *x: step(dict(zip(names, x, strict=True))), *values, use_reentrant=True).backward()
    assert all(torch.equal(a.grad, b) for a, b in zip(values, expected[1:], strict=True))


def test_compiled_with_other_batches_scales_margins_and_stats():
    torch._dynamo.reset()
    tensors, _ = example({})

    def step(queries, candidates, scale, margin):
        loss, stats = info_nce(queries, candidates, scale=scale, margin=margin, return_stats=True)
        return loss, stats.lse, stats.correct

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for batch, scale, margin in ((6, 20.0, 0.1), (5, 30.0, 0.2), (4, 41.0, 0.3)):
        inputs = (tensors["queries"][:batch], tensors["candidates"][:batch], scale, margin)
        assert all(torch.equal(a, b) for a, b in zip(compiled(*inputs), step(*inputs), strict=True))


def operator_arguments(tensors, options, reduction, wanted):
    names = ("queries", "candidates", "hard_negatives", "scale")
    vectors = [tensors[name].detach().requires_grad_() for name in names]
    ids = [options.get(name) for name in ("query_ids", "candidate_ids", "hard_negative_ids")]
    targets = torch.arange(len(vectors[0]), device=DEVICE)
    return *vectors, targets, *ids, None, True, True, 0.1, True, [24], [1.0], reduction, None, wanted


@pytest.mark.parametrize(("reduction", "wanted"), [("mean", [True] * 4), ("none", [False] * 4)], ids=["mean", "none"])
def test_opcheck(reduction, wanted):
    tensors, options = example(ALL, torch.bfloat16)
    arguments = operator_arguments(tensors, options, reduction, wanted)
    torch.library.opcheck(torch.ops.bivec.info_nce.default, arguments)
    real = info_nce_op(*arguments)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = info_nce_op(*(mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in arguments))
    for a, b in zip(real, fake, strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


def test_autocast_changes_nothing():
    tensors, options = example({"hard": "own", "reduction": "none"})
    expected = run(info_nce, tensors, options)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        inside = run(info_nce, tensors, options)
    assert all(torch.equal(inside[name], expected[name]) for name in expected)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_there_is_no_second_derivative(reduction):
    x = torch.randn(4, 8, device=DEVICE, requires_grad=True)
    loss = info_nce(x, x.detach().flip(1), reduction=reduction).square().sum()
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_value_is_read(reduction, monkeypatch):
    """Reading stalls a GPU, where torch is told to refuse it, and fails for tensors without values, on a CPU."""
    monkeypatch.delenv("BIVEC_CHECK", raising=False)
    tensors, options = example(ALL, torch.bfloat16)
    options["reduction"] = reduction
    if DEVICE.type == "cuda":
        leaves = {name: x.requires_grad_() for name, x in tensors.items()}
        info_nce(**leaves, **options).sum().backward()  # compiles and loads the kernels
        torch.cuda.set_sync_debug_mode("error")
        try:
            info_nce(**leaves, **options).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return
    tensors, options = (
        {name: x.to("meta") if isinstance(x, torch.Tensor) else x for name, x in group.items()}
        for group in (tensors, options)
    )
    loss = info_nce(**{name: x.requires_grad_() for name, x in tensors.items()}, **options)
    loss.sum().backward()
    assert loss.device.type == "meta" and tensors["scale"].grad.shape == ()


def test_float64_is_refused():
    x = torch.ones(3, 4, dtype=torch.float64, device=DEVICE)
    with pytest.raises(BackendError, match=r'info_nce: .*float64.*backend="torch"'):
        info_nce(x, x)
    with pytest.raises(BackendError, match=r"got hard_negatives of torch\.float64"):
        info_nce(x.float(), x.float(), hard_negatives=x)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"candidates": torch.zeros(9, 5, device=DEVICE)}, "must share D"),
        ({"hard_negatives": torch.zeros(5, 2, 4, device=DEVICE)}, "hard_negatives must be"),
        ({"scale": torch.ones(1, device=DEVICE)}, "0-dim"),
        ({"scale": float("inf")}, "scale must be finite"),
        ({"margin": float("nan")}, "margin must be finite"),
        ({"query_ids": torch.zeros(3, device=DEVICE).long()}, "query_ids mask nothing"),
        ({"workspace_bytes": 60}, "cannot hold the logits of one query; .*need at least"),
    ],
)
def test_bad_input_is_refused(change, message):
    ones = {"queries": torch.ones(3, 4, device=DEVICE), "candidates": torch.ones(9, 4, device=DEVICE)}
    with pytest.raises(ValueError, match=message):
        info_nce(**(ones | change))


@pytest.mark.parametrize("target", [-1, 3, 2**40])
def test_a_target_nobody_checked_makes_the_loss_nan_and_reads_nothing(target):
    x = torch.eye(3, 4, device=DEVICE)
    targets = torch.tensor([0, target, 2], device=DEVICE)
    options = Options(targets, None, None, None, True, False, None, False, (4,), (1.0,), "none", None)
    losses = info_nce_pass(x, x, None, torch.tensor(20.0, device=DEVICE), options, [False] * 4)[0]
    assert losses.isnan().tolist() == [False, True, False]


def test_offsets_beyond_2_31_elements():
    """The second row of the workspace, of its slopes and of the vectors lies there; hardly any memory is touched."""
    before, stride = 2**31, 2**31 - 16
    try:
        memory = torch.empty(before + stride + 16, dtype=torch.float32, device=DEVICE)
    except RuntimeError:
        pytest.skip("17 GB of address space cannot be reserved")
    g = torch.Generator().manual_seed(0)
    values = torch.randn(2, 16, generator=g).to(DEVICE)
    far = memory.as_strided((2, 16), (stride, 1), before)
    ones, targets = torch.ones(16, device=DEVICE), torch.arange(2, device=DEVICE)
    columns = Columns(ones, None, None, slice(16, 16), None, None, 16, None)
    for slope in (torch.float32, torch.bfloat16):
        found = []
        for products in (values.clone(), far.copy_(values)):
            rows = Rows(ones[:2], None, targets, None, *torch.zeros(3, 2, device=DEVICE), targets > 5, ones[:2].clone())
            slopes = products.view(slope) if products is not far else far_slopes(memory, before, stride, slope)
            score_rows(products, slopes, 0, rows, columns, ones[0], None)
            found.append((rows.losses, slopes[:, :16].clone()))
        for a, b in zip(*found, strict=True):
            assert torch.equal(a, b) and a.any()
    grad = torch.ones(2, 16, device=DEVICE)
    project_rows(grad, far.copy_(values), 2.0)
    far.fill_(1.0)
    project_rows(far, values, 2.0)
    assert torch.equal(grad, far) and not (grad == 2).any()


def far_slopes(memory, before, stride, dtype):
    scale = 4 // dtype.itemsize
    return memory.view(dtype).as_strided((2, 16 * scale), (stride * scale, 1), before * scale)
