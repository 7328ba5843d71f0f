"""Rare errors of what lies around a checkpoint: damaged GGUF headers, an absent package, a file beside the models."""

import importlib
import pkgutil
import struct
import sys

import pytest

import bivec.models
from bivec.models import CheckpointError, load_pretrained
from bivec.models.gguf_file import read_header

ARRAY, UINT32, Q8_0 = 9, 4, 8  # GGUF's numbers of types


def gguf_header(*parts, tensors=0, keys=0):
    return b"".join([b"GGUF", struct.pack("<IQQ", 3, tensors, keys), *parts])


def text(value):
    return struct.pack("<Q", len(value)) + value


def test_a_damaged_length_of_an_array_does_not_allocate(tmp_path):
    entry = text(b"tokenizer.ggml.scores") + struct.pack("<IIQ", ARRAY, UINT32, 2**40)
    (tmp_path / "m.gguf").write_bytes(gguf_header(entry, keys=1))
    with pytest.raises(CheckpointError, match=rf"m\.gguf: .*damaged \(an array of {2**40} entries in a file of 69 b"):
        read_header(tmp_path / "m.gguf")


@pytest.mark.parametrize("shape", [(), (33,), (32, 48)], ids=str)
def test_a_row_that_is_no_multiple_of_the_block_is_named(tmp_path, shape):
    pytest.importorskip("gguf")
    dimensions = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))  # the fastest first
    (tmp_path / "m.gguf").write_bytes(
        gguf_header(text(b"output.weight"), dimensions, struct.pack("<IQ", Q8_0, 0), bytes(4096), tensors=1)
    )
    with pytest.raises(CheckpointError, match=r"m\.gguf: tensor output\.weight has shape ") as raised:
        read_header(tmp_path / "m.gguf")
    assert str(raised.value).endswith(f"has shape {shape}, not a multiple of Q8_0's 32")


def test_a_hub_id_without_the_hub_package_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # as if it were not installed
    with pytest.raises(CheckpointError, match=r"^some/model: no such directory.*pip install huggingface_hub$"):
        load_pretrained("some/model")


def test_a_copy_that_an_editor_leaves_beside_the_models_is_no_family(tmp_path, monkeypatch):
    """Of a name that no ``import`` can spell; without the check it is an error at ``import bivec``."""
    (tmp_path / "llama copy.py").write_text("raise SystemExit('imported')", encoding="utf-8")
    find, seen = pkgutil.iter_modules, []

    def find_the_copy_too(path):
        for module in find([*path, str(tmp_path)]):
            seen.append(module.name)
            yield module

    monkeypatch.setattr(pkgutil, "iter_modules", find_the_copy_too)
    importlib.reload(bivec.models)
    assert "llama copy" in seen and "llama" in seen
    assert bivec.models.Llama is sys.modules["bivec.models.llama"].Llama
