"""GGUF files as files: header, tensor table, and one tensor's values. What they mean to a model is in ``gguf.py``.

The header is read here rather than with ``gguf.GGUFReader``: that class makes a numpy view per vocabulary string, 3.1 s
and 161 MB for SmolLM2's file where this reader takes 0.1 s and 10 MB, and reports a truncated file as an IndexError.
Block formats and their dequantisation come from the ``gguf`` package.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from bivec.models.errors import CheckpointError

SUPPORTED_VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
STRING, ARRAY = 8, 9
SCALAR_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


@dataclass(frozen=True)
class GgufTensor:
    """Where one tensor lies in the file."""

    name: str  # llama.cpp name: "blk.0.attn_q.weight"
    shape: tuple[int, ...]  # torch order (rows first)
    type_name: str  # "F32", "Q4_1", …
    offset: int  # bytes from the start of the file
    row_bytes: int  # bytes of one row (the last dimension)


@dataclass(frozen=True)
class GgufFile:
    """The header of a GGUF file."""

    path: Path
    metadata: dict[str, Any]  # scalars, strings and lists by GGUF key
    tensors: dict[str, GgufTensor]


def read_header(path: str | Path) -> GgufFile:
    """Reads the metadata and the tensor table of a GGUF file, and checks that the file holds every tensor's bytes.

    Raises:
        CheckpointError: not a GGUF file, truncated, split over several files, or a tensor type the ``gguf`` package
            does not know.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            if stream.read(4) != b"GGUF":
                raise CheckpointError(f"{path}: not a GGUF file (its first four bytes are not 'GGUF')")
            version = _scalar(stream, "I")
            if version not in SUPPORTED_VERSIONS:
                raise CheckpointError(f"{path}: GGUF version {version}; versions {SUPPORTED_VERSIONS} are supported")
            tensor_count, key_count = _scalar(stream, "Q"), _scalar(stream, "Q")
            metadata = {}
            for _ in range(key_count):
                key = _string(stream, size)
                if key in metadata:
                    raise CheckpointError(f"{path}: the key {key[:80]!r} is there twice; copy the file again")
                metadata[key] = _value(stream, _scalar(stream, "I"), size)
            table = [_tensor_info(stream, size) for _ in range(tensor_count)]
            data_start = stream.tell()
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    except (EOFError, UnicodeDecodeError, struct.error, OverflowError, MemoryError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: the GGUF header is truncated or damaged ({error}); copy the file again"
        ) from None
    if metadata.get("split.count", 1) not in (0, 1):
        raise CheckpointError(
            f"{path}: split over {metadata['split.count']} files; merge them with llama-gguf-split --merge"
        )
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if type(alignment) is not int or alignment < 1:
        raise CheckpointError(f"{path}: general.alignment is {repr(alignment)[:80]}, expected a number of bytes")
    data_start += -data_start % alignment
    tensors = [_locate(path, size, data_start, *entry) for entry in table]
    _check_layout(path, tensors, data_start, alignment)
    return GgufFile(path, metadata, {tensor.name: tensor for tensor in tensors})


def _check_layout(path: Path, tensors: list[GgufTensor], start: int, alignment: int) -> None:
    """Tensors lie one behind the other, as llama.cpp demands: no two in one place, no hole, no name twice."""
    names, end = set(), start
    for tensor in sorted(tensors, key=lambda tensor: tensor.offset):
        if tensor.name in names:
            raise CheckpointError(f"{path}: tensor {tensor.name} is there twice; copy the file again")
        names.add(tensor.name)
        end += -(end - start) % alignment
        if tensor.offset != end:
            raise CheckpointError(
                f"{path}: tensor {tensor.name} begins at byte {tensor.offset}, the one before it ends at {end}; its "
                "offset, shape or type is damaged: copy the file again"
            )
        end += math.prod(tensor.shape[:-1]) * tensor.row_bytes


def _scalar(stream: BinaryIO, code: str) -> Any:
    """One little-endian value of the ``struct`` format ``code``."""
    width = struct.calcsize("<" + code)
    data = stream.read(width)
    if len(data) < width:
        raise EOFError("the file ends inside the header")
    return struct.unpack("<" + code, data)[0]


def _string(stream: BinaryIO, file_size: int) -> str:
    length = _scalar(stream, "Q")
    if length > file_size:  # a damaged length must not become a huge read
        raise EOFError(f"a string of {length} bytes in a file of {file_size}")
    data = stream.read(length)
    if len(data) < length:
        raise EOFError("the file ends inside a string")
    return data.decode("utf-8")


def _value(stream: BinaryIO, kind: int, file_size: int) -> Any:
    if kind == STRING:
        return _string(stream, file_size)
    if kind == ARRAY:
        item_kind, length = _scalar(stream, "I"), _scalar(stream, "Q")
        if length > file_size:
            raise EOFError(f"an array of {length} entries in a file of {file_size} bytes")
        if item_kind in SCALAR_FORMATS:
            code = f"<{length}{SCALAR_FORMATS[item_kind]}"
            data = stream.read(struct.calcsize(code))
            return list(struct.unpack(code, data))
        return [_value(stream, item_kind, file_size) for _ in range(length)]
    if kind not in SCALAR_FORMATS:
        raise EOFError(f"unknown value type {kind}")
    return _scalar(stream, SCALAR_FORMATS[kind])


def _tensor_info(stream: BinaryIO, file_size: int) -> tuple[str, tuple[int, ...], int, int]:
    """(name, shape in torch order, type number, offset in the data section)."""
    name = _string(stream, file_size)
    dimensions = _scalar(stream, "I")
    shape = tuple(_scalar(stream, "Q") for _ in range(min(dimensions, 8)))
    return name, shape[::-1], _scalar(stream, "I"), _scalar(stream, "Q")


def _locate(path: Path, size: int, start: int, name: str, shape: tuple[int, ...], kind: int, offset: int) -> GgufTensor:
    gguf = gguf_package()
    try:
        quantisation = gguf.GGMLQuantizationType(kind)
    except ValueError:
        raise CheckpointError(f"{path}: tensor {name} has the unknown type number {kind}") from None
    block, block_bytes = gguf.GGML_QUANT_SIZES[quantisation]
    if not shape or shape[-1] % block:
        raise CheckpointError(
            f"{path}: tensor {name} has shape {shape}, not a multiple of {quantisation.name}'s {block}"
        )
    row_bytes = shape[-1] // block * block_bytes
    end = start + offset + math.prod(shape[:-1]) * row_bytes
    if end > size:
        raise CheckpointError(
            f"{path}: truncated: tensor {name} ends at byte {end}, the file has {size}; copy or download it again"
        )
    return GgufTensor(name, shape, quantisation.name, start + offset, row_bytes)


def gguf_package() -> ModuleType:
    """The package, imported when it is needed."""
    try:
        import gguf
    except ImportError:
        raise CheckpointError("a .gguf file needs the package gguf: pip install gguf") from None
    return gguf


def read_tensor(file: GgufFile, tensor: GgufTensor) -> Tensor:
    """One tensor, dequantised to float32 in the layout of the file (q and k still permuted).

    Raises:
        CheckpointError: a quantisation that the ``gguf`` package cannot undo.
    """
    gguf = gguf_package()
    rows = math.prod(tensor.shape[:-1])
    data = np.memmap(file.path, mode="c", dtype=np.uint8, offset=tensor.offset, shape=(rows, tensor.row_bytes))
    try:
        values = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[tensor.type_name])
    except NotImplementedError:
        raise CheckpointError(
            f"{file.path}: tensor {tensor.name} is quantised as {tensor.type_name}, which gguf cannot dequantise; "
            "take a file in F32, F16, BF16, Q8_0 or another of llama.cpp's Q and IQ formats, or the safetensors"
        ) from None
    # the copy makes F32 tensors independent of the mapped file
    return torch.from_numpy(np.array(values, dtype=np.float32)).reshape(tensor.shape)
