"""One vector a word from a frozen encoder, computed once and kept on disk.

The words of a sentence, joined by single spaces, are tokenised as one text with its special tokens: no template and no
instruction. For SentencePiece vocabularies that gives the tokens of ``is_split_into_words=True``, which the original
uses; byte-level vocabularies (Llama 3, SmolLM2) would there see every word without the space that they know it with.
Character offsets say which tokens a word has; a token over several words belongs to each of them, one of white space
alone to the word behind it. With BOS, t11 t12, t21 t22 t23, t31 (METHOD 6.1):

    same_token   the mean over the word's tokens                       e2 = (t21 + t22 + t23) / 3
    next_token   the same, read one position to the left, where MNTP   e1 = (BOS + t11) / 2
                 has been trained to know a token                      e2 = (t12 + t21 + t22) / 3, e3 = t23
    first        the word's first token (merge_subwords=false, as the original for encoder-only models)

A word without a vector is one of which the tokenizer makes no token, or one that does not end within the encoder's
``max_length``: its row is zero, ``present`` says so, and the probe counts it as wrong.

Dropout is off: ``Encoder`` has none when it encodes, whatever the mode of its modules, and runs without gradients, so
two passes give the same bits (METHOD 6.2: the original trains with LoRA dropout on in the frozen encoder).

Source: METHOD 6.1, 6.2 (experiments/run_word_task.py of the LLM2Vec repository).
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from bivec.engine.errors import ConfigError, RunError
from bivec.engine.evaluation.word_data import WordCorpus
from bivec.engine.fingerprint import model_checksum, tokenizer_checksum
from bivec.engine.json_files import json_text
from bivec.engine.text_format import encode_strings
from bivec.kernels import segment_pool
from bivec.models.files import write_text_atomic

if TYPE_CHECKING:
    from tokenizers import Encoding

ALIGNMENTS = ("same_token", "next_token", "first")
TOKENIZE_ROWS = 1000
FORMAT = 1  # of the cache: raise it when the same inputs give other vectors


class WordEncoder(Protocol):
    """What is asked of an encoder; ``bivec.Encoder`` is one."""

    tokenizer: Any  # a fast tokenizer of transformers
    config: Any  # .max_length in tokens

    @property
    def dimension(self) -> int:
        """Width of a hidden state."""

    def hidden_states(
        self,
        rows: Sequence[Sequence[int]],
        *,
        tokens_per_batch: int | None = None,
        show_progress_bar: bool | None = None,
    ) -> Iterator[tuple[Tensor, Tensor, list[int]]]:
        """See :meth:`bivec.engine.encoder.Encoder.hidden_states`."""


@dataclass(frozen=True)
class WordFeatures:
    """The words' vectors, sentence after sentence."""

    vectors: np.ndarray  # [W, D] float16 or float32, memory mapped where they come from the cache
    present: np.ndarray  # [W] bool: False for words without a vector, whose row is zero
    offsets: np.ndarray  # [N + 1] int64: sentence i has the words offsets[i] … offsets[i + 1] - 1
    alignment: str
    computed: bool  # False: read from the cache

    @property
    def num_missing(self) -> int:
        """Words without a vector."""
        return int(np.count_nonzero(~self.present))


@dataclass(frozen=True)
class WordSpans:
    """Where the words are in the rows of token ids."""

    rows: list[list[int]]  # N rows of token ids, special ones included, cut at the encoder's max_length
    starts: np.ndarray  # [W] int64: first token in the word's row
    ends: np.ndarray  # [W] int64, exclusive; equal to starts for a word without a token
    offsets: np.ndarray  # [N + 1] int64, words


def word_spans(encoder: WordEncoder, sentences: Sequence[Sequence[str]]) -> WordSpans:
    """Tokenises sentences of words and finds the tokens of every word.

    Args:
        encoder: its tokenizer and its ``config.max_length`` are used.
        sentences: N lists of words; a list may be empty.

    Raises:
        ConfigError: the tokenizer is not a fast one.
        SpanError: a word that cannot be written in UTF-8.
    """
    if getattr(encoder.tokenizer, "backend_tokenizer", None) is None:
        raise ConfigError(f"{type(encoder.tokenizer).__name__} gives no character offsets: word tasks need a fast one")
    rows: list[list[int]] = []
    spans: list[tuple[int, int]] = []
    for begin in range(0, len(sentences), TOKENIZE_ROWS):
        group = sentences[begin : begin + TOKENIZE_ROWS]
        # not cut by the tokenizer but here, so that a word cut in two is known
        encodings = encode_strings(encoder.tokenizer, [" ".join(words) for words in group], begin)
        for words, encoding in zip(group, encodings, strict=True):
            row, found = _row_of(encoding, words, encoder.config.max_length)
            rows.append(row)
            spans += found
    lengths = np.fromiter(map(len, sentences), dtype=np.int64, count=len(sentences))
    offsets = np.concatenate([np.zeros(1, np.int64), lengths.cumsum()])
    bounds = np.array(spans, dtype=np.int64).reshape(-1, 2)
    return WordSpans(rows, bounds[:, 0], bounds[:, 1], offsets)


def align(spans: WordSpans, alignment: str) -> tuple[np.ndarray, np.ndarray]:
    """The positions over which a word's vector is the mean: (starts [W], ends [W]) in its row.

    Args:
        spans: from :func:`word_spans`.
        alignment: "same_token", "next_token" or "first"; see the module docstring.

    Raises:
        ConfigError: an unknown name, or next_token where nothing stands in front of a word.
    """
    if alignment not in ALIGNMENTS:
        raise ConfigError(f"alignment {alignment!r}: expected {', '.join(ALIGNMENTS)}")
    has_token = spans.ends > spans.starts
    if alignment == "first":
        return spans.starts, spans.starts + has_token
    if alignment == "same_token":
        return spans.starts, spans.ends
    if (has_token & (spans.starts == 0)).any():
        raise ConfigError(
            "alignment 'next_token' reads a word one position to the left, but this tokenizer puts no token in front "
            "of a text: load it with a BOS, or use 'same_token'"
        )
    return spans.starts - has_token, spans.ends - has_token


def word_features(
    encoder: WordEncoder,
    corpus: WordCorpus,
    alignments: Sequence[str],
    *,
    cache_dir: str | Path | None = None,
    name: str = "features",
    tokens_per_batch: int | None = None,
    show_progress_bar: bool | None = None,
) -> dict[str, WordFeatures]:
    """The vectors of a corpus's words, one forward pass for all alignments.

    Args:
        encoder: an ``Encoder``, or another object with its ``tokenizer`` (fast), ``config.max_length``, ``dimension``
            and ``hidden_states``.
        corpus: the words.
        alignments: which vectors.
        cache_dir: where ``<name>-<alignment>.npy`` (vectors, float16) and ``….json`` (fingerprint of weights, settings,
            tokenizer, words and alignment) are kept; files of another fingerprint are replaced. None = in memory.
        name: of the files: model, corpus and split.
        tokens_per_batch: see ``Encoder.encode``.
        show_progress_bar: see ``Encoder.encode``.

    Returns:
        The features by alignment. Float16 with a cache, else float32.

    Raises:
        ConfigError: see :func:`align` and :func:`word_spans`.
        RunError: a state that is not finite, or too large for float16.
    """
    spans = word_spans(encoder, corpus.sentences)
    bounds = {alignment: align(spans, alignment) for alignment in alignments}
    identity = {"format": FORMAT, "model": model_fingerprint(encoder), "words": corpus.fingerprint()}
    files = {} if cache_dir is None else {one: Path(cache_dir) / f"{name}-{one}.npy" for one in alignments}
    found: dict[str, WordFeatures] = {}
    for alignment, file in files.items():
        vectors = _read_cache(file, identity | {"alignment": alignment}, (len(spans.starts), encoder.dimension))
        if vectors is not None:
            present = spans.ends > spans.starts
            found[alignment] = WordFeatures(vectors, present, spans.offsets, alignment, computed=False)
    missing = [alignment for alignment in alignments if alignment not in found]
    if missing:
        sinks = {one: _allocate(files.get(one), (len(spans.starts), encoder.dimension)) for one in missing}
        try:
            _pool(
                encoder,
                spans,
                {one: (sinks[one][0], *bounds[one]) for one in missing},
                tokens_per_batch,
                show_progress_bar,
            )
            for alignment in missing:
                vectors, temporary = sinks[alignment]
                if isinstance(vectors, np.memmap) and temporary is not None:
                    vectors = _publish(vectors, temporary, files[alignment], identity | {"alignment": alignment})
                present = spans.ends > spans.starts
                found[alignment] = WordFeatures(vectors, present, spans.offsets, alignment, computed=True)
        finally:
            for _, temporary in sinks.values():
                if temporary is not None:
                    temporary.unlink(missing_ok=True)
    return {alignment: found[alignment] for alignment in alignments}


def model_fingerprint(encoder: WordEncoder) -> str:
    """A checksum of what the hidden states depend on: weights, tokenizer, mask, length."""
    model = getattr(encoder, "model", None)
    found = "none" if model is None else model_checksum(model)
    causal = getattr(encoder.config, "causal", None)
    mask = "unknown mask" if causal is None else "causal" if causal else "bidirectional"
    return f"model {found}, tokenizer {tokenizer_checksum(encoder.tokenizer)}, {mask}, {encoder.config.max_length}"


def _row_of(encoding: Encoding, words: Sequence[str], max_length: int) -> tuple[list[int], list[tuple[int, int]]]:
    """The row of one sentence, cut at ``max_length``, and the span of tokens of every word in it."""
    ids, special = encoding.ids, encoding.special_tokens_mask
    spans = _token_spans(encoding.offsets, special, words)
    if len(ids) > max_length:  # what the tokenizer puts behind a text stays
        tail = next((count for count, mark in enumerate(reversed(special)) if not mark), len(ids))
        kept = max(max_length - tail, 0)
        ids = ids[:kept] + ids[len(ids) - tail :]
        spans = [(start, end) if end <= kept else (0, 0) for start, end in spans]
    return ids, spans


def _token_spans(
    offsets: Sequence[tuple[int, int]], special: Sequence[int], words: Sequence[str]
) -> list[tuple[int, int]]:
    """First and last + 1 of the tokens of every word; (0, 0) for a word without one."""
    owner: list[int] = []  # word of every character of the joined text; the space belongs to the word behind it
    for index, word in enumerate(words):
        owner += [index] * (len(word) + (index > 0))
    word_starts = np.cumsum([0, *(len(word) + 1 for word in words)])
    spans = [(0, 0)] * len(words)
    for token, ((start, end), mark) in enumerate(zip(offsets, special, strict=True)):
        if mark or end <= start:
            continue
        # a space at the end of a token is not yet the next word
        last = owner[end - 1]
        if end - 1 > start and end == word_starts[last] and last > 0:
            last -= 1
        for inside in range(owner[start], last + 1):
            spans[inside] = (spans[inside][0] if spans[inside][1] else token, token + 1)
    return spans


def _pool(
    encoder: WordEncoder,
    spans: WordSpans,
    targets: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]],
    tokens_per_batch: int | None,
    show_progress_bar: bool | None,
) -> None:
    """Fills the targets: alignment -> (vectors [W, D] to write into, starts [W], ends [W])."""
    kept = [index for index, row in enumerate(spans.rows) if row]  # an empty sentence of a tokenizer without a BOS
    states = encoder.hidden_states(
        [spans.rows[index] for index in kept],
        tokens_per_batch=tokens_per_batch,
        show_progress_bar=show_progress_bar,
    )
    for hidden, cu_seqlens, group in states:
        indices = [kept[position] for position in group]
        words = np.concatenate([np.arange(spans.offsets[i], spans.offsets[i + 1]) for i in indices])
        counts = [int(spans.offsets[i + 1] - spans.offsets[i]) for i in indices]
        begins = cu_seqlens[:-1].long().cpu().numpy().repeat(counts)
        for alignment, (vectors, starts, ends) in targets.items():
            pooled = segment_pool(
                hidden,
                cu_seqlens,
                span_starts=torch.from_numpy(begins + starts[words]).to(hidden.device),
                span_ends=torch.from_numpy(begins + ends[words]).to(hidden.device),
                backend=getattr(encoder, "backend", None),
            )
            with np.errstate(over="ignore"):  # checked in the next line
                values = pooled.float().cpu().numpy().astype(vectors.dtype)
            if not np.isfinite(values).all():
                raise RunError(
                    f"the {alignment} vectors of {np.count_nonzero(~np.isfinite(values).all(axis=1))} words are not "
                    f"finite in {values.dtype}: the model's weights or its precision broke"
                )
            vectors[words] = values


def _allocate(file: Path | None, shape: tuple[int, int]) -> tuple[np.ndarray, Path | None]:
    if file is None:
        return np.zeros(shape, np.float32), None
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}.tmp")
    return np.lib.format.open_memmap(temporary, mode="w+", dtype=np.float16, shape=shape), temporary


def _publish(vectors: np.memmap, temporary: Path, file: Path, identity: dict[str, Any]) -> np.ndarray:
    """Gives the file its name; the sidecar goes first and comes last, so that no vectors lie beside a wrong one."""
    sidecar = file.with_suffix(".json")
    vectors.flush()
    sidecar.unlink(missing_ok=True)
    temporary.replace(file)
    write_text_atomic(sidecar, json_text(identity))
    published: np.ndarray = np.load(file, mmap_mode="r")
    return published


def _read_cache(file: Path, identity: dict[str, Any], shape: tuple[int, int]) -> np.ndarray | None:
    try:
        if json.loads(file.with_suffix(".json").read_text(encoding="utf-8")) != identity:
            return None
        vectors: np.ndarray = np.load(file, mmap_mode="r")
    except (OSError, ValueError):  # none yet, or damaged: it is made again
        return None
    return vectors if vectors.shape == shape and vectors.dtype == np.float16 else None
