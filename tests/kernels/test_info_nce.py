"""info_nce against the whole-matrix float64 statement in kernels/reference.py; saturation, masks, memory bounds."""

import pytest
import torch

from bivec.kernels import info_nce
from bivec.kernels import reference as ref
from bivec.kernels.backend import checks_values

B, N, M, K, D = 11, 17, 5, 3, 24
FLOOR = 2e-6  # fp32 rounding of logits up to 20, seen through exp, relative

SHARED, OWN = {"hard": "shared"}, {"hard": "own"}
IDS = {"query_ids": True, "candidate_ids": True}
OPTIONS = {
    "plain": {},
    "dot products": {"normalize": False, "scale": 0.2},
    "targets": {"targets": True},
    "shared": SHARED,
    "own": OWN,
    "query-query": {"include_query_query": True},
    "ids": IDS,
    "ids everywhere, shared": IDS | SHARED | {"hard_negative_ids": True, "include_query_query": True},
    "ids everywhere, own, targets": IDS | OWN | {"hard_negative_ids": True, "targets": True},
    "ids of the queries only": {"query_ids": True, "include_query_query": True},
    "margin": {"margin": -0.1} | OWN,
    "margin, ids, shared, query-query": {"margin": 0.05, "include_query_query": True} | IDS | SHARED,
    "symmetric": {"symmetric": True},
    "symmetric with all": {"symmetric": True, "margin": 0.1, "include_query_query": True} | IDS | SHARED,
    "matryoshka": {"matryoshka_dims": [8, 24, 3], "matryoshka_weights": [1.0, 2.0, 0.5]},
    "matryoshka of dot products": {
        "matryoshka_dims": [24, 8],
        "matryoshka_weights": [1.0, 3.0],
        "normalize": False,
        "scale": 0.2,
        "symmetric": True,
    },
    "matryoshka, prefixes only": {"matryoshka_dims": [5, 16]} | OWN,
    "matryoshka with all": {"matryoshka_dims": [24, 12], "symmetric": True, "include_query_query": True} | IDS | SHARED,
}


def example(options, dtype=torch.float32, sizes=(B, N, M, K, D)):
    """Returns (differentiable tensors, keyword arguments); the losses are neither solved nor hopeless."""
    options, g = dict(options), torch.Generator().manual_seed(0)
    B, N, M, K, D = sizes
    num = B if options.get("symmetric") else N
    hard = options.pop("hard", None)
    tensors = {
        "queries": torch.randn(B, D, generator=g) * 3,
        "candidates": torch.randn(num, D, generator=g) / 2,
        "scale": torch.tensor(options.pop("scale", 20.0)),
    }
    tensors["candidates"][:B] += 0.08 * tensors["queries"]
    if hard is not None:
        tensors["hard_negatives"] = torch.randn(*((M,) if hard == "shared" else (B, K)), D, generator=g)
    for name, tensor in tensors.items():
        tensors[name] = (tensor if name == "scale" else tensor.to(dtype)).requires_grad_()
    ids = {"query_ids": (B,), "candidate_ids": (num,), "hard_negative_ids": (M,) if hard == "shared" else (B, K)}
    for name, shape in ids.items():  # few identities: duplicates among queries, positives and negatives
        if options.get(name):
            options[name] = torch.randint(0, 6, shape, generator=g)
    if options.get("targets"):
        options["targets"] = torch.randint(0, num, (B,), generator=g)
    return tensors, options


def run(function, tensors, options, dtype=None):
    tensors = {name: (x if dtype is None else x.to(dtype)).detach().requires_grad_() for name, x in tensors.items()}
    loss = function(**tensors, **options)
    (loss * torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype).reshape(loss.shape)).sum().backward()
    return {"loss": loss.detach()} | {name: x.grad for name, x in tensors.items()}


def relative_error(value, truth):
    return ((value.double() - truth).norm() / truth.norm().clamp_min(1e-300)).item()


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_matches_float64(name, dtype, reduction):
    tensors, options = example(OPTIONS[name], dtype)
    options["reduction"] = reduction
    truth = run(ref.info_nce, tensors, options, torch.float64)
    plain = run(ref.info_nce, tensors, options)
    ours = run(info_nce, tensors, options | {"workspace_bytes": 14000})
    assert ours["loss"].dtype == torch.float32 and ours["queries"].dtype == dtype
    for key, value in ours.items():
        error = relative_error(value, truth[key])
        assert error <= 2 * relative_error(plain[key], truth[key]) + FLOOR, key
        assert error <= 0.01, key


@pytest.mark.parametrize("name", ["ids everywhere, shared", "ids everywhere, own, targets", "symmetric with all"])
def test_sizes_of_real_steps(name):
    """Above 256, where Python makes a new object of every number."""
    tensors, options = example(OPTIONS[name], sizes=(260, 300, 270, 2, 288))
    truth = run(ref.info_nce, tensors, options, torch.float64)
    plain = run(ref.info_nce, tensors, options)
    for key, value in run(info_nce, tensors, options).items():
        assert relative_error(value, truth[key]) <= 2 * relative_error(plain[key], truth[key]) + FLOOR, key


def test_the_mean_of_one_query_is_its_loss():
    queries, candidates = torch.ones(1, 4), torch.eye(3, 4)
    mean, total, single = (info_nce(queries, candidates, reduction=one) for one in ("mean", "sum", "none"))
    assert mean == total == single[0] and mean > 1
    torch.testing.assert_close(mean, torch.tensor(3.0).log())


def test_a_reduction_is_known_by_its_letters():
    """Not by the object that a literal makes."""
    tensors, options = example(OPTIONS["own"])
    for reduction in ("none", "mean", "sum"):
        made = run(info_nce, tensors, options | {"reduction": "".join(list(reduction))})
        for key, value in run(info_nce, tensors, options | {"reduction": reduction}).items():
            assert torch.equal(made[key], value)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_gradcheck(name, reduction):
    tensors, options = example({"scale": 4.0} | OPTIONS[name], torch.float64, sizes=(4, 5, 3, 2, 6))
    tensors["scale"] = tensors["scale"].detach().double().requires_grad_()
    if "matryoshka_dims" in options:
        options["matryoshka_dims"] = [max(1, d // 4) for d in options["matryoshka_dims"]]
    options |= {"reduction": reduction, "workspace_bytes": 3000}
    names = list(tensors)
    torch.autograd.gradcheck(
        lambda *values: info_nce(**dict(zip(names, values, strict=True)), **options), tuple(tensors.values())
    )


@pytest.mark.parametrize(
    ("name", "columns", "mask", "own"),
    [
        ("plain", N, 0, 0),
        ("shared", N + M, 0, 0),
        ("own", N + K, 0, K),
        ("query-query", N + B, 0, 0),
        ("ids", N, 1, 0),
        ("margin", N + K, 1, K),
    ],
)
def test_the_workspace_of_one_query_is_known(name, columns, mask, own):
    """In fp32: its logits and their mask; six vectors, and three for every negative of its own; a tile of three."""
    minimum = columns * (4 + mask) + (6 + 3 * own) * D * 4 + 3 * D * 4
    tensors, options = example(OPTIONS[name])
    info_nce(**tensors, **options, workspace_bytes=minimum, backend="torch")
    with pytest.raises(ValueError, match=f"{columns} columns of width {D} need at least {minimum} bytes"):
        info_nce(**tensors, **options, workspace_bytes=minimum - 1, backend="torch")


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunk_size_changes_nothing(name, dtype):
    tensors, options = example(OPTIONS[name], dtype)
    whole = run(info_nce, tensors, options)
    with pytest.raises(ValueError, match="need at least") as error:
        info_nce(**tensors, **options, workspace_bytes=1)
    minimum = int(str(error.value).split("at least ")[1].split()[0])
    for budget in (minimum, 2 * minimum + 3, 4 * minimum):
        parts = run(info_nce, tensors, options | {"workspace_bytes": budget})
        for key, value in parts.items():
            # two units in the last place: the order of fp32 sums may tip a bf16 rounding
            rtol = 2 * torch.finfo(value.dtype).eps if value.dtype == torch.bfloat16 else 1e-5
            torch.testing.assert_close(value, whole[key], rtol=rtol, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}")


def nearly_solved(size, width, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    queries, noise = torch.randn(size, width, generator=g), torch.randn(size, width, generator=g)
    unit = torch.nn.functional.normalize(queries, dim=1)
    tangent = torch.nn.functional.normalize(noise - unit * (noise * unit).sum(1, keepdim=True), dim=1)
    candidates = 0.999 * unit + (1 - 0.999**2) ** 0.5 * tangent
    return {"queries": queries.to(dtype), "candidates": (2 * candidates).to(dtype)}


@pytest.mark.parametrize("solved", [True, False])
@pytest.mark.parametrize("scale", [1.0, 20.0, 50.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("symmetric", [True, False])
def test_gradients_survive_saturation(solved, scale, dtype, symmetric):
    tensors = nearly_solved(96, 48, dtype)
    if not solved:
        tensors["candidates"] = torch.randn(96, 48, generator=torch.Generator().manual_seed(5)).to(dtype)
    tensors["scale"] = torch.tensor(scale)
    options = {"symmetric": symmetric, "reduction": "sum"}
    truth = run(ref.info_nce, tensors, options, torch.float64)
    ours = run(info_nce, tensors, options)
    for key, value in ours.items():
        # bf16: half a unit of rounding of the result; fp32: rounding of logits up to 100, seen through exp
        assert relative_error(value, truth[key]) <= (0.004 if value.dtype == torch.bfloat16 else 5e-5), key


def test_stats_come_from_the_same_pass():
    tensors, options = example(OPTIONS["ids everywhere, own, targets"])
    loss, stats = info_nce(**tensors, **options, return_stats=True, reduction="none")
    q, c, h = (torch.nn.functional.normalize(tensors[n], dim=-1) for n in ("queries", "candidates", "hard_negatives"))
    s = 20 * torch.cat([q @ c.T, torch.einsum("bd,bkd->bk", q, h)], 1).detach()
    target = options["targets"][:, None]
    mask = options["query_ids"][:, None] == torch.cat(
        [options["candidate_ids"].repeat(B, 1), options["hard_negative_ids"]], 1
    )
    s = s.masked_fill(mask.scatter(1, target, False), -torch.inf)
    torch.testing.assert_close(stats.lse, s.logsumexp(1))
    torch.testing.assert_close(stats.positive, s.gather(1, target)[:, 0])
    torch.testing.assert_close(stats.lse - stats.positive, loss.detach())
    assert torch.equal(stats.correct, s.argmax(1) == target[:, 0])
    assert stats.count == B and stats.accuracy == stats.correct.float().mean() and not stats.lse.requires_grad


def test_accuracy_is_the_share_of_the_right():
    """Two of four queries find their own candidate; of none, none."""
    queries = torch.eye(4, 6)
    _, stats = info_nce(queries, queries[[1, 0, 2, 3]], return_stats=True)
    assert stats.correct.tolist() == [False, False, True, True] and stats.count == 4
    assert stats.accuracy.item() == 0.5 and stats.accuracy.dtype == torch.float32 and stats.accuracy.dim() == 0
    _, stats = info_nce(queries[:1], queries, return_stats=True)
    assert stats.accuracy.item() == 1.0 and stats.count == 1
    _, stats = info_nce(queries, queries[[0, 0, 1, 3]], return_stats=True)
    assert stats.correct.tolist() == [True, False, True, True]  # as high as the positive is not higher
    _, stats = info_nce(queries[:0], queries, return_stats=True)
    assert stats.accuracy.item() == 0.0 and stats.count == 0


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_a_query_without_negatives_has_loss_and_gradients_zero(reduction):
    one = {"queries": torch.ones(1, 4), "candidates": torch.eye(1, 4)}
    masked = {"queries": torch.randn(3, 4), "candidates": torch.randn(3, 4), "hard_negatives": torch.randn(3, 2, 4)}
    ids = torch.full((3,), 7)
    options = {"query_ids": ids, "candidate_ids": ids, "hard_negative_ids": ids[:, None].expand(3, 2)}
    empty = {"queries": torch.zeros(0, 4), "candidates": torch.randn(3, 4)}
    for tensors, extra in ((one, {}), (one, {"include_query_query": True}), (masked, options), (empty, {})):
        for symmetric in (False, True) if len(tensors["queries"]) == len(tensors["candidates"]) else (False,):
            scale = {"scale": torch.tensor(50.0)}
            result = run(info_nce, tensors | scale, extra | {"reduction": reduction, "symmetric": symmetric})
            assert all((value == 0).all() for value in result.values())


def test_duplicated_id_of_the_own_positive_is_masked_and_the_positive_is_not():
    queries = torch.eye(3, 4)
    candidates = torch.cat([queries, queries[:1]])  # row 3 is the positive of query 0 once more
    ids = torch.tensor([10, 11, 12])
    masked = info_nce(
        queries, candidates, query_ids=ids, candidate_ids=torch.tensor([10, 11, 12, 10]), reduction="none"
    )
    without = info_nce(queries, candidates[:3], reduction="none")
    torch.testing.assert_close(masked[0], without[0])
    assert masked[1] > without[1]  # the other queries still see it


@pytest.mark.parametrize("symmetric", [True, False])
def test_zero_vectors_have_cosine_zero_and_no_gradient(symmetric):
    tensors = {"queries": torch.randn(4, 6), "candidates": torch.randn(4, 6), "scale": torch.tensor(20.0)}
    tensors["queries"][1], tensors["candidates"][2] = 0.0, 1e-20
    result = run(info_nce, tensors, {"symmetric": symmetric, "include_query_query": True})
    assert all(torch.isfinite(value).all() for value in result.values())
    assert (result["queries"][1] == 0).all() and (result["candidates"][2] == 0).all()
    assert (result["queries"][0] != 0).any()
    losses = info_nce(tensors["queries"], tensors["candidates"], reduction="none")
    torch.testing.assert_close(losses[1], torch.tensor(4.0).log())


def test_llm2vec_objective():
    """METHOD 4.4: normalise, scale 20, cross-entropy with the diagonal as target, one direction, mean."""
    a, b = torch.randn(8, 16), torch.randn(8, 16)
    cosine = torch.nn.functional.cosine_similarity(a[:, None], b[None], dim=-1)
    expected = torch.nn.functional.cross_entropy(20 * cosine, torch.arange(8))
    torch.testing.assert_close(info_nce(a, b), expected)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("wanted", [("queries",), ("candidates",), ("hard_negatives",), ("scale",)])
def test_each_gradient_only_where_wanted(wanted, reduction):
    tensors, options = example(OPTIONS["ids everywhere, shared"])
    expected = run(info_nce, tensors, options)
    inputs = {name: x.detach().requires_grad_(name in wanted) for name, x in tensors.items()}
    loss = info_nce(**inputs, **options, reduction=reduction)
    (loss.mean() * 0.5).backward()
    for name, x in inputs.items():
        if name in wanted:
            torch.testing.assert_close(x.grad, expected[name], rtol=1e-5, atol=1e-7)
        else:
            assert x.grad is None
    with torch.no_grad():
        assert not info_nce(**tensors, **options).requires_grad


def test_backward_twice_and_repeated_runs_are_bit_identical():
    tensors, options = example(OPTIONS["matryoshka with all"], torch.bfloat16)
    first, second = (run(info_nce, tensors, options | {"workspace_bytes": 20000}) for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)
    loss = info_nce(**tensors, **options)
    grads = [torch.autograd.grad(loss, tuple(tensors.values()), retain_graph=True) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_autocast_does_not_lower_the_precision():
    tensors, options = example(OPTIONS["own"])
    expected = run(info_nce, tensors, options | {"reduction": "none"})
    with torch.autocast("cpu", torch.bfloat16):
        inside = run(info_nce, tensors, options | {"reduction": "none"})
    assert all(torch.equal(inside[key], expected[key]) for key in expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("extra", [{}, {"margin": 0.2, "include_query_query": True}, {"symmetric": True}])
def test_memory_stays_within_the_workspace(dtype, extra, peak_bytes):
    size, width, budget = 2000, 8, 2**19
    g = torch.Generator().manual_seed(0)
    queries, candidates = (torch.randn(size, width, generator=g).to(dtype).requires_grad_() for _ in range(2))

    def step():
        loss = info_nce(queries, candidates, workspace_bytes=budget, **extra)
        loss.backward()
        return loss

    gradients = 2 * size * width * (4 + dtype.itemsize)  # fp32 sums kept for backward, and the results
    vectors = 10 * size * 8  # targets, losses, LSE, positives, flags
    assert peak_bytes(step) <= budget + gradients + vectors < size * size * 4 / 8


@pytest.mark.parametrize("name", ["hard negatives", "matryoshka", "single losses"])
def test_memory_with_options_stays_within_the_workspace(name, peak_bytes):
    size, width, budget = 4000, 4, 2**21
    g = torch.Generator().manual_seed(0)
    count = 3 if name == "hard negatives" else 2
    vectors = [torch.randn(size, width, generator=g).requires_grad_() for _ in range(count)]
    options = {
        "hard negatives": {},
        "matryoshka": {"matryoshka_dims": (2, 4)},
        "single losses": {"reduction": "none"},
    }[name]

    def step():
        hard = {"hard_negatives": vectors[2]} if name == "hard negatives" else {}
        loss = info_nce(*vectors[:2], **hard, workspace_bytes=budget, **options).sum()
        loss.backward()
        return loss

    sets = 3 if name == "matryoshka" else 2  # saved, returned, and of one of the dims
    limit = budget + sets * count * size * width * 4 + 16 * size * 8
    assert peak_bytes(step) <= limit < min(2 * budget, size * size * 4 / 8)


def test_16384_by_16384_within_256_mb(peak_bytes):
    size, width, budget = 16384, 32, 256 * 10**6
    g = torch.Generator().manual_seed(0)
    queries, candidates = (torch.randn(size, width, generator=g).requires_grad_() for _ in range(2))

    def step():
        loss = info_nce(queries, candidates, workspace_bytes=budget // 2)
        loss.backward()
        return loss

    inputs_and_gradients = 2 * 2 * size * width * 4
    assert peak_bytes(step) <= budget + inputs_and_gradients < size * size * 4
    assert queries.grad.isfinite().all() and queries.grad.abs().max() > 0


def test_values_on_a_gpu_are_checked_under_the_debug_flag(monkeypatch):
    """``BIVEC_CHECK=1`` asks for the checks that would wait for a GPU; unasked, a CPU checks and a GPU does not."""
    monkeypatch.delenv("BIVEC_CHECK", raising=False)
    assert checks_values(torch.device("cpu")) and not checks_values(torch.device("cuda"))
    monkeypatch.setenv("BIVEC_CHECK", "1")
    assert checks_values(torch.device("cuda"))
