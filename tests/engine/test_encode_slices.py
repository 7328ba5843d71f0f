"""Long lists are encoded in slices, the next one tokenised by a thread meanwhile."""

import threading
from pathlib import Path

import numpy as np
import pytest

from bivec.engine.data import load_texts
from bivec.engine.encoder import SLICE_TEXTS, Encoder, one_ahead
from bivec.engine.errors import BivecError, DataError

SAMPLE = Path(__file__).parents[2] / "recipes/data/wikipedia_sentences.txt.gz"


@pytest.fixture(scope="module")
def encoder(tiny_llama_dir):
    return Encoder.from_pretrained(tiny_llama_dir)


def test_encode_in_slices(encoder, monkeypatch):
    """A list longer than a slice; errors count from its beginning."""
    assert SLICE_TEXTS > 1000
    texts = load_texts(SAMPLE, limit=50)
    expected = encoder.encode(texts)
    monkeypatch.setattr("bivec.engine.encoder.SLICE_TEXTS", 7)
    np.testing.assert_allclose(encoder.encode(texts), expected, rtol=0, atol=1e-5)
    with pytest.raises(BivecError, match=r"^text 40: '.*ud83d' is half of a surrogate pair"):
        encoder.encode([*texts[:40], "\ud83d"])
    with pytest.raises(BivecError, match=r"^text 1: '.*ud83d' is half of a surrogate pair"):
        encoder.encode_tokens(["a", "b\ud83d"])


def test_one_is_made_while_another_is_used():
    made, threads, go = [], [], threading.Event()

    def items():
        for number in range(4):
            threads.append(threading.current_thread())
            made.append(number)
            go.set()
            yield number

    seen = []
    for item in one_ahead(items()):
        if item < 3:
            go.wait(timeout=30)
            while len(made) < item + 2:  # the next one comes without being asked for
                threading.Event().wait(0.001)
        go.clear()
        seen.append((item, len(made)))
    assert seen == [(0, 2), (1, 3), (2, 4), (3, 4)]
    assert threads[0] is threading.current_thread() and threads[1] is not threads[0]

    def broken():
        yield 1
        raise DataError("no")

    found = one_ahead(broken())
    assert next(found) == 1
    with pytest.raises(DataError, match="no"):
        next(found)
    assert list(one_ahead([])) == []


def test_one_slice_needs_no_thread(tiny_llama_dir, monkeypatch):
    encoder = Encoder.from_pretrained(tiny_llama_dir)
    monkeypatch.setattr("bivec.engine.encoder.SLICE_TEXTS", 2)
    expected = encoder.encode(["a choir sang", "the river", "north"])
    monkeypatch.setattr("bivec.engine.encoder_inputs.ThreadPoolExecutor", None)
    found = encoder.encode(["a choir sang", "the river"])
    assert (found == expected[:2]).all()
    with pytest.raises(TypeError):  # two slices have one
        encoder.encode(["a choir sang", "the river", "north"])
