"""info_nce's Triton backend inside torch: compiled, checkpointed, its memory, and what it reads."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton")

from bivec.kernels import info_nce as public_info_nce
from bivec.kernels import info_nce_kernels
from bivec.kernels.info_nce_kernels import Columns, Rows, project_rows, score_rows
from bivec.kernels.info_nce_plan import Options
from bivec.kernels.info_nce_triton import info_nce_op, info_nce_pass

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ALL = {
    "hard": "own",
    "include_query_query": True,
    "margin": 0.1,
    "symmetric": True,
    "query_ids": True,
    "candidate_ids": True,
}


def info_nce(*args, **options):
    return public_info_nce(*args, backend="triton", **options)


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


def gradients(function, tensors):
    leaves = {name: x.detach().clone().requires_grad_() for name, x in tensors.items()}
    loss = function(leaves)
    loss.backward()
    return [loss.detach(), *(x.grad for x in leaves.values())]


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled_as_one_graph_and_checkpointed_it_is_the_same(reduction, example):
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


def test_compiled_with_other_batches_scales_margins_and_stats(example):
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
def test_opcheck(reduction, wanted, example):
    tensors, options = example(ALL, torch.bfloat16)
    arguments = operator_arguments(tensors, options, reduction, wanted)
    torch.library.opcheck(torch.ops.bivec.info_nce.default, arguments)
    real = info_nce_op(*arguments)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = info_nce_op(*(mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in arguments))
    for a, b in zip(real, fake, strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


def test_autocast_changes_nothing(example):
    tensors, options = example({"hard": "own", "reduction": "none"})
    weights = torch.linspace(0.5, 1.5, len(tensors["queries"]), device=DEVICE)

    def step(leaves):
        return (info_nce(**leaves, **options) * weights).sum()

    expected = gradients(step, tensors)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        inside = gradients(step, tensors)
    assert all(torch.equal(a, b) for a, b in zip(inside, expected, strict=True))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_there_is_no_second_derivative(reduction):
    x = torch.randn(4, 8, device=DEVICE, requires_grad=True)
    loss = info_nce(x, x.detach().flip(1), reduction=reduction).square().sum()
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_value_is_read(reduction, monkeypatch, example):
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
