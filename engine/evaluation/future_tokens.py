"""Does a token know what comes after it? Sentences that begin alike and go on alike, or not (METHOD 8.1).

A triple is q = (A, B), s+ = (A, C), s- = (A, D): all begin with the prefix A; B and C mean the same, D does not. The
vector of a sentence is the mean over the hidden states of the prefix's tokens only. What can tell s+ from s- in it is
what attention brings back from B, C and D: under a causal mask nothing, the three vectors are the same.

Source: paper, section 4.1 and appendix F, after the toy data of Springer et al., 2024. Those are not ours to ship:
recipes/data/future_token_triples.jsonl is of our own writing in their format, and their file can be given instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bivec.engine.data_files import decoded_lines
from bivec.engine.encoder import Encoder
from bivec.engine.errors import DataError
from bivec.engine.evaluation.echo import ECHO_TEMPLATE, EchoEncoder, token_span
from bivec.engine.evaluation.variants import Variant
from bivec.engine.figure import new_figure, save_figure
from bivec.engine.text_format import encode_strings
from bivec.models.plain_json import parse_json

FIELDS = {
    "query": ("query", "q"),
    "positive": ("positive", "s+", "s_pos", "s_plus", "pos"),
    "negative": ("negative", "s-", "s_neg", "s_minus", "neg"),
}
PREFIXES = ("prefix", "A", "a")
BINS = 15
ROUNDED = 6  # digits of a cosine: what is equal but for float32's noise is equal here, and ties


@dataclass(frozen=True)
class FutureTriple:
    """Three whole sentences that begin with the same prefix."""

    prefix: str
    query: str
    positive: str
    negative: str

    @property
    def texts(self) -> tuple[str, str, str]:
        """Query, positive, negative."""
        return self.query, self.positive, self.negative


@dataclass(frozen=True)
class FutureTokenResult:
    """How well the prefix alone tells s+ from s-."""

    variant: str
    positive: tuple[float, ...]  # cos(q, s+) of every triple
    negative: tuple[float, ...]  # cos(q, s-)
    auc: float  # 0…1, over all cosines: 0.5 = they cannot be told apart
    ordered: float  # 0…1: the part of the triples with cos(q, s+) > cos(q, s-)
    margin: float  # mean of cos(q, s+) - cos(q, s-)
    skipped: int  # triples left out: their prefix is not tokenised alike in all three

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)


def load_future_triples(path: str | Path, *, structure: str | None = None) -> list[FutureTriple]:
    """Reads triples.

    Args:
        path: a JSON Lines file with one object a line, or a JSON file with a list of objects (or ``{"data": [...]}``);
            also ``.gz``. An object has the three sentences under ``query`` / ``positive`` / ``negative``, or ``q`` /
            ``s+`` / ``s-`` (also ``s_pos``, ``s_neg``): each the whole sentence, or a pair ``[prefix, rest]``, or the
            rest alone with the prefix in a field ``prefix`` (or ``A``). Of whole sentences without such a field the
            prefix is what all three have in common, up to the last whole word.
        structure: only objects whose field ``structure`` is this, such as "3", "S3" or "structure_3" of a file that
            holds several kinds.

    Raises:
        DataError: no such file, not of this format (with the line or the number of the object), no triple in it.
    """
    path = Path(path).expanduser()
    wanted = _digits(structure or "")
    if structure is not None and not wanted:
        raise DataError(f"structure {structure!r} has no number; give one such as 3")
    triples = []
    for where, item in _objects(path):
        if structure is None or _digits(item.get("structure", "")) == wanted:
            triples.append(_triple(item, f"{path}, {where}"))
    if not triples:
        kind = "" if structure is None else f" of structure {structure}"
        raise DataError(f"{path}: holds no triple{kind}")
    return triples


def future_tokens(
    variants: Sequence[Variant],
    triples: Sequence[FutureTriple],
    *,
    echo: str | None = ECHO_TEMPLATE,
    device: torch.device | str | None = None,
    report: Callable[[FutureTokenResult], None] = lambda _: None,
) -> list[FutureTokenResult]:
    """The test on every variant; one model at a time is in memory.

    Args:
        variants: states of a model.
        triples: see :func:`load_future_triples`.
        echo: Echo's template, for a result of Uni read the Echo way: the prefix of the second copy; None = none.
        device: None = CPU.
        report: called with every result as it comes.

    Raises:
        BivecError: files that are missing or damaged; no triple is tokenised as the test needs it.
    """
    results = []
    for variant in variants:
        encoder = variant.load(device=device)
        results.append(future_token_test(variant.name, encoder, triples))
        report(results[-1])
        if echo is not None and variant.name == "uni":
            results.append(future_token_test("echo", EchoEncoder(encoder, template=echo), triples))
            report(results[-1])
    return results


def future_token_test(name: str, encoder: Encoder, triples: Sequence[FutureTriple]) -> FutureTokenResult:
    """The test on one encoder; its pooling, instruction and template do not count.

    Args:
        name: of the result.
        encoder: any; of an :class:`EchoEncoder` the prefix of the second copy is read.
        triples: at least one.

    Raises:
        DataError: no triple whose prefix is tokenised alike in its three sentences.
    """
    from sklearn.metrics import roc_auc_score

    vectors, skipped = prefix_vectors(encoder, triples)  # [N, 3, D]
    query, positive, negative = vectors.transpose(1, 0, 2).astype(np.float64)
    toward, away = _cosines(query, positive), _cosines(query, negative)
    labels = np.repeat([1, 0], len(toward))
    return FutureTokenResult(
        variant=name,
        positive=tuple(toward.tolist()),
        negative=tuple(away.tolist()),
        auc=float(roc_auc_score(labels, np.concatenate([toward, away]))),
        ordered=float(np.mean(toward > away)),
        margin=float(np.mean(toward - away)),
        skipped=skipped,
    )


def prefix_vectors(encoder: Encoder, triples: Sequence[FutureTriple]) -> tuple[np.ndarray, int]:
    """The mean over the prefix's hidden states in each of a triple's three sentences.

    The prefix's tokens are those that end inside it; a BOS belongs to no character. A triple in which they are not the
    same in all three sentences is left out: its vectors would differ without any look ahead.

    Args:
        encoder: any.
        triples: N of them.

    Returns:
        float32 [N - skipped, 3, D] in the order q, s+, s-; and the number of triples left out.

    Raises:
        DataError: all are left out.
    """
    rows: list[list[int]] = []
    spans: list[tuple[int, int]] = []
    for triple in triples:
        found = [_prefix_row(encoder, triple.prefix, text) for text in triple.texts]
        prefixes = [ids[start:end] for ids, (start, end) in found]
        if prefixes[0] and prefixes[0] == prefixes[1] == prefixes[2]:
            rows += [ids for ids, _ in found]
            spans += [span for _, span in found]
    if not rows:
        raise DataError(f"of {len(triples)} triples none has a prefix that is tokenised alike in its three sentences")
    vectors = np.empty((len(rows), encoder.dimension), np.float32)
    for hidden, cu_seqlens, indices in encoder.hidden_states(rows):
        pooled = encoder.pool_spans(hidden, cu_seqlens, [spans[i] for i in indices], "mean")
        vectors[indices] = pooled.cpu().numpy()
    return vectors.reshape(-1, 3, encoder.dimension), len(triples) - len(rows) // 3


def future_token_markdown(results: Sequence[FutureTokenResult]) -> str:
    """A table, one row a variant."""
    lines = [
        "| state | AUC | cos(q,s+) > cos(q,s-) | mean cos(q,s+) | mean cos(q,s-) | mean margin | triples |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in results:
        means = f"{np.mean(one.positive):.4f} | {np.mean(one.negative):.4f} | {one.margin:.4f}"
        number = f"{len(one.positive)}" + (f" ({one.skipped} left out)" if one.skipped else "")
        lines.append(f"| {one.variant} | {one.auc:.3f} | {100 * one.ordered:.0f} % | {means} | {number} |")
    return "\n".join(lines)


def draw_future_tokens(path: str | Path, results: Sequence[FutureTokenResult]) -> None:
    """Histograms of cos(q, s+) and cos(q, s-), overlaid, one panel a variant.

    Args:
        path: of the PNG file.
        results: one at least.
    """
    figure = new_figure(3.2 * len(results), 3.2)
    for axis, one in zip(figure.subplots(1, len(results), squeeze=False)[0], results, strict=True):
        low, high = min(*one.positive, *one.negative), max(*one.positive, *one.negative)
        room = max(high - low, 0.01)  # where all are equal, one narrow bar
        bins = np.linspace(high - room, high, BINS + 1)
        axis.hist(one.negative, bins, alpha=0.65, edgecolor="black", label="cos(q, s-)")
        axis.hist(one.positive, bins, alpha=0.65, edgecolor="black", label="cos(q, s+)")
        axis.set(title=f"{one.variant}\nAUC {one.auc:.3f}", xlabel="cosine of the prefixes")
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8)
    save_figure(figure, path)


def _prefix_row(encoder: Encoder, prefix: str, text: str) -> tuple[list[int], tuple[int, int]]:
    """A sentence's token ids, cut at the model's length, and the prefix's tokens among them."""
    start = 0
    if isinstance(encoder, EchoEncoder):
        text, _, start = encoder.echo_format.expand("", text)
    (encoding,) = encode_strings(encoder.tokenizer, [text])
    offsets = encoding.offsets[: encoder.config.max_length]
    return encoding.ids[: len(offsets)], token_span(offsets, start, start + len(prefix), whole=True)


def _cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """[N] of two [N, D]."""
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    cosines: np.ndarray = (a * b).sum(axis=1) / np.where(norms > 0, norms, 1.0)
    return np.asarray(cosines.round(ROUNDED))


def _objects(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """The file's objects, each with where it stands."""
    lines = decoded_lines(path)
    found: list[tuple[str, Any]] = []
    if path.name.removesuffix(".gz").endswith(".jsonl"):
        for number, line in enumerate(lines, start=1):
            if line.strip():
                found.append((f"line {number}", _parse(line, f"{path}, line {number}")))
    else:
        whole = _parse("".join(lines), str(path))
        whole = whole.get("data") if isinstance(whole, dict) else whole
        if not isinstance(whole, list):
            raise DataError(f'{path}: expected a list of objects, or one under "data"')
        found = [(f"object {number}", item) for number, item in enumerate(whole, start=1)]
    for where, item in found:
        if not isinstance(item, dict):
            raise DataError(f"{path}, {where}: expected a JSON object, found {type(item).__name__}")
    return found


def _parse(text: str, where: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        raise DataError(f"{where}: not JSON ({error})") from None


def _triple(item: dict[str, Any], where: str) -> FutureTriple:
    prefix = next((str(item[name]).strip() for name in PREFIXES if name in item), None)
    texts = []
    for field, names in FIELDS.items():
        value = next((item[name] for name in names if name in item), None)
        if isinstance(value, list) and len(value) == 2 and all(isinstance(part, str) for part in value):
            prefix = value[0].strip() if prefix is None else prefix
            value = _joined(value[0].strip(), value[1])
        if not isinstance(value, str) or not value.strip():
            raise DataError(f"{where}: no sentence under {' or '.join(names)} ({field})")
        value = value.strip()
        texts.append(value if prefix is None or value.startswith(prefix) else _joined(prefix, value))
    if prefix is None:
        common = _common_start(texts)
        inside_word = any(text[len(common) : len(common) + 1].strip() for text in texts)
        prefix = (common.rpartition(" ")[0] if inside_word else common).strip()
    if not prefix or not all(text.startswith(prefix) and len(text) > len(prefix) for text in texts):
        raise DataError(f"{where}: the three sentences do not begin alike; leave it out, or choose a structure")
    return FutureTriple(prefix, *texts)


def _common_start(texts: Sequence[str]) -> str:
    alike = 0
    for characters in zip(*texts, strict=False):
        if len(set(characters)) > 1:
            break
        alike += 1
    return texts[0][:alike]


def _joined(prefix: str, rest: str) -> str:
    return f"{prefix} {rest.strip()}"


def _digits(structure: object) -> str:
    return "".join(character for character in str(structure) if character.isdigit())
