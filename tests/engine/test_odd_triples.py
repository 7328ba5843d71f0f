"""Triples as nobody would write them, from the file to the gradients of a step.

What ``load_triples`` says of bad lines is in test_triples.py, which rows make a batch in test_triple_batches.py, what
becomes of odd texts in test_text_format.py, the filters of false negatives in test_supervised.py. Here all of it
together, against a reference that embeds every text alone, in float64.
"""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F

from bivec.engine.errors import DataError
from bivec.engine.lora import LoraConfig, add_lora
from bivec.engine.optim import OptimConfig
from bivec.engine.supervised import SupervisedObjective, TripleRows
from bivec.engine.text_format import TextFormat
from bivec.engine.tokenizer import load_tokenizer
from bivec.engine.trainer import train
from bivec.engine.triple_batches import TripleBatches
from bivec.engine.triples import load_triples
from bivec.kernels import segment_pool
from bivec.models import PackedBatch, load_pretrained

MAX_LENGTH = 40
TEMPLATE = "[I] {text} [E]"
SCALE = 20.0
LONG = "wört 7 " * 14_286  # 100,002 characters, 114,288 bytes
ODD = [
    {"query": "a", "positive": "b"},  # one character, no negative
    {"query": LONG, "positive": "short", "negatives": [LONG[:-1] + "!"], "instruction": "Find it"},
    {"query": "q", "positive": LONG[1:], "negatives": [f"negative {i}" for i in range(20)]},
    {"query": "北京 🙂", "positive": "\u202eright to left\u202c", "negatives": ["e\u0301" * 50], "positive_id": 7},
    {
        "query": " spaces  ",
        "positive": "tab\tand\nline",
        "positive_id": "7",
        "negatives": ["b"],
    },  # the first's positive
    {"query": "x" * 100_000, "positive": "a word without end", "negatives": ["[E] [I]", "<s></s>"]},
    {"query": "a", "positive": "b"},  # the first once more
    {"query": "the same", "positive": "the same", "negatives": ["the same", "c"], "positive_id": 8},
]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def objective(directory, path, batch_size, *, dtype=torch.float64, lora_dropout=0.0, **options):
    model = load_pretrained(directory, dtype=dtype).model
    adapter = add_lora(model, LoraConfig(rank=4, dropout=lora_dropout), seed=1)
    for number, parameter in enumerate(adapter.named_parameters().values()):
        values = torch.rand(parameter.shape, generator=torch.Generator().manual_seed(number))
        parameter.data = (0.2 * values - 0.1).to(dtype)  # an adapter is fp32, whatever the model
    rows = TripleRows(
        TripleBatches(load_triples(path, on_bad_line="skip"), batch_size, seed=3),
        TextFormat(load_tokenizer(directory), max_length=MAX_LENGTH, template=TEMPLATE),
    )
    return SupervisedObjective(model, adapter, rows, seed=7, scale=SCALE, **options)


def step(found, number=0):
    """Loss and gradients of a step."""
    parameters = found.adapter.named_parameters().values()
    for parameter in parameters:
        parameter.grad = None
    loss = 0.0
    for micro in found.micro_losses(number):
        micro.loss.backward()
        loss += float(micro.value)
    return loss, [parameter.grad.clone() for parameter in parameters]


def alone(found, ids, start, end):
    """The embedding of one row in a forward of its own [1, D]."""
    batch = PackedBatch.from_sequences([ids])
    span = {"span_starts": torch.tensor([start]), "span_ends": torch.tensor([end])}
    return segment_pool(found.model(batch), batch.cu_seqlens, **span)


def same_documents(triples):
    """[[bool]]: by query and candidate, whether the candidate is the positive, or what the query must not push away.

    Two documents are one if they share an id or a text, if they answer one query, or if they repeat it; and what is one
    with a third is one with the other. Found by going over all pairs again and again.
    """
    names = [{("text", t.query), ("text", t.positive)} | ({("id", t.positive_id)} - {("id", None)}) for t in triples]
    candidates = [names[i] for i in range(len(triples))]
    for triple in triples:
        for place, text in enumerate(triple.negatives):
            identity = triple.negative_ids[place] if triple.negative_ids else None
            candidates.append({("text", text)} | ({("id", identity)} - {("id", None)}))
    groups = [set(names) for names in candidates]
    merged = True
    while merged:
        merged = False
        for one in groups:
            for other in groups:
                if one & other and one != other:
                    one.update(other)
                    merged = True
    return [[bool(groups[i] & groups[j]) for j in range(len(candidates))] for i in range(len(triples))]


def test_a_step_of_odd_rows_is_the_plain_loss_of_its_texts(tiny_llama_dir, tmp_path):
    """Texts of 1 and of 100,000 characters, none and twenty negatives, ids and texts that come twice."""
    found = objective(tiny_llama_dir, write_jsonl(tmp_path / "odd.jsonl", ODD), len(ODD))
    rows, triples = found.rows.of(0), found.rows.batches.triples(0)
    assert len(triples) == len(ODD) and len(rows.input_ids) == 2 * len(ODD) + 27
    # the long ones keep both ends of the template, and as much of the text as there is room for
    tokenizer = found.rows.text_format.tokenizer
    lengths = sorted(map(len, rows.input_ids))
    assert lengths[-4:] == [MAX_LENGTH] * 4 and lengths[0] < 12
    for ids, (start, end) in zip(rows.input_ids, rows.spans, strict=True):
        text = tokenizer.decode(ids)
        assert text.startswith("<s>[I] ") and text.endswith("[E]") and 0 < start < end == len(ids)
    loss, gradients = step(found)
    for parameter in found.adapter.named_parameters().values():
        parameter.grad = None
    vectors = torch.cat(
        [alone(found, ids, *span) for ids, span in zip(rows.input_ids, rows.spans.tolist(), strict=True)]
    )
    queries, candidates = F.normalize(vectors[: len(ODD)]), F.normalize(vectors[len(ODD) :])
    scores, count = SCALE * queries @ candidates.T, 0
    for i, same in enumerate(same_documents(triples)):
        for j, hidden in enumerate(same):
            if hidden and i != j:
                scores[i, j] = -math.inf
                count += 1
    # the first and its double: each other's positive and the negative "b"; the two of id 7; the last and its negative
    assert count == 2 * 2 + 2 + 1
    expected = F.cross_entropy(scores, torch.arange(len(ODD)))
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-9)
    for ours, parameter in zip(gradients, found.adapter.named_parameters().values(), strict=True):
        assert (ours - parameter.grad).norm() <= 1e-8 * parameter.grad.norm() and parameter.grad.norm() > 0


@pytest.mark.parametrize("budget", [1, 100])
def test_odd_rows_in_micro_batches(tiny_llama_dir, tmp_path, budget):
    path = write_jsonl(tmp_path / "odd.jsonl", ODD)
    options = {"lora_dropout": 0.1, "attention_dropout": 0.2}
    loss, gradients = step(objective(tiny_llama_dir, path, len(ODD), **options))
    cut, theirs = step(objective(tiny_llama_dir, path, len(ODD), micro_batch_tokens=budget, **options))
    assert cut == pytest.approx(loss, rel=1e-10)
    for one, other in zip(gradients, theirs, strict=True):
        assert (one - other).norm() <= 1e-9 * one.norm()


NOTHING_TO_LEARN = {
    "one document for all": ([{"query": f"q{i}", "positive": f"p{i}", "positive_id": 1} for i in range(4)], 4),
    "one text for all": ([{"query": f"q{i}", "positive": "p", "negatives": ["p"]} for i in range(4)], 4),
    "one query for all": ([{"query": "q", "positive": f"p{i}"} for i in range(4)], 4),
    "a batch of one": ([{"query": f"q{i}", "positive": f"p{i}"} for i in range(4)], 1),
    "a batch of one, its negative is the query": ([{"query": "q", "positive": "p", "negatives": ["q"]}] * 4, 1),
}


@pytest.mark.parametrize("name", NOTHING_TO_LEARN)
def test_a_batch_without_a_true_negative_trains_nothing_and_breaks_nothing(tiny_llama_dir, tmp_path, name):
    """Loss 0 and gradient 0, not NaN; the weights stay; the same batch has a loss where nothing is filtered."""
    rows, batch_size = NOTHING_TO_LEARN[name]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    found = objective(tiny_llama_dir, path, batch_size, dtype=torch.float32, lora_dropout=0.1)
    before = [parameter.detach().clone() for parameter in found.adapter.named_parameters().values()]
    metrics = []
    optim = OptimConfig(1e-2, steps=3, weight_decay=0.0)
    train("supervised", found, found.adapter.named_parameters(), optim, log=metrics.append, progress=False)
    assert [(line.loss, line.grad_norm) for line in metrics] == [(0.0, 0.0)] * 3
    assert all(map(torch.equal, before, found.adapter.named_parameters().values()))
    if name != "a batch of one":  # which has no negative at all
        unfiltered = objective(tiny_llama_dir, path, batch_size, dtype=torch.float32, filter_same=False)
        assert step(unfiltered)[0] > 0


def test_bad_lines_between_good_ones_never_reach_a_batch(tiny_llama_dir, tmp_path):
    """Skipped and counted; the good ones train as they would without them, but for the order of the rows."""
    good = [{"query": f"query {i}", "positive": f"positive {i}", "negatives": [f"n{i}"]} for i in range(6)]
    bad = ["{", "", "[]", '{"query": "", "positive": "p"}', '{"query": "q", "positive": " \\t"}', '{"query": "q"}']
    path = tmp_path / "mixed.jsonl"
    lines = [line for row, other in zip(good, bad, strict=True) for line in (other, json.dumps(row))]
    path.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(DataError, match=r"mixed.jsonl, line 1: not JSON"):
        load_triples(path)
    [triples] = load_triples(path, on_bad_line="skip")
    assert triples.bad_lines == 5  # a blank line is no row
    mixed = step(objective(tiny_llama_dir, path, 3), 1)
    clean = step(objective(tiny_llama_dir, write_jsonl(tmp_path / "clean.jsonl", good), 3), 1)
    assert mixed[0] == clean[0] and all(map(torch.equal, mixed[1], clean[1]))


def test_a_set_that_is_too_small_never_reaches_a_batch(tiny_llama_dir, tmp_path):
    folder = tmp_path / "sets"
    folder.mkdir()
    write_jsonl(folder / "small.jsonl", [{"query": "small", "positive": "p"}])
    write_jsonl(folder / "large.jsonl", [{"query": f"large {i}", "positive": f"p{i}"} for i in range(5)])
    with pytest.warns(UserWarning, match=r"left out, with fewer triples than a batch of 2.*: small \(1\)"):
        found = objective(tiny_llama_dir, folder, 2)
    queries = {triple.query for number in range(12) for triple in found.rows.batches.triples(number)}
    assert queries == {f"large {i}" for i in range(5)}  # all of them in time, whatever an epoch leaves over
    (folder / "empty.jsonl").touch()
    with pytest.raises(DataError, match=r"empty.jsonl holds no triples"):
        objective(tiny_llama_dir, folder, 2)
