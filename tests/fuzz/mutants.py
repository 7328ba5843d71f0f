"""Mutations of bytes and of texts; those of formats are in structured_mutants.py.

Every function takes a ``random.Random`` and the file's bytes and gives other bytes; the same generator, the same
result.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable
from random import Random

Mutation = Callable[[Random, bytes], bytes]

EXTREMES = (0, 1, -1, 2, 127, 255, 2**15, 2**16, 2**31 - 1, 2**31, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
HUGE_TEXT = 200_000  # characters of a very long line or string
DEEP = 20_000  # brackets of a nesting that no recursive parser survives


# ---- bytes


def flip_bits(rng: Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        if changed:
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def set_bytes(rng: Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 2, 4))):
        if changed:
            changed[rng.randrange(len(changed))] = rng.choice((0, 0x7F, 0x80, 0xFF, rng.randrange(256)))
    return bytes(changed)


def truncate(rng: Random, data: bytes) -> bytes:
    return data[: rng.choice((0, 1, len(data) // 2, max(len(data) - 1, 0), rng.randrange(len(data) + 1)))]


def extend(rng: Random, data: bytes) -> bytes:
    return data + rng.choice((b"\0", b"\0" * 4096, rng.randbytes(64), data[-64:], data))


def _span(rng: Random, data: bytes) -> tuple[int, int]:
    start = rng.randrange(len(data) + 1)
    return start, min(len(data), start + rng.choice((1, 4, 8, 32, 256)))


def duplicate(rng: Random, data: bytes) -> bytes:
    start, end = _span(rng, data)
    return data[:end] + data[start:end] + data[end:]


def delete(rng: Random, data: bytes) -> bytes:
    start, end = _span(rng, data)
    return data[:start] + data[end:]


def swap(rng: Random, data: bytes) -> bytes:
    (a, b), (c, d) = sorted((_span(rng, data), _span(rng, data)))
    return data if b > c else data[:a] + data[c:d] + data[b:c] + data[a:b] + data[d:]


def zero(rng: Random, data: bytes) -> bytes:
    start, end = _span(rng, data)
    return data[:start] + bytes(end - start) + data[end:]


def set_integer(rng: Random, data: bytes) -> bytes:
    """An extreme number over 1, 2, 4 or 8 bytes somewhere."""
    width = rng.choice((1, 2, 4, 8))
    if len(data) < width:
        return data
    start = rng.randrange(len(data) - width + 1)
    value = rng.choice(EXTREMES) % 256**width
    return data[:start] + value.to_bytes(width, "little") + data[start + width :]


BYTES: tuple[Mutation, ...] = (flip_bits, set_bytes, truncate, extend, duplicate, delete, swap, zero, set_integer)


def any_bytes(rng: Random, data: bytes) -> bytes:
    return rng.choice(BYTES)(rng, data)


def in_range(rng: Random, data: bytes, start: int, end: int) -> bytes:
    """A mutation of ``data[start:end]`` alone."""
    return data[:start] + any_bytes(rng, data[start:end]) + data[end:]


def head(rng: Random, data: bytes) -> bytes:
    return in_range(rng, data, 0, min(512, len(data)))


def tail(rng: Random, data: bytes) -> bytes:
    return in_range(rng, data, max(0, len(data) - 1024), len(data))


def inside_gzip(mutation: Mutation) -> Mutation:
    """Of what is compressed; one in four times of the compressed bytes."""

    def mutate(rng: Random, data: bytes) -> bytes:
        if rng.random() < 0.25:
            return any_bytes(rng, data)
        return gzip.compress(mutation(rng, gzip.decompress(data)), mtime=0)

    return mutate


# ---- texts


def lines_of(data: bytes) -> list[bytes]:
    return data.splitlines(keepends=True)


def edit_line(rng: Random, data: bytes, edit: Callable[[bytes], bytes]) -> bytes:
    lines = lines_of(data) or [b"\n"]
    number = rng.randrange(len(lines))
    lines[number] = edit(lines[number])
    return b"".join(lines)


def insert(rng: Random, data: bytes) -> bytes:
    """What text files hold that they should not, in the middle of a line."""
    what = rng.choice(
        (
            b"\0",
            b"\xff",
            b"\x80",
            b"\xc3",
            b"\xed\xa0\x80",  # half a surrogate pair
            b"\xf5\x80\x80\x80",
            b"\xef\xbb\xbf",
            b"\r",
            b"\x0b",
            b"\x0c",
            b"\x1c",
            b"\xc2\x85",
            b"\xe2\x80\xa8",  # what str.splitlines takes for line ends
            b"\xc2\xa0",
            b'"',
            b"'",
            b'""',
            b"\\",
            b"\t",
            b",",
            b" ",
            b"\n",
            b"\n\n",
            b"\\ud800",
        )
    )
    where = rng.randrange(len(data) + 1)
    return data[:where] + what + data[where:]


def reencode(rng: Random, data: bytes) -> bytes:
    text = data.decode("utf-8", errors="replace")
    encoding = rng.choice(("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-8-sig", "latin-1", "cp1252"))
    return text.encode(encoding, errors="replace")


def line_ends(rng: Random, data: bytes) -> bytes:
    return data.replace(b"\r\n", b"\n").replace(b"\n", rng.choice((b"\r\n", b"\r", b"\n\n", b" \n", b"\n\r")))


def edit_lines(rng: Random, data: bytes) -> bytes:
    lines = lines_of(data)
    first, second = rng.randrange(len(lines) + 1), rng.randrange(len(lines) + 1)
    kind = rng.randrange(4)
    if kind == 0:
        return b"".join(lines[:first] + lines[first + 1 :])
    if kind == 1:
        return b"".join(lines[:first] + lines[second : second + 1] + lines[first:])
    if kind == 2:
        return b"".join(line.rstrip(b"\n") if number == first else line for number, line in enumerate(lines))
    rng.shuffle(lines)
    return b"".join(lines)


def long_line(rng: Random, data: bytes) -> bytes:
    return edit_line(
        rng, data, lambda line: rng.choice((b"x", b"x ", b"\t", b",", b'"', b"\xc3\xa9")) * HUGE_TEXT + line
    )


def edit_columns(rng: Random, data: bytes) -> bytes:
    separator = rng.choice((b"\t", b",", b" ", b'"'))

    def edit(line: bytes) -> bytes:
        cells = line.split(separator)
        where = rng.randrange(len(cells))
        changed = rng.choice(
            ([], [cells[where]] * 2, [b""], [b"nan"], [b"inf"], [b"-1"], [b"1e400"], [b"999999999999"])
        )
        return separator.join(cells[:where] + changed + cells[where + 1 :])

    return edit_line(rng, data, edit)


TEXT: tuple[Mutation, ...] = (
    insert,
    insert,
    insert,
    reencode,
    line_ends,
    edit_lines,
    long_line,
    edit_columns,
    any_bytes,
)


def any_text(rng: Random, data: bytes) -> bytes:
    return rng.choice(TEXT)(rng, data)


# ---- others


def any_protobuf(rng: Random, data: bytes) -> bytes:
    """Of a SentencePiece model: often its end, where the trainer's and the normaliser's settings are."""
    kind = rng.random()
    if kind < 0.4:
        return in_range(rng, data, max(0, len(data) - 600), len(data))
    if kind < 0.5:  # a varint that never ends, or a length beyond the file
        where = rng.randrange(len(data) + 1)
        return (
            data[:where] + rng.choice((b"\xff" * 12, b"\xff" * 9 + b"\x7f", b"\x0a\xff\xff\xff\xff\x0f")) + data[where:]
        )
    return any_bytes(rng, data)


def any_parquet(rng: Random, data: bytes) -> bytes:
    return rng.choice((tail, tail, any_bytes))(rng, data)


def head_or_any(rng: Random, data: bytes) -> bytes:
    """Of an .npy file: its header is in the first 128 bytes."""
    return in_range(rng, data, 0, min(128, len(data))) if rng.random() < 0.5 else any_bytes(rng, data)
