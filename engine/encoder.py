"""The encoder: text in, embeddings out.

Texts are tokenised (of long lists by a thread, while those before are encoded), sorted by token length, packed by a
token budget, run without padding and pooled over spans of the packed hidden states, so neither the batch size nor the
order changes a vector beyond rounding (METHOD 11: padded bf16 batches of the original did).

The one class of the package that everybody meets is stated in one place; most of its lines say what its arguments mean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from operator import length_hint
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from bivec.engine.encoder_config import POOLINGS, EncoderConfig, text_format
from bivec.engine.encoder_inputs import as_list, as_texts, one_ahead, progress_bar, split_pair, text_head
from bivec.engine.layouts import open_encoder
from bivec.engine.lora import Adapter
from bivec.engine.origin import Origin, loaded_fingerprint
from bivec.engine.packing import token_budget_batches
from bivec.engine.text_format import Row, RowFormat, SpanError, check_unicode, encoding_head
from bivec.kernels import segment_pool
from bivec.models import Llama, PackedBatch
from bivec.models.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from bivec.engine.evaluation.mteb_encoder import MTEBEncoder
    from bivec.engine.model_card import ModelCard

DEFAULT_TOKENS_PER_BATCH = 4096
SLICE_TEXTS = 4096  # of a long list a thread tokenises so many while those before are encoded


class Encoder:
    """A decoder, its tokenizer and a pooling rule. Make one with :meth:`from_pretrained`."""

    def __init__(
        self,
        model: Llama,
        tokenizer: PreTrainedTokenizerFast,
        config: EncoderConfig | None = None,
        *,
        lm_head_weight: Tensor | None = None,
        backend: str | None = None,
        prompts: Mapping[str, str] | None = None,
        origin: Origin | None = None,
        adapter: Adapter | None = None,
    ):
        config = config or EncoderConfig()
        positions = model.config.max_position_embeddings
        self.model, self.tokenizer, self.backend = model, tokenizer, backend
        self.config = replace(config, max_length=min(config.max_length, positions))
        self.lm_head_weight = lm_head_weight
        self.prompts, self.adapter, self._origin = dict(prompts or {}), adapter, origin or Origin()
        self._text_format: RowFormat = text_format(self.config, tokenizer)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        adapters: Sequence[str | Path] = (),
        merge: bool = True,
        tokenizer: str | Path | None = None,
        pooling: str | None = None,
        pool_bos: bool | None = None,
        pool_tail: bool | None = None,
        causal: bool | None = None,
        max_length: int | None = None,
        template: str | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        backend: str | None = None,
    ) -> Encoder:
        """Loads an encoder.

        Args:
            path: a run directory (its ``merged/``), a Hugging Face, LLM2Vec or sentence-transformers directory, one
                that holds an adapter alone (its base model is named inside), a ``.gguf`` file, or a hub id.
            adapters: PEFT adapters, directories or hub ids, merged into the weights in this order.
            merge: False leaves the last of ``adapters`` live, as ``encoder.adapter``: ``remove()`` takes it off again,
                ``merge()`` puts it into the weights, which a save needs. The settings are that adapter's, taken off or
                not: the decoder's own come with a decoder that is opened without it.
            tokenizer: directory, ``.gguf`` file or hub id of the tokenizer; None = the model's. Where it puts no BOS in
                front of a text, one is added for a mere decoder; an encoder, whoever made it, keeps it as it is.
            pooling: "mean", "weighted_mean", "last_token", "eos_token" or "bos_token"; None = what the directory says,
                else "mean".
            pool_bos: pool special tokens in front too; None = what the directory says, else True (as other libraries).
            pool_tail: pool what follows the text too, the template's tail; None = what the directory says, else True
                (as the released LLM2Vec models).
            causal: the decoder's own mask; None = what the directory says, else bidirectional.
            max_length: in tokens; None = what the directory says, else 512.
            template: a string with ``{text}``, the short name of one ("llama-3", "mistral", "llama-2", "gemma-2",
                "qwen-2") or "none"; None = what the directory says, else none. The model's name never chooses one.
            dtype: None = float32 on CPU, else the checkpoint's.
            device: None = CPU.
            backend: of the kernels.

        Raises:
            BivecError: no known layout, damaged files, unknown settings, an adapter of another base, merged before,
                or trained on other weights than these.
        """
        settings = {
            "pooling": pooling,
            "pool_bos": pool_bos,
            "pool_tail": pool_tail,
            "causal": causal,
            "max_length": max_length,
            "template": template,
        }
        opened = open_encoder(
            path, adapters=adapters, merge=merge, tokenizer=tokenizer, settings=settings, dtype=dtype, device=device
        )
        return cls(
            opened.checkpoint.model,
            opened.tokenizer,
            opened.config,
            lm_head_weight=opened.checkpoint.lm_head_weight,
            backend=backend,
            prompts=opened.prompts,
            origin=opened.origin,
            adapter=opened.adapter,
        )

    @property
    def origin(self) -> Origin:
        """Where the weights come from: the decoder, and the adapters that are in them."""
        if self.adapter is None or not self.adapter.merged:
            return self._origin
        return self._origin.with_adapter(self.adapter.name, loaded_fingerprint(self.adapter))

    @property
    def device(self) -> torch.device:
        """Where the weights are, and every batch is put."""
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
        prompt: str | None = None,
        prompt_name: str | None = None,
        batch_size: int | None = None,
        tokens_per_batch: int | None = None,
        max_text_length: int | None = None,
        normalize_embeddings: bool | None = None,
        convert_to_tensor: bool = False,
        show_progress_bar: bool | None = None,
    ) -> np.ndarray | Tensor:
        """Embeds texts.

        Args:
            sentences: a text, or a list of texts or of ``[instruction, text]`` pairs. Of a text longer than
                ``max_length`` the last tokens are cut; instruction and template stay whole.
            instruction: put before every text of the list, not pooled (a final colon is the caller's).
            prompt: put before every text of the list to the letter, in place of an instruction and of the template's
                head, as sentence-transformers does; pooled or not as an instruction is.
            prompt_name: one of ``self.prompts``.
            batch_size: at most this many texts a batch; None = bounded by tokens only.
            tokens_per_batch: tokens a batch, 4096 by default; memory grows with it, vectors do not change.
            max_text_length: tokens of a text alone, instruction and template not counted: a longer one loses its last
                words (METHOD 7.1 evaluates with 400). None = only ``max_length`` counts.
            normalize_embeddings: to unit length; None = as ``config.normalize`` says.
            convert_to_tensor: return a torch tensor instead of a numpy array.
            show_progress_bar: None = only for more than 1,000 texts.

        Returns:
            float32 [D] for one text, else [N, D] in input order; on CPU. For an empty text the whole row is pooled:
            special tokens, instruction and template.

        Raises:
            BivecError: an input that is neither a text nor a pair, an instruction that leaves no room for its text, an
                unknown prompt name, or more than one of instruction, prompt and prompt_name.
        """
        single, head = isinstance(sentences, str), self.text_head(instruction, prompt, prompt_name)
        pairs = [split_pair(item, head, index) for index, item in enumerate(as_list(sentences))]
        starts = range(0, len(pairs), SLICE_TEXTS)
        embeddings = torch.empty(len(pairs), self.dimension, dtype=torch.float32)
        with progress_bar(len(pairs), show_progress_bar) as advance:
            for start, vectors in self.embed_slices(
                [(start, pairs[start : start + SLICE_TEXTS]) for start in starts],
                batch_size=batch_size,
                tokens_per_batch=tokens_per_batch,
                max_text_length=max_text_length,
                normalize_embeddings=normalize_embeddings,
                advance=advance,
            ):
                embeddings[start : start + len(vectors)] = vectors
        result = embeddings[0] if single else embeddings
        return result if convert_to_tensor else result.numpy()

    def text_head(
        self, instruction: str | None = None, prompt: str | None = None, prompt_name: str | None = None
    ) -> str:
        """What :meth:`embed_slices` takes as the instruction of a text, by the arguments of :meth:`encode`.

        Raises:
            BivecError: an unknown name, or more than one argument.
        """
        return text_head(self.prompts, instruction, prompt, prompt_name)

    def embed_slices(
        self,
        slices: Iterable[tuple[int, list[tuple[str, str]]]],
        *,
        batch_size: int | None = None,
        tokens_per_batch: int | None = None,
        max_text_length: int | None = None,
        normalize_embeddings: bool | None = None,
        advance: Callable[[int], object] = lambda _: None,
    ) -> Iterator[tuple[int, Tensor]]:
        """Embeds slices of texts that need not all be in memory; a thread reads and tokenises the next one meanwhile.

        Args:
            slices: (position of its first text, (instruction, text) pairs) of every slice. They are sorted and packed
                slice by slice, and one slice more than the one that is encoded is held.
            batch_size: see :meth:`encode`, as the following.
            tokens_per_batch: tokens a batch.
            max_text_length: tokens of a text alone.
            normalize_embeddings: see :meth:`encode`.
            advance: called with the number of texts of every batch.

        Yields:
            (position of the slice's first text, embeddings [N, D] float32 on the CPU in the slice's order).

        Raises:
            BivecError: an instruction that leaves no room for its text; it is named by its position.
        """
        tokenised = ((first, self._tokenise(pairs, max_text_length, first)) for first, pairs in slices)
        unit = self.config.normalize if normalize_embeddings is None else normalize_embeddings
        ahead = iter if length_hint(slices, 2) < 2 else one_ahead  # one slice needs no thread
        for first, rows in ahead(tokenised):
            # one copy a slice: a copy a batch would make a GPU wait for the host as often
            embeddings = torch.empty(len(rows), self.dimension, dtype=torch.float32, device=self.device)
            states = self.hidden_states(
                [row.input_ids for row in rows],
                batch_size=batch_size,
                tokens_per_batch=tokens_per_batch,
                show_progress_bar=False,
            )
            for hidden, cu_seqlens, indices in states:
                spans = [(rows[i].start, rows[i].end) for i in indices]
                embeddings[self._index(indices)] = self.pool_spans(hidden, cu_seqlens, spans, self.config.pooling)
                advance(len(indices))
            if unit:
                embeddings = torch.nn.functional.normalize(embeddings, dim=-1)
            yield first, embeddings.cpu()

    def encode_tokens(
        self,
        sentences: str | Sequence[str],
        *,
        batch_size: int | None = None,
        tokens_per_batch: int | None = None,
        show_progress_bar: bool | None = None,
    ) -> list[Tensor] | Tensor:
        """The hidden state of every token (after the final norm), special tokens included; no template, no instruction.

        Args:
            sentences: a text or a list of texts.
            batch_size: see :meth:`encode`.
            tokens_per_batch: see :meth:`encode`.
            show_progress_bar: see :meth:`encode`.

        Returns:
            float32 [n_tokens, D] for one text, else a list of those in input order; the rows are those of
            ``tokenizer(text).input_ids``, cut at ``max_length``.

        Raises:
            BivecError: an input that is not a text.
        """
        single, texts = isinstance(sentences, str), as_texts(sentences)
        rows: list[list[int]] = []
        for index, text in enumerate(texts):
            check_unicode(index, text)
        if texts:
            rows = self.tokenizer(texts, truncation=True, max_length=self.config.max_length).input_ids
        result: list[Tensor] = [torch.empty(0)] * len(rows)
        for hidden, cu_seqlens, indices in self.hidden_states(
            rows, batch_size=batch_size, tokens_per_batch=tokens_per_batch, show_progress_bar=show_progress_bar
        ):
            for index, states in zip(indices, hidden.float().cpu().split(cu_seqlens.diff().tolist()), strict=True):
                result[index] = states
        return result[0] if single else result

    def hidden_states(
        self,
        rows: Sequence[Sequence[int]],
        *,
        batch_size: int | None = None,
        tokens_per_batch: int | None = None,
        show_progress_bar: bool | None = None,
    ) -> Iterator[tuple[Tensor, Tensor, list[int]]]:
        """The packed hidden states of rows of token ids, batch by batch, longest rows first.

        Args:
            rows: token ids, special ones included, each of at most the model's positions.
            batch_size: see :meth:`encode`.
            tokens_per_batch: see :meth:`encode`.
            show_progress_bar: see :meth:`encode`.

        Yields:
            (hidden_states [T, D] after the final norm in the model's dtype and on its device, cu_seqlens [B+1] int32
            there, the B rows' positions in ``rows``), without gradient.
        """
        budget = DEFAULT_TOKENS_PER_BATCH if tokens_per_batch is None else tokens_per_batch
        with progress_bar(len(rows), show_progress_bar) as advance:
            for group in token_budget_batches([len(row) for row in rows], budget, max_sequences=batch_size):
                batch = PackedBatch.from_sequences([rows[i] for i in group], device=self.device)
                # not inference_mode: the rotary tables that the model keeps would be inference tensors, which autograd
                # does not save for a backward pass
                with torch.no_grad():
                    hidden = self.model(batch, causal=self.config.causal, backend=self.backend)
                yield hidden, batch.cu_seqlens, group
                advance(len(group))

    def pool_spans(self, hidden: Tensor, cu_seqlens: Tensor, spans: Sequence[tuple[int, int]], pooling: str) -> Tensor:
        """Pools one span of every row of :meth:`hidden_states`.

        Args:
            hidden: [T, D].
            cu_seqlens: [B+1] int32.
            spans: of the B rows, (first token, last token + 1), counted from the row's first.
            pooling: a pooling's name, see :meth:`from_pretrained`.

        Returns:
            [B, D] float32 on the device.

        Raises:
            ConfigError: an unknown pooling.
        """
        if pooling not in POOLINGS:
            raise ConfigError(f"pooling {pooling!r} is unknown; choose one of {', '.join(POOLINGS)}")
        begins = cu_seqlens[:-1].long()
        pooled = segment_pool(
            hidden,
            cu_seqlens,
            mode=POOLINGS[pooling],
            span_starts=begins + self._index([start for start, _ in spans]),
            span_ends=begins + self._index([end for _, end in spans]),
            backend=self.backend,
        )
        return pooled.float()

    def as_mteb(
        self,
        *,
        instructions: Mapping[str, str] | None = None,
        paper_instructions: bool = True,
        name: str | None = None,
        revision: str | None = None,
        max_text_length: int | None = 400,
        tokens_per_batch: int | None = None,
    ) -> MTEBEncoder:
        """This encoder as ``mteb.evaluate`` takes it, by the paper's protocol (METHOD 7.1, 7.7).

        Args:
            instructions: {task: text}, besides the paper's or in their place; "" = none; a final colon is the caller's.
            paper_instructions: False leaves out the paper's.
            name: under which mteb keeps the results; None = one made of architecture and width.
            revision: the same; None = one that changes with weights and settings.
            max_text_length: see :meth:`encode`; None = no limit.
            tokens_per_batch: see :meth:`encode`.
        """
        from bivec.engine.evaluation.mteb_encoder import MTEBEncoder

        return MTEBEncoder(
            self,
            instructions=instructions,
            paper_instructions=paper_instructions,
            name=name,
            revision=revision,
            max_text_length=max_text_length,
            tokens_per_batch=tokens_per_batch,
        )

    def save_pretrained(
        self,
        path: str | Path,
        *,
        normalize: bool | None = None,
        prompts: Mapping[str, str] | None = None,
        card: ModelCard | None = None,
    ) -> None:
        """Writes a folder that bivec, sentence-transformers and transformers load with no code of ours.

        Where those cannot do what this encoder does (a template), the model card (README.md) and ``bivec_config.json``
        say so, and a warning if that concerns plain texts. Everything is written under a temporary name and moved when
        complete; other files of the directory stay, a README.md that is not ours included.

        Args:
            path: the directory.
            normalize: the folder is to give unit vectors, here and in sentence-transformers; None = as
                ``config.normalize`` says.
            prompts: by name, to the letter (``encode(prompt_name=…)``); None = ``self.prompts``.
            card: what the model card says beside what the encoder knows of itself.

        Raises:
            CheckpointError: the disk is full, ``path`` is a file or holds an adapter, or an adapter is not merged.
        """
        from bivec.engine.export import save_encoder

        save_encoder(self, path, normalize=normalize, prompts=prompts, card=card)

    def save_gguf(self, path: str | Path, *, dtype: str = "f16") -> None:
        """Writes a GGUF file for llama.cpp, with the pooling and the mask in its metadata.

        Args:
            path: of the file.
            dtype: "f32", "f16" or "bf16", of the matrices; norms and biases are always fp32.

        Raises:
            ConfigError: a family, a tokenizer or a pooling that GGUF has no name for.
            CheckpointError: the disk is full, or an adapter is not merged.
        """
        from bivec.engine.gguf_export import save_gguf

        save_gguf(self, path, dtype=dtype)

    def _index(self, values: list[int]) -> Tensor:
        """int64 on the device; a GPU need not stop for the copy."""
        return torch.tensor(values, dtype=torch.int64).to(self.device, non_blocking=self.device.type != "cpu")

    def _tokenise(self, pairs: list[tuple[str, str]], max_text_length: int | None = None, first: int = 0) -> list[Row]:
        """Token ids and pooled spans of (instruction, text) pairs; errors count from ``first``."""
        heads = [encoding_head(instruction) for instruction, _ in pairs]
        texts = [text for _, text in pairs]
        try:
            return self._text_format.rows(heads, texts, allow_empty=True, max_text_length=max_text_length)
        except SpanError as error:
            raise SpanError(first + error.index, str(error).partition(": ")[2]) from error
