"""Gradient caching of a bf16 trunk under an fp32 adapter: in however many micro-batches, no worse than one forward.

The reference is float64 on the same rounded weights, with the same dropout. Cut otherwise, products are rounded
otherwise, so the gradients of two cuts are not equal; each must be about as near to the reference as those of one plain
forward and backward: error <= 2x its error + FLOOR.
"""

import functools

import numpy as np
import pytest
import torch

from bivec.engine.grad_cache import Embedder, PackedRows, StepRows, cached_losses, micro_batches
from bivec.engine.lora import LoraConfig, add_lora
from bivec.kernels import info_nce
from bivec.models import load_pretrained

FLOOR = 1e-3  # of the reference's norm: a quarter of bf16's rounding of one number
LENGTHS = [5, 17, 2, 9, 9, 23, 3, 12, 30, 4, 7, 11]  # 132 tokens: queries, positives, hard negatives
QUERIES = 4
CUTS = {"one": None, "three": 54, "all": 1}


def rows() -> StepRows:
    draw = np.random.default_rng(5)
    sequences = [[0, *draw.integers(2, 1000, length - 1).tolist()] for length in LENGTHS]
    spans = np.array([(1, length) for length in LENGTHS])
    return StepRows(sequences, spans, np.arange(len(LENGTHS)) + 100)


def loss_of(embeddings):
    queries, positives, negatives = embeddings.tensor_split((QUERIES, 2 * QUERIES))
    return info_nce(queries, positives, hard_negatives=negatives, scale=20.0)


def embedder(directory, dtype):
    """The weights are rounded to bf16 and the adapter's to fp32, whatever the dtype of the computation."""
    model = load_pretrained(directory, dtype="bfloat16").model.to(dtype)
    adapter = add_lora(model, LoraConfig(rank=4, dropout=0.1), seed=1)
    for number, parameter in enumerate(adapter.named_parameters().values()):
        values = torch.rand(parameter.shape, generator=torch.Generator().manual_seed(number))
        parameter.data = 0.2 * values - 0.1
        if dtype == torch.float64:
            parameter.data = parameter.data.double()
    return Embedder(model, adapter, seed=7, attention_dropout=0.2)


def gradients(found):
    return {name: parameter.grad.double() for name, parameter in found.adapter.named_parameters().items()}


def plain(directory, dtype):
    """The loss and its gradients by autograd through one forward of all sequences."""
    found = embedder(directory, dtype)
    with found.embed(PackedRows.of(rows(), range(len(LENGTHS)))) as (pooled, _):
        loss = loss_of(pooled)
        loss.backward()
    return loss.item(), gradients(found)


@functools.cache
def expected(directory):
    """float64, and one forward and backward in bf16."""
    return plain(directory, torch.float64), plain(directory, torch.bfloat16)


def error(found, reference):
    return ((found - reference).norm() / reference.norm()).item()


@pytest.mark.parametrize("cut", CUTS)
def test_the_gradients_are_as_near_to_float64_as_those_of_one_forward(tiny_llama_dir, cut):
    (loss, reference), (plain_loss, plain_gradients) = expected(tiny_llama_dir)
    found = embedder(tiny_llama_dir, torch.bfloat16)
    groups = micro_batches(rows().lengths, CUTS[cut])
    assert len(groups) == {"one": 1, "three": 3, "all": len(LENGTHS)}[cut]
    micro_losses = []
    for micro in cached_losses(found, rows(), loss_of, CUTS[cut]):
        assert micro.loss.requires_grad
        micro.loss.backward()
        micro_losses.append(float(micro.value))
    assert len(micro_losses) == len(groups)
    assert abs(sum(micro_losses) - loss) <= 2 * abs(plain_loss - loss) + FLOOR * loss
    ours = gradients(found)
    for name, exact in reference.items():
        assert 0 < error(plain_gradients[name], exact) < 0.1  # bf16's, and worth comparing with
        assert error(ours[name], exact) <= 2 * error(plain_gradients[name], exact) + FLOOR, name


def test_the_trunk_is_bf16_and_the_adapter_fp32(tiny_llama_dir):
    found = embedder(tiny_llama_dir, torch.bfloat16)
    adapted = {id(parameter) for parameter in found.adapter.named_parameters().values()}
    dtypes = {(id(p) in adapted, p.dtype) for p in found.model.parameters()}
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}
    with found.embed(PackedRows.of(rows(), [0, 1])) as (pooled, _):
        assert pooled.dtype == torch.bfloat16
