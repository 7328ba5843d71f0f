"""Echo embeddings: the causal decoder reads its input twice, and the second copy is pooled.

Under a causal mask a token knows only what stands before it. In the second copy every token has the whole input before
it, with no training and no change of the mask: a baseline of the paper (METHOD 7.4).

Source: Springer et al., 2024, Repetition Improves Language Model Embeddings. The figures that LLM2Vec prints say no
more than "the input twice, pooled over the second copy, same instructions" (METHOD 7.4), so the words around the copies
are a parameter. Tried on SmolLM2-135M (STS-B dev, first 150 pairs; Uni with mean pooling has 48.3): the input twice and
nothing else 71.6; the default, a sentence to rewrite, 77.0.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bivec.engine.encoder import Encoder
from bivec.engine.encoder_config import EncoderConfig
from bivec.engine.errors import ConfigError
from bivec.engine.text_format import SLICE, SLOT, Row, SpanError, encode_strings

if TYPE_CHECKING:
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerFast

ECHO_TEMPLATE = "Rewrite the sentence: {text}, rewritten sentence: {text}"
REPETITION = "{text} {text}"  # nothing but the input twice
ECHO_POOLINGS = ("mean", "weighted_mean", "last_token")


@dataclass(frozen=True)
class EchoConfig(EncoderConfig):
    """An encoder's settings and the words around the copies: what is kept of Echo's vectors is not taken for Uni's."""

    echo_template: str = ECHO_TEMPLATE


class EchoEncoder(Encoder):
    """A causal encoder used the Echo way: ``encode`` and all else as :class:`Encoder`, with rows of two copies."""

    def __init__(self, encoder: Encoder, *, template: str = ECHO_TEMPLATE, pooling: str = "mean"):
        """Reads texts twice by another encoder's weights.

        Args:
            encoder: with a causal mask; its weights are shared, not copied.
            template: what the decoder reads, with ``{text}`` twice. An instruction is put before it.
            pooling: over the second copy: "mean", "weighted_mean" or "last_token".

        Raises:
            ConfigError: a bidirectional encoder, another pooling, a template without its two ``{text}``.
        """
        if not encoder.config.causal:
            raise ConfigError("Echo needs the causal mask that it works around; load the encoder with causal=True")
        if pooling not in ECHO_POOLINGS:
            raise ConfigError(f"pooling {pooling!r} is not for Echo; choose one of {', '.join(ECHO_POOLINGS)}")
        settings = {field.name: getattr(encoder.config, field.name) for field in fields(EncoderConfig)}
        config = EchoConfig(**settings | {"pooling": pooling}, echo_template=template)
        super().__init__(
            encoder.model,
            encoder.tokenizer,
            config,
            lm_head_weight=encoder.lm_head_weight,
            backend=encoder.backend,
        )
        self.echo_format = EchoFormat(encoder.tokenizer, self.config.max_length, template, wrapper=self.config.template)
        self._text_format = self.echo_format

    def save_pretrained(self, path: str | Path, **_: Any) -> None:
        """Not possible: no file of an encoder says that texts are to be read twice.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(f"{path}: Echo is a way to use an encoder; save the encoder that it was made of")


@dataclass(frozen=True)
class EchoFormat:
    """The rule by which texts become rows of two copies.

    Raises:
        ConfigError: a template without its two ``{text}``.
    """

    tokenizer: PreTrainedTokenizerFast
    max_length: int  # tokens of a row: both copies, the template, special tokens
    template: str = ECHO_TEMPLATE
    wrapper: str | None = None  # the encoder's chat template, put around all

    def __post_init__(self) -> None:
        if not isinstance(self.template, str) or self.template.count(SLOT) != 2:
            raise ConfigError(f"Echo template {self.template!r} must contain {SLOT} exactly twice")

    def expand(self, head: str, text: str) -> tuple[str, int, int]:
        """The string of a text, and where in it its first and its second copy begin (characters)."""
        before, between, after = self.template.split(SLOT)
        start, _, end = (self.wrapper or SLOT).partition(SLOT)
        front = start + head + before
        first = len(front)
        return front + text + between + text + after + end, first, first + len(text) + len(between)

    def rows(
        self,
        heads: Sequence[str],
        texts: Sequence[str],
        *,
        allow_empty: bool = False,
        max_text_length: int | None = None,
    ) -> list[Row]:
        """Token ids and the span of the second copy.

        A row above ``max_length`` loses the end of its text, the same characters in both copies.

        Args:
            heads: what stands before each row, separator included; may be "".
            texts: as many.
            allow_empty: a text of nothing, or of white space only, gets the whole row as its span.
            max_text_length: tokens of one copy; a longer text loses its last words first, as in ``TextFormat.rows``.

        Raises:
            ConfigError: ``max_text_length`` is below 1.
            SpanError: naming the text by its position: it is empty or blank and that is not allowed, nothing of it
                fits, or it cannot be written in UTF-8.
        """
        if max_text_length is not None and max_text_length < 1:
            raise ConfigError(f"max_text_length is {max_text_length}, expected at least 1 token; None = no limit")
        rows: list[Row] = []
        for start in range(0, len(texts), SLICE):
            pairs = list(zip(heads[start : start + SLICE], texts[start : start + SLICE], strict=True))
            encodings = encode_strings(self.tokenizer, [self.expand(*pair)[0] for pair in pairs], start)
            rows += [
                self._row(index, head, text, encoding, allow_empty, max_text_length)
                for index, ((head, text), encoding) in enumerate(zip(pairs, encodings, strict=True), start)
            ]
        return rows

    def _row(self, index: int, head: str, text: str, encoding: Encoding, allow_empty: bool, limit: int | None) -> Row:
        if not text.strip():
            if not allow_empty:
                raise SpanError(index, "is empty or blank, there is nothing to pool; leave it out")
            if len(encoding.ids) <= self.max_length:
                return Row(encoding.ids, 0, len(encoding.ids))
        if limit is not None and len(limited := self._limited(head, text, encoding, limit)) < len(text):
            text = limited
            (encoding,) = encode_strings(self.tokenizer, [self.expand(head, text)[0]], index)
        while (excess := len(encoding.ids) - self.max_length) > 0:
            text = self._shortened(index, head, text, encoding, excess)
            (encoding,) = encode_strings(self.tokenizer, [self.expand(head, text)[0]], index)
        _, _, second = self.expand(head, text)
        start, end = token_span(encoding.offsets, second, second + len(text))
        return Row(encoding.ids, start, end)

    def _limited(self, head: str, text: str, encoding: Encoding, limit: int) -> str:
        """The words of the text that its first ``limit`` tokens hold whole; of one long word those tokens."""
        _, first, _ = self.expand(head, text)
        start, end = token_span(encoding.offsets, first, first + len(text))
        if end - start <= limit:
            return text
        length = encoding.offsets[start + limit - 1][1] - first
        kept = text[:length]
        whole = kept if text[length : length + 1].isspace() else re.sub(r"\S+$", "", kept)
        return whole.rstrip() or kept

    def _shortened(self, index: int, head: str, text: str, encoding: Encoding, excess: int) -> str:
        """The text without about so many of its last tokens that both copies together are ``excess`` tokens shorter."""
        _, first, _ = self.expand(head, text)
        start, end = token_span(encoding.offsets, first, first + len(text))
        kept = end - start - (excess + 1) // 2
        length = min(encoding.offsets[start + kept - 1][1] - first, len(text) - 1) if kept > 0 else 0
        if length < 1 or not text[:length].strip():
            raise SpanError(
                index,
                f"no token is left for its two copies: instruction, Echo's template and special tokens take "
                f"{len(encoding.ids) - 2 * (end - start)} of max_length {self.max_length} and are never cut; raise "
                "max_length or shorten the instruction",
            )
        return text[:length]


def token_span(offsets: Sequence[tuple[int, int]], start: int, end: int, *, whole: bool = False) -> tuple[int, int]:
    """The tokens of the characters ``start`` … ``end`` of a string, half-open.

    Args:
        offsets: of the string's tokens; special tokens that the tokenizer adds have (0, 0) and belong to no characters.
        start: first character.
        end: behind the last one.
        whole: only tokens that end inside, instead of all that reach into it. A token that begins with the white space
            before the characters is inside: byte-level vocabularies write " word".

    Returns:
        (first token, behind the last one); an empty span where there is none.
    """
    inside = [
        i
        for i, (token_start, token_end) in enumerate(offsets)
        if token_start < token_end and token_end > start and (token_end <= end if whole else token_start < end)
    ]
    return (inside[0], inside[-1] + 1) if inside else (0, 0)
