"""The Triton backend of flash_attention inside torch: operators, torch.compile, checkpointing, and its errors."""

from itertools import combinations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton")

from bivec.kernels import attention as attention_module
from bivec.kernels import flash_attention
from bivec.kernels.attention import attention_plan
from bivec.kernels.attention_triton import LONG, attention_backward_op, attention_op
from bivec.kernels.backend import BackendError, checks_values
from bivec.kernels.launch import architecture, recording

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LENGTHS = (7, 0, 1, 19)
LONG_SEQLEN = 4096  # a max_seqlen that takes the long path, whatever the lengths
both_paths = pytest.mark.parametrize("max_seqlen", [32, LONG_SEQLEN], ids=["short", "long"])


@pytest.fixture
def inputs(attention):
    return attention.make(LENGTHS, 4, 2, 16, torch.float16)  # both paths take half types


def leaves(inputs):
    return [x.detach().clone().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]


def gradients(function, inputs):
    """Output and gradients of ``function(q, k, v)``."""
    tensors = leaves(inputs)
    out = function(*tensors)
    out.backward(inputs.d_out)
    return out.detach(), *(x.grad for x in tensors)


def operator_arguments(inputs, bucket, dropped):
    """What follows q, k and v."""
    plan = attention_plan(inputs.cu_seqlens, 19)
    noise = (0.2, torch.tensor([3]), torch.arange(len(LENGTHS))) if dropped else (0.0, None, None)
    dropout_p, *keys = (x.to(inputs.q.device) if isinstance(x, torch.Tensor) else x for x in noise)
    return plan.cu_seqlens, plan.starts, plan.order, bucket, 0.25, None, 4, None, dropout_p, *keys


@pytest.mark.parametrize("bucket", [32, LONG], ids=["short", "long"])
@pytest.mark.parametrize("dropped", [False, True], ids=["plain", "dropout"])
def test_opcheck(dropped, bucket, inputs):
    """Schema, fake tensors, autograd registration, and tracing with static and dynamic shapes."""
    arguments = operator_arguments(inputs, bucket, dropped)
    torch.library.opcheck(torch.ops.bivec.flash_attention.default, (*leaves(inputs), *arguments))
    out, lse2 = attention_op(inputs.q, inputs.k, inputs.v, *arguments)
    saved = (inputs.d_out, inputs.q, inputs.k, inputs.v, out if bucket == LONG else None, lse2)
    torch.library.opcheck(torch.ops.bivec.flash_attention_backward.default, (*saved, *arguments))


def test_fake_results_look_like_the_real_ones(inputs):
    """Shapes, dtypes and strides: of a strided q, too."""
    arguments = operator_arguments(inputs, LONG, True)
    q = torch.cat([inputs.q, inputs.q], dim=1)[:, :4]
    for operands in ((inputs.q, inputs.k, inputs.v), (q, inputs.k, inputs.v)):
        real = attention_op(*operands, *arguments)
        real += attention_backward_op(inputs.d_out, *operands, *real, *arguments)
        with torch._subclasses.FakeTensorMode() as mode:
            fakes = [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in (*operands, *arguments)]
            fake = attention_op(*fakes)
            fake += attention_backward_op(mode.from_tensor(inputs.d_out), *fakes[:3], *fake, *fakes[3:])
        for a, b in zip(real, fake, strict=True):
            assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


@both_paths
@pytest.mark.parametrize("planned", [True, False], ids=["plan", "no plan"])
@pytest.mark.parametrize("seed", [11, torch.tensor([11])], ids=["int", "tensor"])
def test_compiled_as_one_graph_it_is_the_same(seed, planned, max_seqlen, inputs):
    torch._dynamo.reset()
    plan = attention_plan(inputs.cu_seqlens, max_seqlen) if planned else None
    seed = seed.to(inputs.q.device) if isinstance(seed, torch.Tensor) else seed

    def layer(q, k, v):
        out = flash_attention(
            2 * q,
            k,
            v,
            inputs.cu_seqlens,
            max_seqlen,
            window=(9, 2),
            dropout_p=0.3,
            seed=seed,
            plan=plan,
            backend="triton",
        )
        return out * 3

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for a, b in zip(gradients(compiled, inputs), gradients(layer, inputs), strict=True):
        assert torch.equal(a, b)


def test_other_lengths_in_a_bucket_do_not_compile_again(attention):
    """Every size becomes dynamic at its first change; from then on only another bucket compiles."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def layer(q, k, v, cu_seqlens, max_seqlen):
        return flash_attention(q, k, v, cu_seqlens, max_seqlen, causal=True, backend="triton")

    compiled = torch.compile(layer, fullgraph=True, backend=counter)

    def graphs_after(*lengths):
        x = attention.make(lengths, 2, 1, 16, torch.float16)
        operands = (x.q, x.k, x.v, x.cu_seqlens, max(lengths))
        assert torch.equal(compiled(*operands), layer(*operands))
        return counter.frame_count

    first, _, warm = graphs_after(40, 3), graphs_after(50, 9), graphs_after(61, 30, 2)
    assert first == 1
    for lengths in ((45, 4, 1), (64, 2), (33, 1, 0, 2), (61, 60)):
        assert graphs_after(*lengths) == warm
    assert graphs_after(100, 20, 2) == warm + 1


@both_paths
def test_other_seeds_hardly_compile_again(max_seqlen, inputs):
    """The first change makes a symbol of the seed, whatever its sign and size."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def layer(q, k, v, seed):
        bounds = inputs.cu_seqlens
        return flash_attention(q, k, v, bounds, max_seqlen, dropout_p=0.3, seed=seed, backend="triton")

    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    outputs = []
    for seed in (11, 12, 977, 2**40 + 3, -5):
        got = gradients(lambda *x, seed=seed: compiled(*x, seed), inputs)
        for a, b in zip(got, gradients(lambda *x, seed=seed: layer(*x, seed), inputs), strict=True):
            assert torch.equal(a, b)
        outputs.append(got[0])
    assert counter.frame_count <= 3
    assert not any(torch.equal(a, b) for a, b in combinations(outputs, 2))


@both_paths
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_recomputes_the_same_mask(reentrant, max_seqlen, inputs):
    def layer(q, k, v):
        return flash_attention(q, k, v, inputs.cu_seqlens, max_seqlen, dropout_p=0.4, seed=2, backend="triton").sin()

    expected = gradients(layer, inputs)
    got = gradients(lambda *x: checkpoint(layer, *x, use_reentrant=reentrant), inputs)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


def test_gradients_of_some_operands_only(inputs):
    """Frozen keys and values, and a forward without gradients."""
    q, k, v = leaves(inputs)
    everything = gradients(lambda *x: flash_attention(*x, inputs.cu_seqlens, 32, backend="triton"), inputs)
    out = flash_attention(q, k.detach(), v.detach(), inputs.cu_seqlens, 32, backend="triton")
    assert torch.equal(torch.autograd.grad(out, q, inputs.d_out)[0], everything[1])
    with torch.no_grad():
        assert torch.equal(flash_attention(q, k, v, inputs.cu_seqlens, 32, backend="triton"), everything[0])


def zeros(*shape, **options):
    return torch.zeros(shape, **{"device": DEVICE} | options)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def call(device=DEVICE, **changes):
    """Five tokens of two sequences, 4 and 2 heads."""
    q, k = zeros(5, 4, 16, device=device), zeros(5, 2, 16, device=device)
    bounds = int32(0, 3, 5).to(device)
    arguments = {"q": q, "k": k, "v": k, "cu_seqlens": bounds, "max_seqlen": 3, "backend": "triton"}
    arguments |= changes
    return flash_attention(**arguments)


WRONG_VALUES = [  # which one has to read on the host
    ({"cu_seqlens": int32(1, 3, 5)}, "cu_seqlens must start at 0"),
    ({"cu_seqlens": int32(0, 4, 3, 5), "max_seqlen": 9}, "cu_seqlens must not decrease"),
    ({"cu_seqlens": int32(0, 3, 4)}, "cu_seqlens must end at"),
    ({"max_seqlen": 2}, "max_seqlen=2"),
    ({"plan": attention_plan(int32(0, 2, 5), 3)}, "plan was made from other cu_seqlens"),
    ({"plan": attention_plan(int32(0, 3, 5), 3), "max_seqlen": 2}, "max_seqlen=2"),
]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": zeros(5, 64)}, "q must have shape"),
        ({"q": zeros(5, 4, 16, dtype=torch.int64)}, "q must be floating"),
        ({"k": zeros(5, 2, 16).half()}, "k must be floating point and of one dtype"),
        ({"k": zeros(4, 2, 16)}, "k must have q's tokens"),
        ({"k": zeros(5, 2, 8)}, "k must have q's tokens and head_dim"),
        ({"v": zeros(5, 1, 16)}, "v must have k's shape"),
        ({"v": zeros(5, 2, 16, device="meta")}, "v is on meta"),
        ({"k": zeros(5, 3, 16), "v": zeros(5, 3, 16)}, "heads of q must be a multiple of those of k"),
        ({"q": zeros(5, 16, 4).transpose(1, 2)}, "last dimension of q must be contiguous"),
        ({"v": zeros(5, 16, 2).transpose(1, 2)}, "last dimension of v must be contiguous"),
        ({"cu_seqlens": int32(0, 3, 5).long()}, "cu_seqlens must be an int32"),
        ({"cu_seqlens": int32(0, 3, 5).to("meta")}, "cu_seqlens is on meta"),
        ({"max_seqlen": torch.tensor(3, device=DEVICE)}, "max_seqlen must be an int"),
        ({"plan": attention_plan(int32(0, 5), 5)}, "plan was made from other cu_seqlens"),
        ({"window": (-2, 0)}, "window"),
        ({"softcap": -1.0}, "softcap"),
        ({"dropout_p": 1.0, "seed": 0}, "dropout_p"),
        ({"dropout_p": 0.1}, "seed"),
        ({"dropout_p": 0.1, "seed": torch.tensor([1, 2], device=DEVICE)}, "seed"),
        ({"dropout_p": 0.1, "seed": torch.tensor([1], device="meta")}, "seed is on meta"),
        ({"dropout_p": 0.1, "seed": 1, "sample_ids": torch.arange(3, device=DEVICE)}, "sample_ids"),
    ],
)
def test_bad_arguments(changes, message, monkeypatch):
    """Those that no value decides: refused on a GPU, too, without BIVEC_CHECK."""
    monkeypatch.delenv("BIVEC_CHECK", raising=False)
    with pytest.raises(ValueError, match=f"^(flash_attention|attention_plan): .*{message}"):
        call(**changes)


@pytest.mark.parametrize(("changes", "message"), WRONG_VALUES)
def test_bad_values(changes, message, monkeypatch):
    """Always refused on a CPU, and on a GPU with BIVEC_CHECK=1."""
    if DEVICE.type == "cuda":
        monkeypatch.setenv("BIVEC_CHECK", "1")
    else:
        monkeypatch.delenv("BIVEC_CHECK", raising=False)
    with pytest.raises(ValueError, match=f"^(flash_attention|attention_plan): .*{message}"):
        call(**changes)


@pytest.mark.parametrize(("changes", "message"), WRONG_VALUES)
def test_a_gpu_refuses_values_only_if_asked(changes, message, monkeypatch):
    """On a CPU the operands pass for a GPU's where it is decided whether to read them."""
    monkeypatch.setattr(attention_module, "checks_values", lambda device: checks_values(torch.device("cuda")))
    for unasked in ("0", ""):
        monkeypatch.setenv("BIVEC_CHECK", unasked)
        with recording(architecture(DEVICE)) as launches:  # made, they would read and write past the tensors
            call(**changes)
        assert len(launches) == 1
    monkeypatch.setenv("BIVEC_CHECK", "1")
    with pytest.raises(ValueError, match=f"^(flash_attention|attention_plan): .*{message}"):
        call(**changes)


def test_no_value_is_read_unasked(inputs, monkeypatch):
    """Reading stalls a GPU, where torch is told to refuse it, and fails for tensors without values, on a CPU."""
    monkeypatch.delenv("BIVEC_CHECK", raising=False)

    def layer(q, k, v, cu_seqlens):
        return flash_attention(q, k, v, cu_seqlens, 19, dropout_p=0.2, seed=3, backend="triton", return_lse=True)

    if DEVICE.type == "cuda":
        operands = (*leaves(inputs), inputs.cu_seqlens)
        layer(*operands)[0].backward(inputs.d_out)  # compiles and loads the kernels
        torch.cuda.set_sync_debug_mode("error")
        try:
            layer(*operands)[0].backward(inputs.d_out)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return
    operands = [x.to("meta") for x in (inputs.q, inputs.k, inputs.v, inputs.cu_seqlens)]
    assert layer(*operands)[0].shape == inputs.q.shape
    monkeypatch.setenv("BIVEC_CHECK", "1")
    with pytest.raises(NotImplementedError, match="meta tensor"):
        layer(*operands)


@both_paths
def test_checks_asked_for_do_not_break_the_graph(max_seqlen, inputs, monkeypatch):
    """Compiled code reads nothing, also with BIVEC_CHECK=1: a wrong bound goes unnoticed, a plain call refuses it."""
    torch._dynamo.reset()
    monkeypatch.setenv("BIVEC_CHECK", "1")

    def layer(q, k, v, cu_seqlens):
        return flash_attention(q, k, v, cu_seqlens, max_seqlen, backend="triton")

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    early = inputs.cu_seqlens.clone()
    early[-1] -= 1  # one token belongs to no sequence
    last = int(early[-1])
    with pytest.raises(ValueError, match="cu_seqlens must end at"):
        layer(inputs.q, inputs.k, inputs.v, early)
    got = compiled(inputs.q, inputs.k, inputs.v, early)
    assert torch.equal(got[:last], layer(inputs.q[:last], inputs.k[:last], inputs.v[:last], early))


def test_what_the_kernels_cannot_take():
    double, wide = zeros(5, 4, 16).double(), zeros(5, 4, 257)
    with pytest.raises(BackendError, match=r'float64.*backend="torch"'):
        call(q=double, k=double, v=double)
    with pytest.raises(BackendError, match=r'257.*backend="torch"'):
        call(q=wide, k=wide, v=wide)


def test_on_a_cpu_the_interpreter_is_needed(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(BackendError, match="TRITON_INTERPRET=1"):
        call(torch.device("cpu"))


def test_whose_values_are_read(monkeypatch):
    """On a CPU always; on a GPU, which reading would stall, with BIVEC_CHECK=1."""
    monkeypatch.delenv("BIVEC_CHECK", raising=False)
    assert checks_values(torch.device("cpu")) and not checks_values(torch.device("cuda"))
    monkeypatch.setenv("BIVEC_CHECK", "1")
    assert checks_values(torch.device("cuda"))
