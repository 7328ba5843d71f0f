"""Linear layers of a CPU forward without a graph: against float64, and where they run."""

import pytest
import torch
import torch.nn.functional as F

from bivec.kernels import linear_torch
from bivec.kernels.linear_torch import applies, linear

FLOOR = 1e-7  # relative
fused = pytest.mark.skipif(not linear_torch.available(), reason="torch has no oneDNN here")


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def plain(x, weight, bias, silu=False, factor=None, addend=None):
    y = F.linear(x, weight, bias)
    y = F.silu(y) if silu else y
    y = y if factor is None else y * factor
    return y if addend is None else y + addend


def error(value, truth):
    return ((value.double() - truth).norm() / truth.norm()).item()


@fused
@pytest.mark.parametrize("what", ["nothing", "silu", "factor", "addend"])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("rows", [1, 128, 257])
def test_error_is_at_most_twice_that_of_torch(rows, with_bias, what):
    x, weight = randn(rows, 123), randn(77, 123, seed=1)
    bias = randn(77, seed=2) if with_bias else None
    other = randn(rows, 77, seed=3)
    options = {"nothing": {}, "silu": {"silu": True}, "factor": {"factor": other}, "addend": {"addend": other}}[what]
    exact = plain(
        x.double(),
        weight.double(),
        None if bias is None else bias.double(),
        **{name: value.double() if isinstance(value, torch.Tensor) else value for name, value in options.items()},
    )
    got = linear(x, weight, bias, **options)
    assert got.dtype == torch.float32 and got.shape == (rows, 77)
    assert error(got, exact) <= 2 * error(plain(x, weight, bias, **options), exact) + FLOOR


@fused
def test_operands_are_left_alone_and_may_be_strided():
    x, weight, addend = randn(130, 2, 16)[:, 1], randn(16, 24, seed=1).T, randn(24, 130, seed=2).T
    before = [t.clone() for t in (x, weight, addend)]
    got = linear(x, weight, addend=addend)
    assert all(torch.equal(a, b) for a, b in zip(before, (x, weight, addend), strict=True))
    torch.testing.assert_close(got, x @ weight.T + addend)


@fused
def test_silu_saturates_without_nan():
    x = torch.tensor([[-200.0], [-90.0], [0.0], [90.0], [1e6]])
    got = linear(x, torch.ones(1, 1), silu=True)
    torch.testing.assert_close(got, torch.tensor([[0.0], [0.0], [0.0], [90.0], [1e6]]), rtol=1e-6, atol=1e-30)


def test_one_thing_after_the_product():
    x = torch.ones(3, 4)
    with pytest.raises(ValueError, match="at most one of silu, factor and addend"):
        linear(x, torch.ones(4, 4), silu=True, addend=x)


@fused
@pytest.mark.filterwarnings("ignore:TF32")  # torch's own, as the flags are put back
def test_where_it_applies(monkeypatch):
    x, weight = torch.ones(3, 4), torch.nn.Parameter(torch.ones(4, 4))
    assert not applies(x, weight)  # a graph is kept
    assert applies(x, weight.detach(), None)
    with torch.no_grad():
        assert applies(x, weight, None)
        assert applies(x[:1], weight) and not applies(x[:0], weight)
        assert not applies(x.double(), weight.double())
        assert not applies(x.bfloat16(), weight.bfloat16())
        assert not applies(x.to("meta"), weight)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert not applies(x, weight)
        with torch.backends.mkldnn.flags(enabled=False):
            assert not applies(x, weight)
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert not applies(x, weight)


@fused
@pytest.mark.parametrize("what", ["silu", "factor", "addend"])
def test_a_row_does_not_depend_on_its_neighbours(what):
    """What makes an embedding the same in every batch; MKL is off by 5e-5 here, oneDNN by 6e-5 for one row."""
    x, weight, other = randn(300, 576), randn(1536, 576, seed=1), randn(300, 1536, seed=2)

    def options(rows):
        return {"silu": True} if what == "silu" else {what: other[rows]}

    whole = linear(x, weight, **options(slice(None)))
    for rows in (slice(0, 1), slice(3, 10), slice(40, 170)):
        torch.testing.assert_close(linear(x[rows], weight, **options(rows)), whole[rows], rtol=0, atol=1e-5)
