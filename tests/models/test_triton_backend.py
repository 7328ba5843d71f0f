"""The tiny models with Triton's attention, in its interpreter, against the same models with torch's."""

from contextlib import nullcontext
from itertools import product

import pytest
import torch

pytest.importorskip("triton")

from bivec.engine.lora import LoraConfig, add_lora
from bivec.kernels import attention_triton
from bivec.kernels.launch import interpreting
from bivec.kernels.tuning import Config, overriding
from bivec.models import PackedBatch, load_pretrained
from bivec.models.families import MODEL_CLASSES

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LENGTHS = {"short": (40, 1, 17, 0, 64), "long": (150, 3, 31)}
DTYPES = {"short": torch.float16, "long": torch.float32}  # the short path takes half types only
TOLERANCES = {"short": 1e-2, "long": 5e-6}  # of the largest value, through two layers and back; measured: a third
OTHERS = tuple(family for family in MODEL_CLASSES if family not in ("llama", "mistral"))
MODES = {
    "bidirectional": {},
    "causal": {"causal": True},
    "dropout": {"attention_dropout": 0.3, "seed": 9},
}


def trained_adapter(directory, dtype):
    """The model with an adapter whose B is not zero any more, as otherwise A would have no gradient."""
    model = load_pretrained(directory, dtype=dtype, device=DEVICE).model
    adapter = add_lora(model, LoraConfig(rank=4, alpha=8, dropout=0.1))
    generator = torch.Generator().manual_seed(3)
    for name, parameter in adapter.named_parameters().items():
        if "lora_B" in name:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model, adapter


def batch_of(lengths, vocabulary):
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(vocabulary, (length,), generator=generator).tolist() for length in lengths]
    return PackedBatch.from_sequences(texts, sample_ids=range(100, 100 + len(texts)), device=DEVICE)


def states_and_gradients(model, adapter, batch, mode, backend):
    """All hidden states and all LoRA gradients by name, with the LoRA's own dropout on."""
    adapter.set_noise(5, batch.token_ids())
    hidden, states = model(batch, output_hidden_states=True, backend=backend, **mode)
    weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    parameters = adapter.named_parameters()
    gradients = torch.autograd.grad((hidden * weights).sum(), list(parameters.values()))
    results = {f"hidden state {i}": state.detach() for i, state in enumerate(states)}
    return results | dict(zip(parameters, gradients, strict=True))


def distances(results, expected):
    """The largest difference of every tensor, as a fraction of its largest value."""
    return {name: ((results[name] - x).abs().max() / x.abs().max()).item() for name, x in expected.items()}


@pytest.mark.parametrize("path", LENGTHS)
@pytest.mark.parametrize(
    ("family", "mode"),
    [*product(("llama", "mistral"), MODES), *product(OTHERS, ("bidirectional",)), ("gemma2", "dropout")],
)
def test_the_model_is_the_same_with_triton(family, mode, path, tiny_dir, monkeypatch):
    model, adapter = trained_adapter(tiny_dir(family), DTYPES[path])
    batch = batch_of(LENGTHS[path], model.config.vocab_size)
    buckets = []
    attend = attention_triton.attention_op
    monkeypatch.setattr(attention_triton, "attention_op", lambda *a: buckets.append(a[6]) or attend(*a))
    # A step costs the interpreter the same whatever the tile: the long path walks in large ones.
    names = [f"attention_{kernel}" for kernel in ("forward", "backward_q", "backward_kv")]
    large = dict.fromkeys(names, Config({"BLOCK_M": 128, "BLOCK_N": 128}, 4, 1))
    with overriding(large) if interpreting() else nullcontext():
        got = states_and_gradients(model, adapter, batch, MODES[mode], "triton")
    assert buckets == [64 if path == "short" else attention_triton.LONG] * model.config.num_layers

    expected = states_and_gradients(model, adapter, batch, MODES[mode], "torch")
    assert len(buckets) == model.config.num_layers  # torch's run had none
    far = distances(got, expected)
    assert all(distance <= TOLERANCES[path] for distance in far.values()), far
    wrong_mode = MODES["causal" if mode != "causal" else "bidirectional"]
    wrong = distances(states_and_gradients(model, adapter, batch, wrong_mode, "torch"), expected)
    wrong.pop("hidden state 0")  # the embedding
    assert all(distance > 0.1 for distance in wrong.values()), wrong
