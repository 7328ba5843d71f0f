"""The safetensors files of a directory: which tensors they hold, from the headers alone, and then the tensors."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from bivec.models.errors import CheckpointError
from bivec.models.plain_json import parse_json

WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
STORED_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
PICKLE_ADVICE = (
    "those are pickles, which can run code when loaded, so bivec does not read them; convert them once in a place you "
    "trust: transformers.AutoModelForCausalLM.from_pretrained(name).save_pretrained(folder), the tokenizer too"
)
# of a multimodal model (in its files; by its modules in transformers 5) and of a causal language model
TEXT_PREFIX = re.compile(r"^(language_model\.model\.|model\.language_model\.|language_model\.(?=lm_head)|model\.)")
VISION = re.compile(r"^(model\.)?(vision_tower|multi_modal_projector)\.")


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a safetensors checkpoint, before it is read."""

    file: Path
    key: str  # its name in the file
    shape: tuple[int, ...]
    dtype: str  # "float64", "float32", "bfloat16" or "float16"


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a directory's safetensors files by trunk name, from the files' headers alone."""
    entries: dict[str, StoredTensor] = {}
    for file in _weight_files(folder):
        try:
            with safe_open(file, framework="pt") as reader:
                for key in reader.keys():  # noqa: SIM118 - a safe_open handle is no mapping
                    name = _trunk_name(key)
                    if name is None:
                        continue
                    if name in entries:
                        raise CheckpointError(f"{file}: tensor {key} is also in {entries[name].file}")
                    stored = reader.get_slice(key)
                    if stored.get_dtype() not in STORED_DTYPES:
                        raise CheckpointError(
                            f"{file}: tensor {key} is stored as {stored.get_dtype()}; "
                            f"supported: {', '.join(STORED_DTYPES.values())}"
                        )
                    shape = tuple(stored.get_shape())
                    entries[name] = StoredTensor(file, key, shape, STORED_DTYPES[stored.get_dtype()])
        except SafetensorError as error:
            raise CheckpointError(
                f"{file}: not a complete safetensors file ({error}); truncated or damaged: copy or download it again"
            ) from None
    return entries


def _trunk_name(key: str) -> str | None:
    """The trunk's name of a tensor; None: of no use to it."""
    # a buffer that early LLaMA checkpoints carry; the eyes of Gemma 3
    if key.endswith("rotary_emb.inv_freq") or VISION.match(key):
        return None
    return TEXT_PREFIX.sub("", key)


def _weight_files(folder: Path) -> list[Path]:
    index_file, single_file = folder / INDEX_FILE, folder / WEIGHTS_FILE
    if index_file.is_file():
        try:
            names = sorted(set(parse_json(index_file.read_bytes())["weight_map"].values()))
            # a name with a path could lead anywhere on the disk
            odd = next((name for name in names if not name or Path(name).name != name or "\0" in name), None)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{index_file}: not a safetensors index ({type(error).__name__}: {error}); download it again"
            ) from None
        if odd is not None:
            raise CheckpointError(
                f"{index_file}: not a safetensors index (weight_map names {odd[:80]!r}, expected the name of a file "
                "beside it); download it again"
            )
        files = [folder / name for name in names]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise CheckpointError(
                f"{folder}: {len(missing)} of the {len(files)} shards that {INDEX_FILE} names are missing "
                f"({some_of(missing)}); copy or download them"
            )
        return files
    if single_file.is_file():
        return [single_file]
    if any(folder.glob("pytorch_model*.bin")):
        raise CheckpointError(f"{folder}: only pytorch_model.bin files; {PICKLE_ADVICE}")
    raise CheckpointError(
        f"{folder}: neither {WEIGHTS_FILE} nor {INDEX_FILE} is there; if there are only pytorch_model.bin files: "
        + PICKLE_ADVICE
    )


def read_stored(entries: dict[str, StoredTensor]) -> Iterator[tuple[str, Tensor]]:
    """The tensors file by file; each is a view of the mapped file, which is unmapped before the next one is opened."""
    for file in dict.fromkeys(entry.file for entry in entries.values()):
        with safe_open(file, framework="pt") as reader:
            for name, entry in entries.items():
                if entry.file == file:
                    yield name, reader.get_tensor(entry.key)


def some_of(names: Sequence[str]) -> str:
    """The first of the names, for an error."""
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
