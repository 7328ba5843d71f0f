"""The supervised objective against plain torch in float64, its filters, and gradient caching."""

from dataclasses import FrozenInstanceError, dataclass, replace

import pytest
import torch
import torch.nn.functional as F

from bivec.engine.distributed import World
from bivec.engine.errors import DataError
from bivec.engine.lora import LoraConfig, add_lora
from bivec.engine.supervised import DocumentIds, SupervisedObjective, TripleRows
from bivec.engine.text_format import TextFormat
from bivec.engine.tokenizer import load_tokenizer
from bivec.engine.triple_batches import TripleBatches
from bivec.engine.triples import Triple
from bivec.models import load_pretrained

TRIPLES = [
    Triple("who sang it", "the song was sung by a choir", ("a ship sailed", "the king is old"), "Find a passage"),
    Triple("a river in the north", "the river runs to the sea", ("the town has a church",), "Find a passage"),
    Triple("what is the capital", "it became the capital in 1901", (), "Find a passage"),
    Triple("a game of two teams", "two teams of eleven play", ("the song was sung by a choir",)),
]


class Listed(list):
    """Triples in memory, with the name of a data set."""

    name = "listed"


def objective(directory, triples=TRIPLES, *, dtype=torch.float64, causal=False, template=None, **options):
    model = load_pretrained(directory, dtype=dtype).model
    adapter = add_lora(model, LoraConfig(rank=4, dropout=options.pop("lora_dropout", 0.1)), seed=1)
    for number, parameter in enumerate(adapter.named_parameters().values()):
        values = torch.rand(parameter.shape, generator=torch.Generator().manual_seed(number))
        parameter.data = (0.2 * values - 0.1).to(dtype)  # an adapter is fp32, whatever the model
    text_format = TextFormat(load_tokenizer(directory), max_length=options.pop("max_length", 64), template=template)
    batches = TripleBatches([Listed(triples)], batch_size=len(triples), seed=3)
    rows = TripleRows(batches, text_format)
    return SupervisedObjective(model, adapter, rows, seed=7, attention_dropout=0.2, causal=causal, **options)


def step(found, number=2):
    """Loss, gradients and micro-batches of a step."""
    parameters = found.adapter.named_parameters().values()
    for parameter in parameters:
        parameter.grad = None
    loss = count = 0
    for micro in found.micro_losses(number):
        micro.loss.backward()
        loss, count = loss + float(micro.value), count + 1
    return loss, [parameter.grad.clone() for parameter in parameters], count


def plain_loss(vectors, count, scale=50.0, hidden=()):
    """Cross-entropy of cosines over positives and negatives; ``hidden`` (query, candidate) pairs are left out."""
    queries, candidates = F.normalize(vectors[:count]), F.normalize(vectors[count:])
    scores = scale * queries @ candidates.T
    for query, candidate in hidden:
        scores[query, candidate] = -torch.inf
    return F.cross_entropy(scores, torch.arange(count))


def random_vectors(count=11, width=16):
    return torch.randn(count, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def ordered(found, number=2):
    return found.rows.batches.triples(number)


def test_the_loss_is_cross_entropy_over_positives_and_negatives(tiny_llama_dir):
    """Of the embeddings that the model gives to the packed rows."""
    found = objective(tiny_llama_dir, lora_dropout=0.0, scale=5.0)
    triples = ordered(found)
    rows = found.rows.of(2)
    kept = []
    found_loss = found.loss_of

    def noting(embeddings, **rest):
        kept.append(embeddings.detach().clone())
        return found_loss(embeddings, **rest)

    object.__setattr__(found, "loss_of", noting)
    loss, _, _ = step(found)
    texts = [triple.query for triple in triples] + [triple.positive for triple in triples]
    texts += [text for triple in triples for text in triple.negatives]
    assert len(kept[0]) == len(rows.input_ids) == len(texts) == 12
    tokenizer = found.rows.text_format.tokenizer
    for ids, (start, end), text in zip(rows.input_ids, rows.spans, texts, strict=True):
        assert tokenizer.decode(ids[start:end], skip_special_tokens=True).strip() == text
    shared = "the song was sung by a choir"  # the positive of one query and the negative of another
    owner = next(row for row, triple in enumerate(triples) if triple.positive == shared)
    place = texts[4:].index(shared, 4)
    assert loss == pytest.approx(plain_loss(kept[0], 4, 5.0, hidden=[(owner, place)]).item(), rel=1e-9)
    assert loss != pytest.approx(plain_loss(kept[0], 4, 5.0).item(), rel=1e-6)


def test_the_instruction_is_read_and_not_pooled(tiny_llama_dir):
    found = objective(tiny_llama_dir)
    triples = ordered(found)
    rows = found.rows.of(2)
    tokenizer = found.rows.text_format.tokenizer
    for ids, (start, _), triple in zip(rows.input_ids, rows.spans, triples, strict=False):
        head = tokenizer.decode(ids[:start], skip_special_tokens=True)
        assert head.strip() == (f"{triple.instruction};" if triple.instruction else "")


@pytest.mark.parametrize(
    ("triples", "hidden"),
    [
        # one document as the positive of two queries, by id and by text
        ([Triple("a", "x", ("u",), positive_id="7"), Triple("b", "y", ("v",), positive_id="7")], [(0, 1), (1, 0)]),
        ([Triple("a", "x", ("u",)), Triple("b", "x", ("v",))], [(0, 1), (1, 0)]),
        # as another query's negative, and as a query's own
        ([Triple("a", "x", ("y",)), Triple("b", "y", ("v",))], [(1, 2)]),
        ([Triple("a", "x", ("x",)), Triple("b", "y", ("v",))], [(0, 2)]),
        ([Triple("a", "x", ("u",), "", "1", ("2",)), Triple("b", "y", ("v",), "", "2", ("3",))], [(1, 2)]),
        # an id is no text; equal texts are one document, whatever their ids
        ([Triple("a", "x", ("u",), positive_id="y"), Triple("b", "y", ("v",))], []),
        ([Triple("a", "x", ("u",), positive_id="1"), Triple("b", "x", ("v",), positive_id="2")], [(0, 1), (1, 0)]),
        ([Triple("a", "x", ("x",), positive_id="1"), Triple("b", "y", ("v",), positive_id="2")], [(0, 2)]),
        # another positive of the same query; the query itself as a candidate
        ([Triple("a", "x", ("u",)), Triple("a", "y", ("v",))], [(0, 1), (1, 0)]),
        ([Triple("a", "x", ("u",)), Triple("b", "a", ("v",))], [(0, 1), (1, 0)]),
        ([Triple("a", "x", ("u",)), Triple("b", "y", ("a",))], [(0, 3)]),
    ],
)
def test_a_positive_is_no_negative(tiny_llama_dir, triples, hidden):
    found, vectors = objective(tiny_llama_dir, scale=2.0), random_vectors(6)  # at 50 one cosine alone counts
    ids = DocumentIds.of(triples, "cpu")
    loss = found.loss_of(vectors, counts=[1, 1], ids=ids).item()
    assert loss == pytest.approx(plain_loss(vectors, 2, 2.0, hidden=hidden).item(), rel=1e-9)
    unfiltered = found.loss_of(vectors, counts=[1, 1], ids=None).item()
    assert unfiltered == pytest.approx(plain_loss(vectors, 2, 2.0).item(), rel=1e-9)
    assert (loss == pytest.approx(unfiltered, rel=1e-3)) is not bool(hidden)


def test_margin(tiny_llama_dir):
    """Negatives above the positive's cosine - margin are left out."""
    vectors = random_vectors(8)
    cosines = F.normalize(vectors[:3]) @ F.normalize(vectors[3:]).T
    for margin in (0.1, -0.2):
        hidden = [
            (query, candidate)
            for query in range(3)
            for candidate in range(5)
            if candidate != query and cosines[query, candidate] > cosines[query, query] - margin
        ]
        assert 0 < len(hidden) < 12
        loss = objective(tiny_llama_dir, margin=margin, scale=2.0).loss_of(vectors, counts=[1, 1, 0], ids=None)
        assert loss.item() == pytest.approx(plain_loss(vectors, 3, 2.0, hidden=hidden).item(), rel=1e-9)


def test_matryoshka(tiny_llama_dir):
    vectors = random_vectors(7)
    expected = (plain_loss(vectors, 2) + plain_loss(vectors[:, :4], 2)) / 2
    loss = objective(tiny_llama_dir, matryoshka_dims=(4, 16)).loss_of(vectors, counts=[2, 1], ids=None)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)


def test_without_negatives(tiny_llama_dir):
    triples = [replace(triple, negatives=()) for triple in TRIPLES]
    loss, gradients, _ = step(objective(tiny_llama_dir, triples))
    assert loss > 0 and all(gradient.norm() > 0 for gradient in gradients)
    vectors = random_vectors(8)
    assert objective(tiny_llama_dir, triples).loss_of(vectors, counts=[0] * 4, ids=None).item() == pytest.approx(
        plain_loss(vectors, 4).item(), rel=1e-9
    )


def test_one_negative_in_all(tiny_llama_dir):
    vectors = random_vectors(5)
    loss = objective(tiny_llama_dir, scale=2.0).loss_of(vectors, counts=[0, 1], ids=None)
    assert loss.item() == pytest.approx(plain_loss(vectors, 2, 2.0).item(), rel=1e-9)


@dataclass(frozen=True)
class Told(World):
    """One of several ranks, which gets the others' rows without them."""

    whole: tuple[torch.Tensor, ...] = ()

    def gather(self, rows, counts):
        (found,) = [one for one in self.whole if len(one) == sum(counts)]
        start = sum(counts[: self.rank])
        assert len(counts) == self.size and torch.equal(found[start : start + counts[self.rank]], rows)
        return found


@pytest.mark.parametrize(("size", "shares"), [(2, [3, 2]), (3, [2, 2, 1])])
def test_ranks_share_the_loss(tiny_llama_dir, size, shares):
    """Each its queries, against the documents of all; the shares add up to the loss of one rank."""
    counts, vectors = [2, 0, 3, 1, 1], random_vectors(17)
    queries, positives, negatives = vectors.split([5, 5, 7])
    ids = DocumentIds(torch.tensor([0, 1, 2, 0, 4]), torch.tensor([5, 6, 1, 7, 8, 9, 10]))
    alone = objective(tiny_llama_dir, scale=2.0)
    losses, first, before = [], 0, 0
    for rank, share in enumerate(shares):
        own = sum(counts[first : first + share])
        parts = [queries[first : first + share], positives[first : first + share], negatives[before : before + own]]
        ranked = replace(alone, world=Told(rank, size, whole=(positives, negatives)))
        losses.append(ranked.loss_of(torch.cat(parts), counts, ids).item())
        first, before = first + share, before + own
    assert sum(losses) == pytest.approx(alone.loss_of(vectors, counts, ids).item(), rel=1e-9)
    hidden = [(0, 3), (3, 0), (1, 7)]  # one document; the second query's as a negative of the third
    assert sum(losses) == pytest.approx(plain_loss(vectors, 5, 2.0, hidden=hidden).item(), rel=1e-9)


def test_no_attention_dropout_by_default(tiny_llama_dir):
    found = objective(tiny_llama_dir)
    plain = SupervisedObjective(found.model, found.adapter, found.rows, seed=7)
    assert step(plain)[0] == step(replace(found, attention_dropout=0.0))[0] != step(found)[0]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("budget", [1, 40, 80])
def test_micro_batches_change_nothing(tiny_llama_dir, dtype, tolerance, budget):
    whole = step(objective(tiny_llama_dir, dtype=dtype))
    cached = step(objective(tiny_llama_dir, dtype=dtype, micro_batch_tokens=budget))
    assert whole[2] == 1 < cached[2]
    assert cached[0] == pytest.approx(whole[0], rel=tolerance)
    for ours, theirs in zip(cached[1], whole[1], strict=True):
        assert theirs.norm() > 0 and (ours - theirs).norm() <= tolerance * theirs.norm()


def test_the_uni_baseline(tiny_llama_dir):
    """Causal attention and the weighted mean: each changes the loss."""
    losses = [
        step(objective(tiny_llama_dir, causal=causal, pooling=pooling))[0]
        for causal in (False, True)
        for pooling in ("mean", "weighted_mean")
    ]
    assert len({round(loss, 6) for loss in losses}) == 4


@pytest.mark.parametrize("asked", [True, False, None])
def test_the_instruction_of_symmetric_sets_stands_before_documents_too(tiny_llama_dir, asked):
    triples = [replace(TRIPLES[0], symmetric=True), TRIPLES[1]]
    found = objective(tiny_llama_dir, triples)
    rows = found.rows if asked is None else replace(found.rows, symmetric_instruction=asked)
    asked = asked is not False  # None: the default
    tokenizer, heads = rows.text_format.tokenizer, []
    for ids, (start, _) in zip(rows.of(2).input_ids, rows.of(2).spans, strict=True):
        heads.append(tokenizer.decode(ids[:start], skip_special_tokens=True).strip())
    symmetric = [triple.symmetric for triple in ordered(found)]
    own = [both and asked for both in symmetric]
    owners = [i for i, triple in enumerate(ordered(found)) for _ in triple.negatives]
    assert [head == "Find a passage;" for head in heads] == [True, True, *own, *(own[i] for i in owners)]


def test_a_tokenizer_of_another_model_is_told(tiny_llama_dir):
    rows = replace(objective(tiny_llama_dir).rows, vocab_size=100)
    with pytest.raises(DataError, match="the model's vocabulary ends at 99; they do not belong together"):
        rows.of(0)


def test_the_last_id_of_the_vocabulary_is_one(tiny_llama_dir):
    rows = objective(tiny_llama_dir).rows
    largest = max(map(max, rows.of(0).input_ids))
    assert len(replace(rows, vocab_size=largest + 1).of(0).input_ids) == 12
    with pytest.raises(DataError, match=f"gives the id {largest}, the model's vocabulary ends at {largest - 1};"):
        replace(rows, vocab_size=largest).of(0)


def test_sample_ids_number_the_texts_of_a_step(tiny_llama_dir):
    """Queries, positives, negatives, over all ranks; a million to a step."""
    rows = objective(tiny_llama_dir, TRIPLES[:3]).rows
    triples = rows.batches.triples(2)
    assert rows.of(2).sample_ids.tolist() == [(2 << 20) + i for i in range(9)]
    first = [len(triple.negatives) for triple in triples]
    for rank, mine in enumerate(([0, 1], [2])):
        own = [6 + i for i in range(sum(first[: mine[0]]), sum(first[: mine[-1] + 1]))]
        expected = [*mine, *(3 + i for i in mine), *own]
        assert rows.of(2, world=World(rank, 2)).sample_ids.tolist() == [(2 << 20) + i for i in expected]


def test_document_ids_stay_as_they_are(tiny_llama_dir):
    ids = DocumentIds.of(TRIPLES, "cpu")
    with pytest.raises(FrozenInstanceError):
        ids.positives = ids.negatives


def test_no_sample_id_comes_twice(tiny_llama_dir):
    found = objective(tiny_llama_dir)
    ids = [i for number in range(3) for i in found.rows.of(number).sample_ids]
    assert len(set(ids)) == len(ids) == 36


@pytest.mark.parametrize("field", ["query", "positive", "negative"])
def test_a_text_without_anything_to_pool_is_named(tiny_llama_dir, field):
    long = "an instruction of many words " * 20
    changed = {
        "query": replace(TRIPLES[1], instruction=long),
        "positive": replace(TRIPLES[1], positive=" "),
        "negative": replace(TRIPLES[1], negatives=("fine", "")),
    }[field]
    found = objective(tiny_llama_dir, [TRIPLES[0], changed, *TRIPLES[2:]], max_length=32)
    with pytest.raises(DataError, match=rf"listed, row 1 \(from 0\), {field}: "):
        list(found.micro_losses(0))


def test_less_memory_ends(tiny_llama_dir):
    found, settings = objective(tiny_llama_dir), []
    while found is not None:
        settings.append(found.memory_setting())
        found = found.with_less_memory()
    assert settings[2] == "recomputation 'layer'" and "micro-batches of" in settings[-1]
    assert len(set(settings)) == len(settings) >= 5
