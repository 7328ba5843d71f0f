"""How a text becomes a row of tokens, and which of them are pooled: templates, instructions, truncation.

The string is template head + instruction + text + template tail (METHOD 5.2-5.4, 7.1). As in the released LLM2Vec
models the pooled span is the text and the template's tail. Where it lies is read from the character offsets of the one
tokenisation there is: the original tokenises text and tail a second time, out of their context, and counts back from
the end of the row, which breaks where that gives more tokens than the row has (its issues #80 and #105).

Truncation takes tokens from the end of the text and from nowhere else. A limit on the text's own tokens
(``max_text_length``, METHOD 7.1) comes first and takes whole words, what white space separates; ``max_length``, the
limit on the row, comes second and takes single tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

from bivec.engine.errors import BivecError, ConfigError
from bivec.engine.tokenizer import prefix_length

if TYPE_CHECKING:
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerFast

SLOT = "{text}"
SLICE = 1000  # texts of one call of the tokenizer
TEMPLATES = {
    "llama-3": "<|start_header_id|>user<|end_header_id|>\n\n{text}<|eot_id|>",
    "mistral": "[INST] {text} [/INST]",
    "llama-2": "[INST] {text} [/INST]",
    # Gemma's tokenizer puts a <bos> of its own in front of this one: the original's rows have both
    "gemma-2": "<bos><start_of_turn>user\n{text}<end_of_turn>",
    "qwen-2": "<|im_start|>user\n{text}<|im_end|>",
}
# The original wraps the texts of these models and of no other, Llama 3.1 and every fine-tune included (METHOD 5.3).
MODEL_TEMPLATES = {
    "meta-llama/Meta-Llama-3-8B-Instruct": "llama-3",
    "mistralai/Mistral-7B-Instruct-v0.2": "mistral",
    "meta-llama/Llama-2-7b-chat-hf": "llama-2",
    "google/gemma-2-9b-it": "gemma-2",
    "Qwen/Qwen2-1.5B-Instruct": "qwen-2",
    "Qwen/Qwen2-7B-Instruct": "qwen-2",
}
NO_TEMPLATE = "none"


def template_of(model: str) -> str | None:
    """The short name of the template that the original uses for a model, known by its exact hub id; None = none."""
    return MODEL_TEMPLATES.get(model)


def expand_template(given: str) -> str | None:
    """The template that a name stands for.

    Args:
        given: a short name of ``TEMPLATES``, "none", or a string with one ``{text}``, which stands for itself.

    Returns:
        The string with ``{text}``; None for "none".

    Raises:
        ConfigError: neither of these.
    """
    if given == NO_TEMPLATE:
        return None
    template = TEMPLATES.get(given, given) if isinstance(given, str) else ""
    if template.count(SLOT) != 1:
        raise ConfigError(
            f"template {given!r} is unknown; choose one of {', '.join(TEMPLATES)}, {NO_TEMPLATE}, or give a string "
            f"that contains {SLOT} exactly once"
        )
    return template


def resolve_template(given: str | None, model: str) -> str | None:
    """The template of a recipe: the one asked for, else the original's for this model.

    Args:
        given: None = by the model's name; else see :func:`expand_template`. A renamed or local model needs it.
        model: hub id or path of the decoder.

    Returns:
        The string with ``{text}``, or None.

    Raises:
        ConfigError: ``given`` is no template.
    """
    if given is None:
        given = template_of(model) or NO_TEMPLATE
    return expand_template(given)


def training_head(instruction: str) -> str:
    """What supervised training puts in front of a query: the instruction, a semicolon, a space (METHOD 5.2)."""
    instruction = instruction.strip()
    return f"{instruction}; " if instruction else ""


def encoding_head(instruction: str) -> str:
    """What ``encode`` puts in front of a text: an instruction and one space (METHOD 7.1), a :class:`Prompt` as is."""
    if isinstance(instruction, Prompt):
        return instruction
    instruction = instruction.strip()
    return f"{instruction} " if instruction else ""


class Prompt(str):
    """What stands before a text to the letter, in place of an instruction and of the template's head.

    So sentence-transformers has it, where a named prompt replaces the default one.
    """

    __slots__ = ()


class SpanError(BivecError):
    """Nothing of a text can be pooled; ``index`` is its position among the texts given."""

    def __init__(self, index: int, message: str) -> None:
        super().__init__(f"text {index}: {message}")
        self.index = index


@dataclass(frozen=True)
class Row:
    """The tokens of one text, and the span of them that is pooled."""

    input_ids: list[int]
    start: int  # first pooled token
    end: int  # behind the last pooled one


class RowFormat(Protocol):
    """A rule by which texts become rows; see :meth:`TextFormat.rows`."""

    def rows(
        self,
        heads: Sequence[str],
        texts: Sequence[str],
        *,
        allow_empty: bool = False,
        max_text_length: int | None = None,
    ) -> list[Row]:
        """A row per text."""


@dataclass(frozen=True)
class _Layout:
    """Where the text lies among the tokens of its row; positions of tokens."""

    first: int  # the first token that reaches into the text, even if it begins in the head
    tail: int  # the first token behind the text that must stay, even if it begins in the text
    stop: int  # behind the last token that reaches into the text; above ``tail`` where one lies over that boundary
    length: int  # of the row

    def fixed(self) -> int:
        """Tokens that are never cut."""
        return self.first + self.length - self.tail

    def shortest(self) -> int:
        """Tokens of the shortest row in which something of the text is left."""
        return self.fixed() + (0 if self.stop > self.tail else 1)


@dataclass(frozen=True)
class TextFormat:
    """The rule by which texts become rows.

    Raises:
        ConfigError: a template without its one ``{text}``, one that leaves no token of ``max_length`` to a text, or
            ``append_eos`` with a tokenizer that has none.
    """

    tokenizer: PreTrainedTokenizerFast
    max_length: int  # tokens of a row, special ones included
    template: str | None = None  # with {text}; a text is stripped before it goes into one with a tail
    pool_tail: bool = True  # the span ends with the row (template tail, appended special tokens); False: with the text
    skip_head: bool = True  # False: instruction and template head are pooled too
    pool_bos: bool = True  # where no head is skipped: special tokens in front are pooled too
    append_eos: bool = False  # the row, and with it the span, ends with an EOS (pooling "eos_token")

    def __post_init__(self) -> None:
        if self.template is not None and self.template.count(SLOT) != 1:
            raise ConfigError(f"template {self.template!r} must contain {SLOT} exactly once")
        if self.append_eos and self.tokenizer.eos_token_id is None:
            raise ConfigError("pooling 'eos_token': the tokenizer has no EOS; choose 'last_token'")
        before, after = self._parts
        (encoding,) = encode_strings(self.tokenizer, [f"{before}a{after}"])  # one letter: the shortest of texts
        layout = _layout(encoding.offsets, len(before), len(before) + 1)
        shortest = layout.shortest() + len(self._closing(encoding.ids, layout))
        if shortest > self.max_length:
            raise ConfigError(
                f"max_length {self.max_length} leaves no token to a text: with template {self.template!r} and special "
                f"tokens a text of one letter takes {shortest}; raise max_length or choose a shorter template"
            )

    def rows(
        self,
        heads: Sequence[str],
        texts: Sequence[str],
        *,
        allow_empty: bool = False,
        max_text_length: int | None = None,
    ) -> list[Row]:
        """Tokenises texts.

        A token over the boundary of head and text counts as the text's, one over the boundary of text and tail as the
        text's and the tail's: it is pooled and never cut.

        Args:
            heads: what stands before each text, separator included (``training_head``, ``encoding_head``); may be "". A
                :class:`Prompt` stands in place of the template's head too.
            texts: as many.
            allow_empty: a text without tokens, or of white space only, gets the whole row as its span.
            max_text_length: tokens of a row that are the text's: a longer text loses its last words, as few as will
                do. Where not even its first word fits, that word is cut behind so many tokens (the original is left
                with no text at all). None = no limit but ``max_length``.

        Returns:
            A row per text, of at most ``max_length`` tokens: those of the whole string, without as many of the text's
            last ones as are too many.

        Raises:
            ConfigError: ``max_text_length`` is below 1.
            SpanError: naming the text by its position: it is empty or blank and that is not allowed, the tokens that
                are never cut leave it none, or it cannot be written in UTF-8.
        """
        if max_text_length is not None and max_text_length < 1:
            raise ConfigError(f"max_text_length is {max_text_length}, expected at least 1 token; None = no limit")
        before, after = self._parts
        if after:
            texts = [text.strip() for text in texts]
        fronts = [head if isinstance(head, Prompt) else before + head for head in heads]
        strings = [front + text + after for front, text in zip(fronts, texts, strict=True)]
        rows: list[Row] = []
        for start in range(0, len(strings), SLICE):  # what the tokenizer returns is many times larger than the rows
            encodings = encode_strings(self.tokenizer, strings[start : start + SLICE], start)
            for index, encoding in enumerate(encodings, start):
                head_length = len(fronts[index])
                rows.append(self._row(index, encoding, head_length, texts[index], allow_empty, max_text_length))
        return rows

    @cached_property
    def _parts(self) -> tuple[str, str]:
        """The template's head and tail."""
        before, _, after = (self.template or SLOT).partition(SLOT)
        return before, after

    @cached_property
    def _prefix(self) -> int:
        return prefix_length(self.tokenizer)

    def _row(
        self, index: int, encoding: Encoding, head_length: int, text: str, allow_empty: bool, limit: int | None
    ) -> Row:
        ids = encoding.ids
        layout = _layout(encoding.offsets, head_length, head_length + len(text))
        closing = self._closing(ids, layout)
        empty = not text.strip() or layout.first == layout.stop
        if empty and not allow_empty:
            raise SpanError(index, "is empty or blank, there is nothing to pool; leave it out")
        fixed = layout.fixed() + len(closing)
        if (fixed if empty else layout.shortest() + len(closing)) > self.max_length:
            raise SpanError(
                index,
                f"no token is left for it: of max_length {self.max_length} its instruction, the template and special "
                f"tokens take {layout.first} in front of it and {fixed - layout.first} behind it, which are never cut; "
                f"raise max_length above {fixed} or shorten the instruction",
            )
        kept = layout.tail - layout.first
        if limit is not None and layout.stop - layout.first > limit:
            kept = _whole_words(encoding.offsets, layout, head_length, text, limit)
        kept = min(kept, self.max_length - fixed)
        row = ids[: layout.first + kept] + ids[layout.tail :]
        if row[-1:] != closing:
            row += closing
        if empty:
            return Row(row, 0, len(row))
        cut = len(ids) - layout.fixed() - kept
        end = len(row) if self.pool_tail or self.append_eos else layout.stop - cut
        return Row(row, self._pooled_start(layout, head_length), end)

    def _pooled_start(self, layout: _Layout, head_length: int) -> int:
        if head_length and self.skip_head:
            return layout.first
        return 0 if self.pool_bos else self._prefix

    def _closing(self, ids: list[int], layout: _Layout) -> list[int]:
        """The EOS to append, unless the template or the tokenizer has it at the end of every row."""
        if not self.append_eos or ids[layout.tail :][-1:] == [self.tokenizer.eos_token_id]:
            return []
        return [self.tokenizer.eos_token_id]


def encode_strings(tokenizer: PreTrainedTokenizerFast, strings: Sequence[str], first: int = 0) -> list[Encoding]:
    """Token ids and character offsets of strings, special tokens included, neither cut nor padded.

    Args:
        tokenizer: a fast one.
        strings: N strings.
        first: the position of the first of them, for the error.

    Raises:
        SpanError: a string that cannot be written in UTF-8.
    """
    # not through the tokenizer's Python wrapper, which makes Python objects of all offsets of all texts at once
    backend = tokenizer.backend_tokenizer
    if backend.truncation is not None:
        backend.no_truncation()
    if backend.padding is not None:
        backend.no_padding()
    strings = list(strings)
    try:
        return backend.encode_batch(strings)
    except TypeError:  # says no more than that some input is not a string
        for index, string in enumerate(strings, first):
            check_unicode(index, string)
        raise


def _layout(offsets: list[tuple[int, int]], start: int, end: int) -> _Layout:
    """Finds the text of characters ``start`` … ``end`` among the tokens of a row.

    Special tokens that the tokenizer adds, in front or behind, have the offsets (0, 0).
    """
    first = next((i for i, (_, token_end) in enumerate(offsets) if token_end > start), len(offsets))
    tail = len(offsets)
    while tail > first and not start < offsets[tail - 1][1] <= end:
        tail -= 1
    stop = tail
    while stop < len(offsets) and offsets[stop][0] < end < offsets[stop][1]:
        stop += 1
    return _Layout(first, tail, stop, len(offsets))


def _whole_words(offsets: list[tuple[int, int]], layout: _Layout, start: int, text: str, limit: int) -> int:
    """How many of a text's tokens are left when the words go that lie beyond its first ``limit`` tokens.

    A cut is one of whole words where white space is at the boundary of two tokens, on either side of it: tokenizers
    count the space before a word to it, or to no token.
    """
    room = max(limit - (layout.stop - layout.tail), 0)  # the tokens that reach into the tail stay in any case
    for kept in range(room, 0, -1):
        here, there = offsets[layout.first + kept - 1], offsets[layout.first + kept]
        last = text[max(here[0] - start, 0) : here[1] - start]
        between = text[max(here[1] - 1 - start, 0) : there[0] + 1 - start]
        if last.strip() and any(character.isspace() for character in between):
            return kept
    return room


def check_unicode(index: int, string: str) -> None:
    """Whether a string can be written in UTF-8.

    Raises:
        SpanError: it cannot; ``index`` is its position.
    """
    try:
        string.encode()
    except UnicodeEncodeError as error:
        raise SpanError(
            index, f"{string[error.start]!r} is half of a surrogate pair and no character of its own; replace it"
        ) from None
