"""The encoder: text in, embeddings out.

Texts are tokenised, sorted by token length, packed by a token budget, run without padding and pooled over spans of the
packed hidden states, so neither the batch size nor the order changes a vector beyond rounding (METHOD 11: padded bf16
batches of the original did).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from bivec.engine.errors import BivecError, ConfigError
from bivec.engine.lora import load_adapter
from bivec.engine.packing import token_budget_batches
from bivec.engine.tokenizer import load_tokenizer, prefix_length
from bivec.kernels import segment_pool
from bivec.models import DecoderConfig, PackedBatch, load_pretrained, save_pretrained
from bivec.models.files import write_text_atomic

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CONFIG_FILE = "bivec_config.json"
DEFAULT_TOKENS_PER_BATCH = 4096
# ours and llm2vec's name -> mode of segment_pool
POOLINGS = {
    "mean": "mean",
    "weighted_mean": "weighted_mean",
    "last_token": "last",
    "eos_token": "last",
    "bos_token": "first",
}


@dataclass(frozen=True)
class EncoderConfig:
    """How texts become vectors; stored beside the weights as ``bivec_config.json``."""

    pooling: str = "mean"  # "mean" | "weighted_mean" | "last_token" | "eos_token" | "bos_token"
    pool_bos: bool = True  # False: special tokens in front are left out of the pooled span, as in the released LLM2Vec
    causal: bool = False
    max_length: int = 512  # tokens, special ones included; the tail is cut
    template: str | None = None  # "[INST] {text} [/INST]"; what follows {text} is pooled too (METHOD 5.4)

    def __post_init__(self) -> None:
        if self.pooling not in POOLINGS:
            raise ConfigError(f"pooling {self.pooling!r} is unknown; choose one of {', '.join(POOLINGS)}")
        if self.max_length < 2:
            raise ConfigError(f"max_length {self.max_length} is too short; at least 2 tokens are needed")
        if self.template is not None and self.template.count("{text}") != 1:
            raise ConfigError(f"template {self.template!r} must contain {{text}} exactly once")


@dataclass(frozen=True)
class _Tokenised:
    input_ids: list[int]
    start: int  # first pooled token
    index: int  # position in the input list


class Encoder:
    """A decoder, its tokenizer and a pooling rule. Make one with :meth:`from_pretrained`."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerFast,
        config: EncoderConfig | None = None,
        *,
        lm_head_weight: Tensor | None = None,
        backend: str | None = None,
    ):
        config = config or EncoderConfig()
        positions = model.config.max_position_embeddings
        self.model, self.tokenizer, self.backend = model, tokenizer, backend
        self.config = replace(config, max_length=min(config.max_length, positions))
        self.lm_head_weight = lm_head_weight
        self._prefix = prefix_length(tokenizer)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        adapters: Sequence[str | Path] = (),
        pooling: str | None = None,
        pool_bos: bool | None = None,
        causal: bool | None = None,
        max_length: int | None = None,
        template: str | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        backend: str | None = None,
    ) -> Encoder:
        """Loads an encoder.

        Args:
            path: a run directory (its ``merged/``), a Hugging Face or sentence-transformers directory, a ``.gguf`` file, or
                a hub id.
            adapters: PEFT adapter directories, merged into the weights in this order.
            pooling: "mean", "weighted_mean", "last_token" or "bos_token"; None = what the directory says, else "mean".
            pool_bos: pool special tokens in front too; None = what the directory says, else True (as every other library).
            causal: the decoder's own mask; None = what the directory says, else bidirectional.
            max_length: in tokens; None = what the directory says, else 512.
            template: a string with ``{text}``; None = what the directory says, else none.
            dtype: None = float32 on CPU, else the checkpoint's.
            device: None = CPU.
            backend: of the kernels.

        Raises:
            BivecError: a directory of no known layout, damaged files, unknown settings.
        """
        path = _weights_directory(path)
        checkpoint = load_pretrained(path, dtype=dtype, device=device)
        for adapter in adapters:
            load_adapter(checkpoint.model, adapter).merge()
        stored = read_encoder_config(Path(checkpoint.tokenizer_path), checkpoint.config)
        asked = {
            "pooling": pooling,
            "pool_bos": pool_bos,
            "causal": causal,
            "max_length": max_length,
            "template": template,
        }
        config = replace(stored, **{field: value for field, value in asked.items() if value is not None})
        tokenizer = load_tokenizer(checkpoint.tokenizer_path)
        return cls(checkpoint.model, tokenizer, config, lm_head_weight=checkpoint.lm_head_weight, backend=backend)

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    @property
    def dimension(self) -> int:
        """Width of an embedding."""
        return self.model.config.hidden_size

    def encode(
        self,
        sentences: str | Sequence[str] | Sequence[Sequence[str]],
        *,
        instruction: str | None = None,
        batch_size: int | None = None,
        tokens_per_batch: int | None = None,
        normalize_embeddings: bool = False,
        convert_to_tensor: bool = False,
        show_progress_bar: bool | None = None,
    ) -> np.ndarray | Tensor:
        """Embeds texts.

        Args:
            sentences: a text, or a list of texts or of ``[instruction, text]`` pairs.
            instruction: put before every text of the list, not pooled (a final colon is the caller's).
            batch_size: at most this many texts a batch; None = bounded by tokens only.
            tokens_per_batch: tokens a batch, 4096 by default; memory grows with it, vectors do not change.
            normalize_embeddings: to unit length.
            convert_to_tensor: return a torch tensor instead of a numpy array.
            show_progress_bar: None = only for more than 1,000 texts.

        Returns:
            float32 [D] for one text, else [N, D] in input order; on CPU.

        Raises:
            BivecError: an input that is neither a text nor a pair, or a text of which truncation leaves nothing to pool.
        """
        single = isinstance(sentences, str)
        texts = [sentences] if single else list(sentences)
        rows = [self._tokenise(item, instruction, index) for index, item in enumerate(texts)]
        embeddings = torch.empty(len(rows), self.dimension, dtype=torch.float32)
        for batch, spans, indices in self._batches(rows, batch_size, tokens_per_batch, show_progress_bar):
            with torch.inference_mode():
                hidden = self.model(batch, causal=self.config.causal, backend=self.backend)
                pooled = segment_pool(
                    hidden,
                    batch.cu_seqlens,
                    mode=POOLINGS[self.config.pooling],
                    span_starts=spans,
                    span_ends=batch.cu_seqlens[1:].long(),
                    backend=self.backend,
                )
            embeddings[indices] = pooled.float().cpu()
        if normalize_embeddings:
            embeddings = torch.nn.functional.normalize(embeddings, dim=-1)
        result = embeddings[0] if single else embeddings
        return result if convert_to_tensor else result.numpy()

    def encode_tokens(
        self,
        sentences: str | Sequence[str],
        *,
        batch_size: int | None = None,
        tokens_per_batch: int | None = None,
        show_progress_bar: bool | None = None,
    ) -> list[Tensor] | Tensor:
        """The hidden state of every token (after the final norm), special tokens included.

        Args:
            sentences: a text or a list of texts.
            batch_size: see :meth:`encode`.
            tokens_per_batch: see :meth:`encode`.
            show_progress_bar: see :meth:`encode`.

        Returns:
            float32 [n_tokens, D] for one text, else a list of those in input order; rows follow ``tokenizer(text).input_ids``.
        """
        single = isinstance(sentences, str)
        rows = [self._tokenise(item, None, i) for i, item in enumerate([sentences] if single else list(sentences))]
        result: list[Tensor] = [torch.empty(0)] * len(rows)
        for batch, _, indices in self._batches(rows, batch_size, tokens_per_batch, show_progress_bar):
            with torch.inference_mode():
                hidden = self.model(batch, causal=self.config.causal, backend=self.backend).float().cpu()
            for index, states in zip(indices, hidden.split(batch.cu_seqlens.diff().tolist()), strict=True):
                result[index] = states
        return result[0] if single else result

    def save_pretrained(self, path: str | Path) -> None:
        """Writes weights, tokenizer and pooling rule into a directory that :meth:`from_pretrained` and transformers load.

        Raises:
            BivecError: the disk is full.
        """
        path = Path(path)
        save_pretrained(self.model, path, is_causal=self.config.causal)
        self.tokenizer.save_pretrained(path)
        write_text_atomic(path / CONFIG_FILE, json.dumps(asdict(self.config), indent=2) + "\n")

    def _tokenise(self, item: str | Sequence[str], instruction: str | None, index: int) -> _Tokenised:
        text = item
        if not isinstance(item, str):
            if not (
                isinstance(item, (list, tuple)) and len(item) >= 2 and all(isinstance(part, str) for part in item[:2])
            ):
                raise BivecError(
                    f"text {index} is {type(item).__name__}, expected a str or an [instruction, text] pair"
                )
            instruction, text = item[0], item[1]
        # instruction, one space, text: the order and spacing of the released models (METHOD 7.1)
        head = f"{instruction.strip()} " if instruction else ""
        body = text
        if self.config.template is not None:
            before, after = self.config.template.split("{text}")
            head, body = before + head, text.strip() + after
        encoded = self.tokenizer(
            head + body, truncation=True, max_length=self.config.max_length, return_offsets_mapping=bool(head)
        )
        ids = encoded.input_ids
        if not head:
            # an empty text has only its special tokens: they are its pooled span then
            start = 0 if self.config.pool_bos or len(ids) <= self._prefix else self._prefix
        else:
            # the pooled span starts with the first token that reaches beyond the head (METHOD 5.4, by offsets)
            start = next((i for i, (_, end) in enumerate(encoded.offset_mapping) if end > len(head)), len(ids))
        if start >= len(ids):
            raise BivecError(
                f"text {index}: its instruction fills all {self.config.max_length} tokens (max_length) or its text is empty; "
                "nothing is left to pool"
            )
        return _Tokenised(ids, start, index)

    def _batches(
        self,
        rows: list[_Tokenised],
        batch_size: int | None,
        tokens_per_batch: int | None,
        show_progress_bar: bool | None,
    ):
        """Yields (packed batch, first pooled row of each sequence [B], positions in the input list)."""
        from tqdm import tqdm

        lengths = [len(row.input_ids) for row in rows]
        groups = token_budget_batches(lengths, tokens_per_batch or DEFAULT_TOKENS_PER_BATCH, max_sequences=batch_size)
        show = len(rows) > 1000 if show_progress_bar is None else show_progress_bar
        with tqdm(total=len(rows), desc="encode", unit="text", disable=not show, leave=False) as bar:
            for group in groups:
                batch = PackedBatch.from_sequences([rows[i].input_ids for i in group], device=self.device)
                starts = torch.tensor([rows[i].start for i in group], device=self.device)
                yield batch, batch.cu_seqlens[:-1].long() + starts, [rows[i].index for i in group]
                bar.update(len(group))


def read_encoder_config(folder: Path, config: DecoderConfig) -> EncoderConfig:
    """The pooling rule stored in a directory; defaults where it says nothing.

    Raises:
        ConfigError: a ``bivec_config.json`` that is not JSON or has unknown fields.
    """
    defaults = EncoderConfig(causal=bool(config.is_causal))
    file = folder / CONFIG_FILE
    if not file.is_file():
        return defaults
    try:
        return replace(defaults, **json.loads(file.read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{file}: {error}") from error


def _weights_directory(path: str | Path) -> str | Path:
    """A run directory stands for its ``merged/``."""
    merged = Path(path) / "merged"
    return merged if (merged / "config.json").is_file() and not (Path(path) / "config.json").is_file() else path
