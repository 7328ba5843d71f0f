"""info_nce's Triton backend against float64, beside plain torch, the torch backend and an all-bf16 implementation."""

from itertools import combinations

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from bivec.kernels import info_nce as public_info_nce
from bivec.kernels import reference as ref
from bivec.kernels.backend import BackendError
from bivec.kernels.tuning import Config, overriding

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FLOOR = 2e-6  # fp32 rounding of logits up to 20, seen through exp, relative
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
def test_matches_float64(name, dtype, example):
    """Several blocks a row and several chunks."""
    with overriding(SMALL_BLOCKS):
        check(*example(CHOICES[name], dtype, (5, 35, 19, 3, 24)), workspace_bytes=6000)


@pytest.mark.parametrize("pair", PAIRS, ids=", ".join)
def test_options_in_pairs(pair, example):
    options = CHOICES[pair[0]] | CHOICES[pair[1]]
    if "query_ids" in options and "symmetric" in options:
        options = options | {"candidate_ids": True}
    check(*example(options, DTYPES[PAIRS.index(pair) % 3], (4, 6, 3, 2, 24)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_all_options_together(dtype, reduction, example):
    options = {"hard": "own", "include_query_query": True, "margin": 0.1, "symmetric": True, "reduction": reduction}
    options |= CHOICES["ids"] | CHOICES["hard ids"] | CHOICES["matryoshka"]
    with overriding(SMALL_BLOCKS):
        check(*example(options, dtype), workspace_bytes=8000)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_parity_of_the_backends(reduction, example):
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
def test_chunk_size_changes_nothing_beyond_rounding(dtype, example):
    tensors, options = example({"hard": "own", "include_query_query": True} | CHOICES["ids"], dtype)
    whole = run(info_nce, tensors, options)
    with pytest.raises(ValueError, match="need at least") as error:
        info_nce(**tensors, **options, workspace_bytes=1)
    minimum = int(str(error.value).split("at least ")[1].split()[0])
    for budget in (minimum, 2 * minimum + 3):
        for name, value in run(info_nce, tensors, options | {"workspace_bytes": budget}).items():
            rtol = 2 * torch.finfo(value.dtype).eps if value.dtype in (torch.bfloat16, torch.float16) else 1e-5
            torch.testing.assert_close(value, whole[name], rtol=rtol, atol=1e-6)


def test_runs_and_backwards_are_bit_identical(example):
    options = {"symmetric": True, "include_query_query": True, "hard": "own", "matryoshka_dims": [24, 7]}
    tensors, options = example(options, torch.bfloat16)
    first, second = (run(info_nce, tensors, options) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    loss = info_nce(**leaves, **options)
    grads = [torch.autograd.grad(loss, tuple(leaves.values()), retain_graph=True) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_dtypes_may_differ(example):
    tensors, options = example({"hard": "shared"}, torch.float32)
    tensors["queries"], tensors["hard_negatives"] = tensors["queries"].bfloat16(), tensors["hard_negatives"].half()
    truth = run(ref.info_nce, tensors, options, torch.float64)
    for name, value in run(info_nce, tensors, options | {"workspace_bytes": 4000}).items():
        assert relative_error(value, truth[name]) <= (0.004 if value.dtype == torch.bfloat16 else 5e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts_change_nothing(dtype, example):
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
def test_each_gradient_only_where_wanted(wanted, reduction, hard, example):
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


def test_targets_repeat(example):
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
def test_norms_do_not_matter(size, example):
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
