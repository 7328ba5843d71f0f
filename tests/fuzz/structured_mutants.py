"""Mutations that know a format: JSON, JSON lines, YAML, and the headers of safetensors and GGUF files."""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Iterator
from random import Random
from typing import Any

from mutants import DEEP, EXTREMES, HUGE_TEXT, any_bytes, any_text, edit_line, in_range, lines_of

# ---- JSON


def _paths(tree: Any, at: tuple = ()) -> Iterator[tuple]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*at, key)
        yield from _paths(value, (*at, key))


def _odd_value(rng: Random, old: Any) -> Any:
    """A value of another type, or an extreme one of the same."""
    others = [
        None, True, False, 0, -1, 0.0, -0.5, 1e300, 5e-324, float("nan"), float("inf"), "", "0", "x", "\x00", "\ud800",
        "../../outside", "/etc/passwd", [], {}, [old], {"x": old}, [None], 10**400, *EXTREMES, "y" * HUGE_TEXT,
    ]  # fmt: skip
    if isinstance(old, bool):
        others += [str(old).lower(), int(old)] * 3
    elif isinstance(old, (int, float)) and abs(old) < 1e300:
        others += [str(old), old + 1, old * 2, -old, old + 0.5, float(old)] * 2
    elif isinstance(old, str):
        others += [old + " ", old.upper(), old[::-1], old[:-1]] * 2
    elif isinstance(old, list):
        others += [old * 2, old[:-1], old[::-1], [*old, None]] * 3
    elif isinstance(old, dict):
        others += [list(old), list(old.values()), str(old)] * 2
    return rng.choice(others)


def mutate_tree(rng: Random, tree: Any) -> Any:
    """One to three values changed, dropped, renamed or swapped with another."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        paths = list(_paths(tree))
        if not paths or rng.random() < 0.02:
            return _odd_value(rng, tree)
        *way, key = rng.choice(paths)
        parent = tree
        for step in way:
            parent = parent[step]
        kind = rng.randrange(10)
        if kind == 0:
            del parent[key]
        elif kind == 1 and isinstance(parent, dict):
            name = rng.choice(
                (key + "_", key.upper(), key[::-1], "", "\x00", key.replace("_", "-"), rng.choice(list(parent)))
            )
            parent[name] = parent.pop(key)
        elif kind == 2:
            other = rng.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))
            parent[key], parent[other] = parent[other], parent[key]
        else:
            parent[key] = _odd_value(rng, parent[key])
    return tree


def dump_json(rng: Random, tree: Any) -> bytes:
    """Bytes of a tree, as some program or other would write it."""
    try:
        text = json.dumps(tree, indent=rng.choice((None, None, 2)), ensure_ascii=rng.random() < 0.7)
        return text.encode("utf-8", errors=rng.choice(("surrogatepass", "replace")))
    except ValueError:  # a number of too many digits for Python to write
        return b'{"x": ' + b"9" * 5000 + b"}"


def _key_twice(rng: Random, data: bytes) -> bytes:
    """A key of the outermost object a second time, with another value."""
    tree = json.loads(data)
    if not isinstance(tree, dict) or not tree:
        return data + b"{}"
    key = rng.choice(list(tree))
    value = _odd_value(rng, tree[key]) if rng.random() < 0.7 else tree[key]
    pair = f"{json.dumps(key)}: {json.dumps(value)}"
    text = json.dumps(tree)
    return (f"{{{pair}, {text[1:]}" if rng.random() < 0.5 else f"{text[:-1]}, {pair}}}").encode(
        "utf-8", "surrogatepass"
    )


def _nested(rng: Random, data: bytes) -> bytes:
    """Nesting deeper than a stack, as the whole file or as a value."""
    opened, closed = rng.choice(((b"[", b"]"), (b'{"a":', b"}")))
    deep = opened * DEEP + b"1" + closed * DEEP
    if rng.random() < 0.3:
        return deep
    where = data.find(b":", rng.randrange(len(data) + 1))
    return data[: where + 1] + deep + b"," + data[where + 1 :] if where >= 0 else deep


def any_json(rng: Random, data: bytes) -> bytes:
    kind = rng.random()
    if kind < 0.65:
        return dump_json(rng, mutate_tree(rng, json.loads(data)))
    if kind < 0.72:
        try:
            return _key_twice(rng, data)
        except ValueError:
            return b'{"x": ' + b"9" * 5000 + b"}"
    if kind < 0.78:
        return _nested(rng, data)
    return any_text(rng, data)


def any_json_lines(rng: Random, data: bytes) -> bytes:
    """One line mutated as JSON, or the file as text."""
    if rng.random() < 0.4:
        return any_text(rng, data)
    lines = lines_of(data)
    number = rng.randrange(len(lines))
    changed = any_json(rng, lines[number].strip()).replace(b"\n", b" ")
    return b"".join([*lines[:number], changed, b"\n", *lines[number + 1 :]])


# ---- YAML

YAML_ODDITIES = (
    "x: &a [*a]\n",
    "x: &a {y: *a}\n",
    "? [1, 2]\n: 3\n",
    "? {a: 1}\n: 3\n",
    "1: 2\n",
    "null: 2\n",
    "x: 2020-99-99\n",
    "x: 2020-01-01\n",
    "x: !!binary '*'\n",
    "x: !!python/object/apply:os.system ['true']\n",
    "x: !!int 'y'\n",
    "x: !!float 'y'\n",
    "x: !!bool 'y'\n",
    "x: !!timestamp 'y'\n",
    "x: !!map [1]\n",
    "x: !!map y\n",
    "x: !!seq y\n",
    "x: !!omap [1]\n",
    "x: !!pairs [1]\n",
    "x: !!set {1, 2}\n",
    "x: 0b\n",
    "x: 0x_\n",
    "x: 1:2:99:99999999999\n",
    "x: .nan\n",
    "x: .inf\n",
    "<<: 1\n",
    "<<: [1]\n",
    "<<: {seed: 5}\n",
    "x: " + "9" * 5000 + "\n",
    "--- 1\n--- 2\n",
    "%YAML 9.9\n---\nx: 1\n",
    "\tx: 1\n",
    "x: *nothing\n",
    "x: [" * 2000 + "\n",
    "x:\n" + "".join(" " * i + "y:\n" for i in range(1, 1500)),
    "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40)),  # 2^40 values
    "a0: &a0 {k: x, l: x}\n" + "".join(f"a{i}: &a{i} {{k: *a{i - 1}, l: *a{i - 1}}}\n" for i in range(1, 40)),
)


def any_yaml(rng: Random, data: bytes) -> bytes:
    kind = rng.random()
    if kind < 0.35:
        lines, odd = lines_of(data), rng.choice(YAML_ODDITIES).encode()
        where = rng.randrange(len(lines) + 1)
        return b"".join([*lines[:where], odd, *lines[where:]]) if rng.random() < 0.7 else odd
    if kind < 0.6:
        return edit_line(rng, data, lambda line: _odd_yaml_value(rng, line))
    return any_text(rng, data)


def _odd_yaml_value(rng: Random, line: bytes) -> bytes:
    key, found, _ = line.partition(b":")
    value = dump_json(rng, _odd_value(rng, 1)).replace(b"\n", b" ")
    return key + b": " + value + b"\n" if found else line


# ---- safetensors


def split_safetensors(data: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join_safetensors(header: bytes, body: bytes, length: int | None = None) -> bytes:
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header) if length is None else length) + header + body


def _safetensors_entries(rng: Random, header: dict[str, Any]) -> dict[str, Any]:
    """A header whose offsets, shapes, types or names do not fit; some still do."""
    names = [name for name in header if name != "__metadata__"]
    one, other = rng.choice(names), rng.choice(names)
    entry = header[one]
    kind = rng.randrange(10)
    if kind == 0:
        entry["data_offsets"][rng.randrange(2)] = rng.choice(EXTREMES)
    elif kind == 1:  # two tensors in one place
        entry["data_offsets"] = list(header[other]["data_offsets"])
    elif kind == 2:
        entry["data_offsets"] = [offset + rng.choice((-4, -1, 1, 4)) for offset in entry["data_offsets"]]
    elif kind == 3:
        entry["data_offsets"].reverse()
    elif kind == 4 and entry["shape"]:
        entry["shape"][rng.randrange(len(entry["shape"]))] = rng.choice(EXTREMES)
    elif kind == 5:
        entry["shape"] = rng.choice((entry["shape"][::-1], [*entry["shape"], 1], [0], [], [2**32, 2**32], [-1, -1]))
    elif kind == 6:
        dtypes = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL", "F8_E4M3", "C64", "x", "", 5)
        entry["dtype"] = rng.choice(dtypes)
    elif kind == 7:
        header[one], header[other] = header[other], header[one]
    elif kind == 8:
        header[rng.choice((one + "x", "", "\x00", one.upper(), "../" + one, "model." + one))] = header.pop(one)
    else:
        header["__metadata__"] = rng.choice(({}, {"format": "tf"}, {"x": 1}, [], "x", None, {"x": "y" * HUGE_TEXT}))
    return header


def any_safetensors(rng: Random, data: bytes) -> bytes:
    header, body = split_safetensors(data)
    kind = rng.random()
    if kind < 0.35:
        return join_safetensors(json.dumps(_safetensors_entries(rng, header)).encode(), body)
    if kind < 0.5:
        return join_safetensors(dump_json(rng, mutate_tree(rng, header)), body)
    if kind < 0.6:
        return join_safetensors(rng.choice((_key_twice, _nested))(rng, json.dumps(header).encode()), body)
    if kind < 0.7:
        return join_safetensors(json.dumps(header).encode(), body, rng.choice(EXTREMES) % 2**64)
    if kind < 0.85:
        end = len(data) - len(body)
        return in_range(rng, data, 0, end)
    return any_bytes(rng, data)


# ---- GGUF


def _gguf_numbers(data: bytes) -> list[tuple[int, int]]:
    """(position, width) of every number of a GGUF header that says how to read it, and of its scalar values."""
    widths = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
    found, position = [(4, 4), (8, 8), (16, 8)], 24

    def number(width: int) -> int:
        nonlocal position
        found.append((position, width))
        position += width
        return int.from_bytes(data[position - width : position], "little")

    def string() -> None:
        nonlocal position
        length = number(8)  # moves the position itself
        position += length

    def value(kind: int) -> None:
        nonlocal position
        if kind == 8:
            string()
        elif kind == 9:
            item, count = number(4), number(8)
            if item in widths:
                found.append((position, widths[item]))
                position += count * widths[item]
            else:
                for _ in range(count):
                    value(item)
        else:
            number(widths[kind])

    tensors, keys = int.from_bytes(data[8:16], "little"), int.from_bytes(data[16:24], "little")
    for _ in range(keys):
        string()
        value(number(4))
    for _ in range(tensors):
        string()
        for _ in range(number(4)):
            number(8)
        number(4), number(8)
    found.append((position, 0))  # where the header ends
    return found


def any_gguf(rng: Random, data: bytes) -> bytes:
    *numbers, (end, _) = _gguf_numbers(data)
    # the thousands of string lengths of the vocabulary would have all the rest drowned
    few = numbers[:120] + numbers[-200:]
    kind = rng.random()
    if kind < 0.6:
        for _ in range(rng.choice((1, 1, 2))):
            position, width = rng.choice(few if rng.random() < 0.9 else numbers)
            old = int.from_bytes(data[position : position + width], "little")
            value = rng.choice((*EXTREMES, old + 1, old - 1, old * 2, old // 2, old ^ 1)) % 256**width
            data = data[:position] + value.to_bytes(width, "little") + data[position + width :]
        return data
    if kind < 0.7:  # two numbers of one width change places: offsets, dimensions, types
        (a, width), (b, _) = sorted(
            rng.sample([entry for entry in few if entry[1] == rng.choice((4, 8))] or few[:2], 2)
        )
        if b - a < width:
            return data
        return data[:a] + data[b : b + width] + data[a + width : b] + data[a : a + width] + data[b + width :]
    if kind < 0.9:
        start = rng.choice((0, max(0, end - 4000)))
        return in_range(rng, data, start, min(end, start + 4000))
    return any_bytes(rng, data)
