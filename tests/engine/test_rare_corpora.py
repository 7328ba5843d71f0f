"""Corpora on odd disks and systems, and beginnings of which a part has gone."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from bivec.engine import corpus_files
from bivec.engine.corpus import encode_corpus
from bivec.engine.corpus_files import CorpusFiles
from bivec.engine.encoder import Encoder
from bivec.engine.errors import RunError

TEXTS = ["a choir sang", "the river runs north", "old kings", "a ship, sailed", ""]
SETTINGS = {"slice_texts": 2}


@pytest.fixture(scope="module")
def encoder(tiny_llama_dir):
    return Encoder.from_pretrained(tiny_llama_dir)


@pytest.fixture(scope="module")
def whole(encoder, tmp_path_factory):
    """The bytes of the file that nobody interrupted."""
    return encode_corpus(encoder, TEXTS, tmp_path_factory.mktemp("whole") / "e.npy", **SETTINGS).read_bytes()


def stopped(encoder, path, owner, name, when):
    """A call that ends where ``when(*arguments)`` of this function is true for the first time; its folder."""
    function = getattr(owner, name)

    def stop(*arguments):
        if when(*arguments):
            raise KeyboardInterrupt
        return function(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, stop)
        with pytest.raises(KeyboardInterrupt):
            encode_corpus(encoder, TEXTS, path, **SETTINGS)
    return path.with_name(".e.npy.partial")


@pytest.mark.parametrize("name", ["done", "vectors.npy"])
def test_a_part_of_the_beginning_cannot_be_read(encoder, whole, tmp_path, name):
    path = tmp_path / "e.npy"
    folder = stopped(encoder, path, CorpusFiles, "write", lambda _, first, __: first == 2)
    (folder / name).unlink()
    if name == "vectors.npy":
        (folder / name).mkdir()
    with pytest.raises(RunError, match=rf"e\.npy\.partial: .*{name} cannot be read \(.*\); damaged, or changed by"):
        encode_corpus(encoder, TEXTS, path, **SETTINGS)
    encode_corpus(encoder, TEXTS, path, **SETTINGS, overwrite=True)
    assert path.read_bytes() == whole


def test_stopped_behind_the_renaming(encoder, whole, tmp_path, monkeypatch):
    """The file is there, its record is not yet: the next call writes that, and encodes nothing."""
    path = tmp_path / "e.npy"
    folder = stopped(encoder, path, Path, "replace", lambda _, target: target == tmp_path / "e.npy.json")
    assert path.read_bytes() == whole and folder.is_dir() and not (tmp_path / "e.npy.json").exists()
    with monkeypatch.context() as patch:
        patch.setattr(Encoder, "hidden_states", None)
        encode_corpus(encoder, TEXTS, path, **SETTINGS)
    assert path.read_bytes() == whole and (tmp_path / "e.npy.json").is_file() and not folder.exists()


def test_a_beginning_without_its_vectors_begins_anew(encoder, whole, tmp_path):
    path = tmp_path / "e.npy"
    folder = stopped(encoder, path, CorpusFiles, "write", lambda _, first, __: first == 2)
    (folder / "vectors.npy").unlink()
    encode_corpus(encoder, TEXTS, path, **SETTINGS)
    assert path.read_bytes() == whole and not folder.exists()


@pytest.mark.parametrize("number", [errno.EIO, errno.EFBIG])
def test_a_disk_that_fails_is_not_called_full(encoder, tmp_path, monkeypatch, number):
    def broken(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(corpus_files.os, "posix_fallocate", broken, raising=False)
    with pytest.raises(RunError) as caught:
        encode_corpus(encoder, TEXTS, tmp_path / "e.npy", **SETTINGS)
    assert os.strerror(number) in str(caught.value) and "full" not in str(caught.value)
    assert not (tmp_path / "e.npy").exists()


def test_a_disk_that_fails_in_the_middle_goes_through(encoder, whole, tmp_path, monkeypatch):
    def broken(*_):
        raise OSError(errno.EIO, "Input/output error")

    path = tmp_path / "e.npy"
    with monkeypatch.context() as patch:
        patch.setattr(corpus_files, "_write_at", broken)
        with pytest.raises(OSError, match="Input/output error") as caught:
            encode_corpus(encoder, TEXTS, path, **SETTINGS)
    assert caught.value.errno == errno.EIO
    encode_corpus(encoder, TEXTS, path, **SETTINGS)
    assert path.read_bytes() == whole


def test_a_system_that_cannot_reserve_space(encoder, whole, tmp_path, monkeypatch):
    """As macOS."""
    monkeypatch.delattr(corpus_files.os, "posix_fallocate", raising=False)
    path = encode_corpus(encoder, TEXTS, tmp_path / "e.npy", **SETTINGS)
    assert path.read_bytes() == whole and np.load(path).shape == (5, encoder.dimension)
