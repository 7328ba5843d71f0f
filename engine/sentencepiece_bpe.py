"""SentencePiece BPE models (LLaMA-2, Mistral) as fast tokenizers with the same ids.

SentencePiece merges the neighbouring pair whose joined piece has the highest score; a fast tokenizer merges by the rank
of a pair in a list. Ranking every way of splitting a piece by the piece's score makes the two agree. Characters outside
the vocabulary become their UTF-8 bytes. One difference is meant: control tokens (``<s>``, ``[INST]``) written in a text
are recognised, as in every fast tokenizer, where SentencePiece spells them out.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bivec.models.errors import CheckpointError

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor
    from tokenizers import Tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # piece types, the same numbers in GGUF files
SPACE = "▁"
MODEL_TYPES: dict[int | bytes, str] = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}
# Compared against SentencePiece itself on every load: spaces at the ends and doubled, tabs and newlines, digits, code,
# characters that a normaliser would change (ligature, full width, combining accent), scripts, emoji, a literal "▁"
PROBE = (
    "  Hello  world, it's 1984 and 3.14159!\n\tdef f(x_1):  return {x: '_'}\r\n naïve cafe\u0301 ﬁne Ｆｕｌｌ ½ №\u00a0"
    "Привет мир, 你好世界。 שלום مرحبا 🙂👩‍👩‍👧 ▁a ▁▁ \u200b\x00\x7f Donaudampfschifffahrtsgesellschaft   "
)

Piece = tuple[str, float, int]  # text, score, type
Fields = dict[int, "int | bytes"]  # of a protobuf message, by number


@dataclass(frozen=True)
class SentencePieceModel:
    """The content of a ``tokenizer.model`` file."""

    path: Path
    processor: SentencePieceProcessor
    pieces: list[Piece]
    dummy_prefix: bool  # a space is put in front of every text
    byte_fallback: bool

    def special_tokens(self) -> dict[str, str]:
        """The pieces named bos, eos, unk and pad, under transformers' names; those the model lacks are left out."""
        ids = {
            "bos_token": self.processor.bos_id(),
            "eos_token": self.processor.eos_id(),
            "unk_token": self.processor.unk_id(),
            "pad_token": self.processor.pad_id(),
        }
        return {name: self.pieces[number][0] for name, number in ids.items() if number >= 0}

    def check_same_ids(self, backend: Tokenizer) -> None:
        """Raises CheckpointError if the fast tokenizer disagrees with SentencePiece on the probe text."""
        ours = backend.encode(PROBE, add_special_tokens=False).ids
        theirs = self.processor.encode(PROBE)
        if ours != theirs:
            where = next((i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), len(ours))
            raise CheckpointError(
                f"{self.path}: the fast tokenizer differs from SentencePiece on it (token {where} of a test text); "
                "give a directory with tokenizer.json instead"
            )


def read_sentencepiece(path: Path) -> SentencePieceModel:
    """Reads a SentencePiece BPE model.

    Raises:
        CheckpointError: the ``sentencepiece`` package is missing, the file is damaged, or the model is not a BPE model
            without text normalisation (the kind of LLaMA and Mistral).
    """
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError:
        raise CheckpointError(f"reading {path} needs the package sentencepiece: pip install sentencepiece") from None
    processor = SentencePieceProcessor()
    try:
        processor.Load(str(path))
        pieces, trainer, normaliser = _model_parts(processor.serialized_model_proto())
    # a piece that is no UTF-8 is a ValueError, in ours as in SentencePiece
    except (RuntimeError, OSError, ValueError, KeyError, IndexError, TypeError, struct.error) as error:
        raise CheckpointError(
            f"{path}: not a complete SentencePiece model ({error}); copy or download it again"
        ) from None
    model_type = MODEL_TYPES.get(trainer.get(3, 1), "unknown")
    reasons = {
        f"model type {model_type}": model_type != "bpe",
        f"text normalisation {_bytes(normaliser.get(1, b'')).decode('utf-8')!r}": bool(normaliser.get(2)),
        "removal of extra white space": bool(normaliser.get(4, 1)),
        "white space as suffix": bool(trainer.get(24, 0)),
        "unescaped white space": not normaliser.get(5, 1),
    }
    unsupported = [reason for reason, found in reasons.items() if found]
    if unsupported:
        raise CheckpointError(
            f"{path}: SentencePiece model with {', '.join(unsupported)}; only plain BPE models (LLaMA, Mistral) are "
            "converted, give a directory with tokenizer.json instead"
        )
    return SentencePieceModel(path, processor, pieces, bool(normaliser.get(3, 1)), bool(trainer.get(35, 0)))


def _model_parts(message: bytes) -> tuple[list[Piece], Fields, Fields]:
    """Pieces, trainer's and normaliser's fields by number.

    The processor does not tell user-defined pieces, nor its own settings: they are read from the message itself.
    """
    pieces: list[Piece] = []
    trainer: Fields = {}
    normaliser: Fields = {}
    for number, value in _message_fields(message):
        if number not in (1, 2, 3):
            continue
        part = dict(_message_fields(_bytes(value)))
        if number == 1:
            score = struct.unpack("<f", _bytes(part.get(2, bytes(4))))[0]
            pieces.append((_bytes(part[1]).decode("utf-8"), score, _number(part.get(3, NORMAL))))
        elif number == 2:
            trainer = part
        else:
            normaliser = part
    _bytes(normaliser.get(1, b"")).decode("utf-8")  # its name, which goes into an error
    return pieces, trainer, normaliser


def _bytes(value: int | bytes) -> bytes:
    if not isinstance(value, bytes):
        raise TypeError("a number where a text or a message belongs")
    return value


def _number(value: int | bytes) -> int:
    if not isinstance(value, int):
        raise TypeError("a text where a number belongs")
    return value


def _message_fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of a protobuf message; fixed32 and nested fields as bytes."""
    position = 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = data[position]
            position += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    widths = {1: 8, 5: 4}
    while position < len(data):
        key = varint()
        if key & 7 == 0:
            yield key >> 3, varint()
            continue
        width = widths[key & 7] if key & 7 in widths else varint()
        yield key >> 3, data[position : position + width]
        position += width


def sentencepiece_backend(pieces: Sequence[Piece], *, dummy_prefix: bool, byte_fallback: bool) -> Tokenizer:
    """A fast tokenizer (no BOS yet) from SentencePiece pieces: (text, score, type) in the order of their ids."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import Split

    vocabulary = {text: number for number, (text, _, _) in enumerate(pieces)}
    unknown = next((text for text, _, kind in pieces if kind == UNKNOWN), None)
    user_defined = [text for text, _, kind in pieces if kind == USER_DEFINED]
    backend = Tokenizer(
        BPE(
            vocab=vocabulary,
            merges=_merges(pieces),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=byte_fallback,
            ignore_merges=bool(user_defined),  # a user-defined piece has no merges: it is a word of its own
        )
    )
    spaces = [normalizers.Replace(" ", SPACE)]
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), *spaces] if dummy_prefix else spaces)
    if user_defined:
        longest_first = sorted(user_defined, key=len, reverse=True)
        backend.pre_tokenizer = Split(Regex("|".join(_escape(text) for text in longest_first)), behavior="isolated")
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if dummy_prefix else steps)
    special = [text for text, _, kind in pieces if kind in (UNKNOWN, CONTROL)]
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    return backend


def _merges(pieces: Sequence[Piece]) -> list[tuple[str, str]]:
    """Every way to make a normal piece of two, the best score first; equal scores in the order of the ids."""
    normal = {text: (-score, number) for number, (text, score, kind) in enumerate(pieces) if kind == NORMAL}
    ranked = [
        (*rank, text[:cut], text[cut:])
        for text, rank in normal.items()
        for cut in range(1, len(text))
        if text[:cut] in normal and text[cut:] in normal
    ]
    return [(left, right) for _, _, left, right in sorted(ranked)]


def _escape(text: str) -> str:
    """A literal for tokenizers' regular expressions."""
    return "".join(character if character.isalnum() else f"\\x{{{ord(character):x}}}" for character in text)
