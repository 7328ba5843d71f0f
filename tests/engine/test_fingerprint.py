"""Checksums see what makes another model or tokenizer, and nothing else."""

from dataclasses import replace

import torch

from bivec.engine.encoder import Encoder
from bivec.engine.fingerprint import model_checksum, tokenizer_checksum
from bivec.engine.lora import LoraConfig, add_lora


def test_weights(tiny_llama_dir):
    model, same = (Encoder.from_pretrained(tiny_llama_dir).model for _ in range(2))
    before = model_checksum(model)
    assert before == model_checksum(same)
    adapter = add_lora(same, LoraConfig(rank=2, alpha=4))
    with torch.no_grad():
        for name, parameter in adapter.named_parameters().items():
            parameter.fill_(1e-3) if name.endswith("q_proj.lora_B.weight") else None
    adapter.merge()
    assert model_checksum(same) != before
    assert model_checksum(model.bfloat16()) != before


def test_every_weight_counts():
    model = torch.nn.Linear(5000, 3)
    before = model_checksum(model)
    with torch.no_grad():
        model.weight[2, 4321] = torch.nextafter(model.weight[2, 4321], torch.tensor(9.0))
    assert model_checksum(model) != before


def test_the_configuration_counts(tiny_mistral_dir):
    """A window changes no weight."""
    model = Encoder.from_pretrained(tiny_mistral_dir).model
    before = model_checksum(model)
    model.config = replace(model.config, sliding_window=25)
    assert model_checksum(model) != before


def test_tokenizer(tiny_llama_dir):
    tokenizer = Encoder.from_pretrained(tiny_llama_dir).tokenizer
    before = tokenizer_checksum(tokenizer)
    tokenizer(["some words"], truncation=True, max_length=2, padding=True)
    assert tokenizer_checksum(tokenizer) == before
    tokenizer.add_tokens(["a new one"])
    assert tokenizer_checksum(tokenizer) != before
