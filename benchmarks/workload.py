"""What benchmarks/train_step.py and encode.py run: a decoder, from a checkpoint or random, and its training data.

A random model has a named shape and needs no file, no network and no tokenizer: its tokens are random too, and its
sentences have the lengths of real ones.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from attention import SENTENCES, drawn, shuffled
from torch import Tensor

from bivec.engine.data import BlockDataset, SentenceDataset, load_texts, mntp_blocks, sentence_ids
from bivec.engine.inputs import resolve_model
from bivec.engine.masking import MaskingConfig
from bivec.engine.tokenizer import load_tokenizer, mask_token_id
from bivec.models import Checkpoint, DecoderConfig, Llama, Mistral, load_pretrained

DATA = Path(__file__).resolve().parents[1] / "recipes" / "data"
SHAPES = {
    "tiny": DecoderConfig(
        model_type="llama",
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        rms_norm_eps=1e-5,
        max_position_embeddings=512,
    ),
    "llama-1.3b": DecoderConfig(  # Sheared-LLaMA
        model_type="llama",
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5504,
        num_layers=24,
        num_heads=16,
        num_kv_heads=16,
        head_dim=128,
        rms_norm_eps=1e-5,
        max_position_embeddings=4096,
    ),
    "mistral-7b": DecoderConfig(  # v0.2
        model_type="mistral",
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=14336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        rms_norm_eps=1e-5,
        max_position_embeddings=32768,
        rope_theta=1e6,
    ),
}
MASK_TOKEN = 3  # of random models


def random_checkpoint(shape: str, dtype: torch.dtype, device: torch.device) -> Checkpoint:
    """A random decoder of a named shape.

    Every matrix keeps the size of its input, so attention is not flat; all tokens share a direction, so sentences
    resemble one another, and SimCSE has something to tell apart.
    """
    config = SHAPES[shape]
    generator = torch.Generator(device).manual_seed(0)

    def fill(weight: Tensor, deviation: float) -> Tensor:
        return weight.normal_(0.0, deviation, generator=generator)

    with torch.device("meta"):
        model = {"llama": Llama, "mistral": Mistral}[config.model_type](config)
    model = model.to(dtype).to_empty(device=device).requires_grad_(False)
    for name, weight in model.named_parameters():
        if weight.dim() == 1:
            weight.fill_(1.0)
        else:
            fill(weight, 1.0 if name == "embed_tokens.weight" else weight.shape[1] ** -0.5)
    model.embed_tokens.weight += fill(torch.empty(config.hidden_size, dtype=dtype, device=device), 0.5)
    head = torch.empty(config.vocab_size, config.hidden_size, dtype=dtype, device=device)
    return Checkpoint(model.eval(), fill(head, config.hidden_size**-0.5), Path(shape), config)


def load_checkpoint(model: str, shape: str | None, dtype: torch.dtype, device: torch.device) -> Checkpoint:
    """The decoder of ``--model``, frozen, or a random one of ``--shape``."""
    if shape is not None:
        return random_checkpoint(shape, dtype, device)
    checkpoint = load_pretrained(resolve_model(model), dtype=dtype, device=device)
    checkpoint.model.requires_grad_(False)
    return checkpoint


def mntp_data(
    checkpoint: Checkpoint, length: int, count: int, *, is_random: bool, probability: float
) -> tuple[BlockDataset, MaskingConfig]:
    """At least ``count`` blocks of ``length`` tokens, of the shipped paragraphs or random, and how they are masked."""
    vocabulary = checkpoint.config.vocab_size
    if is_random:
        ids = np.random.default_rng(0).integers(MASK_TOKEN + 1, vocabulary, (count, length), dtype=np.int32)
        return BlockDataset(ids, np.zeros(ids.shape, bool)), MaskingConfig(MASK_TOKEN, vocabulary, probability)
    tokenizer = load_tokenizer(checkpoint.tokenizer_path)
    blocks = mntp_blocks(load_texts(DATA / "wikitext2_paragraphs.txt.gz"), tokenizer, length)
    masking = MaskingConfig(mask_token_id(tokenizer), min(len(tokenizer), vocabulary), probability)
    return blocks, masking


def simcse_data(checkpoint: Checkpoint, max_length: int, count: int, *, is_random: bool) -> SentenceDataset:
    """At least ``count`` sentences: those that ship, or random tokens in their lengths."""
    if not is_random:
        tokenizer = load_tokenizer(checkpoint.tokenizer_path)
        return sentence_ids(load_texts(DATA / "wikipedia_sentences.txt.gz", drop_empty=True), tokenizer, max_length)
    lengths = shuffled(drawn(SENTENCES, count, longest=max_length))
    ids = np.random.default_rng(1).integers(MASK_TOKEN + 1, checkpoint.config.vocab_size, sum(lengths), dtype=np.int32)
    return SentenceDataset(ids, np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)]))
