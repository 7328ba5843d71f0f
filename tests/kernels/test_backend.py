"""Who chooses the implementation: the argument, then BIVEC_BACKEND, then torch; and no silent fallback."""

import pytest
import torch

from bivec import kernels
from bivec.kernels import backend as backends
from bivec.kernels.backend import BackendError, resolve

CU_SEQLENS = torch.tensor([0, 2, 4], dtype=torch.int32)
X, QKV, TABLE = torch.ones(4, 8), torch.ones(4, 2, 4), torch.ones(4, 2)
CALLS = {
    "flash_attention": lambda **o: kernels.flash_attention(QKV, QKV, QKV, CU_SEQLENS, 2, **o),
    "linear_cross_entropy": lambda **o: kernels.linear_cross_entropy(X, torch.ones(5, 8), torch.arange(4), **o),
    "info_nce": lambda **o: kernels.info_nce(X, X, **o),
    "rms_norm": lambda **o: kernels.rms_norm(X, torch.ones(8), 1e-5, **o),
    "apply_rotary": lambda **o: kernels.apply_rotary(QKV, QKV, TABLE, TABLE, torch.arange(4), **o),
    "swiglu": lambda **o: kernels.swiglu(X, X, **o),
    "geglu": lambda **o: kernels.geglu(X, X, **o),
    "segment_pool": lambda **o: kernels.segment_pool(X, CU_SEQLENS, **o),
    "lora_linear": lambda **o: kernels.lora_linear(X, X, torch.ones(2, 8), torch.ones(4, 2), 1.0, **o),
    "lora_linears": lambda **o: kernels.lora_linears(X, [X], [torch.ones(2, 8)], [torch.ones(4, 2)], 1.0, **o),
}
CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    monkeypatch.delenv("BIVEC_BACKEND", raising=False)


def test_the_default_is_triton_on_a_gpu_that_has_it(monkeypatch):
    assert resolve(None, "swiglu", CPU) == "torch"
    for installed, expected in ((True, "triton"), (False, "torch")):
        monkeypatch.setattr(backends, "TRITON_INSTALLED", installed)
        assert resolve(None, "swiglu", GPU) == expected


@pytest.mark.parametrize("op", CALLS)
def test_every_op_runs_with_torch(op, monkeypatch):
    found = [CALLS[op](), CALLS[op](backend="torch")]
    monkeypatch.setenv("BIVEC_BACKEND", "torch")
    found.append(CALLS[op]())
    first, *others = ([x] if isinstance(x, torch.Tensor) else list(x) for x in found)
    assert all(x.isfinite().all() for x in first)
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("op", CALLS)
def test_triton_is_refused_where_it_cannot_run(op, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(BackendError, match=rf'^{op}: backend="triton".*the tensors are on cpu.*TRITON_INTERPRET=1'):
        CALLS[op](backend="triton")
    monkeypatch.setattr(backends, "TRITON_INSTALLED", False)
    monkeypatch.setenv("BIVEC_BACKEND", "triton")
    with pytest.raises(BackendError, match=rf'^{op}: the environment variable BIVEC_BACKEND="triton".*pip install'):
        CALLS[op]()
    CALLS[op](backend="torch")  # the argument wins


@pytest.mark.parametrize("op", CALLS)
def test_unknown_names_are_refused(op, monkeypatch):
    with pytest.raises(ValueError, match=rf"^{op}: backend='cuda' is not a backend; choose one of torch, triton"):
        CALLS[op](backend="cuda")
    monkeypatch.setenv("BIVEC_BACKEND", "Torch")
    with pytest.raises(ValueError, match=rf"^{op}: the environment variable BIVEC_BACKEND='Torch'"):
        CALLS[op]()


def test_an_empty_variable_means_the_default(monkeypatch):
    monkeypatch.setenv("BIVEC_BACKEND", "")
    assert resolve(None, "swiglu", CPU) == "torch"


def test_an_empty_argument_is_not_the_default():
    with pytest.raises(ValueError, match="backend=''"):
        resolve("", "swiglu", CPU)
