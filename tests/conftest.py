"""Triton's interpreter where there is no GPU, and tiny random checkpoints with a real tokenizer."""

from __future__ import annotations

import copy
import gzip
import os
from collections.abc import Callable
from functools import cache
from itertools import islice
from pathlib import Path

# OpenBLAS reads this as numpy is loaded; with more threads the interpreter's small products are many times slower.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings

# the same examples in every run, whatever the machine's speed: a failure here is a failure everywhere
settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.load_profile("repeatable")

if "PYTEST_XDIST_WORKER" in os.environ:  # `pytest -n`: a worker for each CPU, with one thread each
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # and so the processes that tests start

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton; processes that compile remove it

SAMPLE = Path(__file__).parents[1] / "recipes/data/wikitext2_paragraphs.txt.gz"
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "initializer_range": 0.1,  # at the default 0.02 attention is flat and the mask makes no difference to see
}


def _repair_bf16_dots() -> None:
    """The interpreter multiplies the bit patterns of bf16 operands, as integers: it is given fp32 instead."""
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    create_dot = InterpreterBuilder.create_dot

    def widened(x: TensorHandle) -> TensorHandle:
        if x.dtype.scalar != tl.bfloat16:
            return x
        return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def repaired(self, a, b, *rest):
        return create_dot(self, widened(a), widened(b), *rest)

    InterpreterBuilder.create_dot = repaired


if os.environ.get("TRITON_INTERPRET") == "1":
    _repair_bf16_dots()


def _tokenizer():
    """A byte-level BPE of 1,000 entries, trained on the recipes' sample; it prepends ``<s>``, as LLaMA's does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # the blank "_" is one of its 256 characters
        show_progress=False,
    )
    with gzip.open(SAMPLE, "rt", encoding="utf-8") as lines:
        backend.train_from_iterator(islice(lines, 400), trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>")


# Fields of config.json beside SHAPE. Where layers of a family differ, of the two layers one has a window, or rotates
# nothing. A family that is not here has none.
FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 24},
    "qwen2": {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1},
    "qwen3": {"head_dim": 32},
    "smollm3": {"use_sliding_window": True, "sliding_window": 24, "no_rope_layer_interval": 2},
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 32, "sliding_window": 24, "attn_logit_softcapping": 5.0},
    "gemma3_text": {
        "head_dim": 16,
        "sliding_window": 24,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        },
    },
}


def _write_checkpoint(directory: Path, family: str) -> Path:
    import transformers

    from bivec.models.families import FAMILIES as REGISTERED

    tokenizer, fields = _tokenizer(), copy.deepcopy(FAMILIES.get(family, {}))  # transformers adds to the dicts
    config = transformers.AutoConfig.for_model(family, vocab_size=len(tokenizer), pad_token_id=1, **SHAPE, **fields)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, REGISTERED[family].causal_lm)(config)
        for parameter in model.parameters():
            if parameter.dim() == 1 and family not in ("llama", "mistral"):  # a norm or bias left out would not show
                parameter.data += 0.3 * torch.randn(parameter.shape)
        model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Gives for a registered family the directory of a causal language model of it, written at the first call.

    Hidden 64, 2 layers, 4 heads, 2 KV heads, 1,000 tokens, BOS added; random.
    """
    return cache(lambda family: _write_checkpoint(tmp_path_factory.mktemp("tiny") / family, family))


@pytest.fixture(scope="session")
def tiny_llama_dir(tiny_dir: Callable[[str], Path]) -> Path:
    """A LlamaForCausalLM directory, see ``tiny_dir``."""
    return tiny_dir("llama")


@pytest.fixture(scope="session")
def tiny_mistral_dir(tiny_dir: Callable[[str], Path]) -> Path:
    """The same as a MistralForCausalLM with a sliding window of 24 tokens."""
    return tiny_dir("mistral")
