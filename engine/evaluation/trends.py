"""Which trends of the paper hold for a model: each claim beside the paper's figures and ours, decided by the figures.

A difference counts from ``MARGIN`` points on (``WORD_MARGIN`` for the accuracy of words, of which there are thousands);
a smaller one is called too close, since one seed of one small model moves by as much.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

MARGIN, WORD_MARGIN = 1.0, 0.3  # points of the measure: Spearman, accuracy, AUC … x 100
LITTLE = 3.0  # points that are still "a little": the paper's three losses are 0.7 to 1.7
HOLDS, FAILS, CLOSE, MISSING = "holds", "does not hold", "too close to call", "not measured"
Scores = Mapping[str, float]  # by variant, or by pooling


@dataclass(frozen=True)
class Trend:
    """One claim of the paper and what came out here."""

    claim: str
    paper: str  # its figures
    ours: str
    verdict: str  # HOLDS, FAILS, CLOSE or MISSING


def rising(claim: str, paper: str, scores: Scores, order: Sequence[str], margin: float = MARGIN) -> Trend:
    """The claim that every score is above the one before it.

    Args:
        claim: in words.
        paper: its figures.
        scores: x 100.
        order: keys of ``scores``, from the lowest on.
        margin: of a step that counts, in points.
    """
    if any(name not in scores for name in order):
        return Trend(claim, paper, "", MISSING)
    steps = [scores[above] - scores[below] for below, above in pairwise(order)]
    verdict = HOLDS if min(steps) >= margin else FAILS if min(steps) <= -margin else CLOSE
    shown = f"{order[0]} {scores[order[0]]:.1f}"
    for name, step in zip(order[1:], steps, strict=True):
        shown += f" {'<' if step > 0 else '>' if step < 0 else '='} {name} {scores[name]:.1f}"
    return Trend(claim, paper, shown, verdict)


def small_loss(claim: str, paper: str, scores: Scores, before: str, after: str) -> Trend:
    """The claim that a step costs something, but not more than ``LITTLE``."""
    if before not in scores or after not in scores:
        return Trend(claim, paper, "", MISSING)
    loss = scores[before] - scores[after]
    verdict = FAILS if loss > LITTLE or loss <= -WORD_MARGIN else HOLDS if loss >= WORD_MARGIN else CLOSE
    return Trend(claim, paper, f"{before} {scores[before]:.1f}, {after} {scores[after]:.1f}", verdict)


def highest(claim: str, paper: str, scores: Scores, name: str) -> Trend:
    """The claim that one score is above all others."""
    others = {other: score for other, score in scores.items() if other != name}
    if name not in scores or not others:
        return Trend(claim, paper, "", MISSING)
    best = max(others, key=others.__getitem__)
    lead = scores[name] - others[best]
    verdict = HOLDS if lead >= MARGIN else FAILS if lead <= -MARGIN else CLOSE
    return Trend(claim, paper, f"{name} {scores[name]:.1f}, best of the others {best} {others[best]:.1f}", verdict)


def sequence_trends(sts: Scores) -> list[Trend]:
    """Claims on sequence tasks.

    Args:
        sts: Spearman x 100 by variant, each with the mean, and "uni weighted_mean", "echo" where they were measured.
    """
    return [
        rising(
            "Bidirectional attention alone hurts a LLaMA-type decoder",
            "S-LLaMA-1.3B 30.26 (Bi) < 33.03 (Uni), LLaMA-2-7B 38.22 < 45.83; Mistral-7B 50.07 > 43.00 (Table 5, mean)",
            sts,
            ("bi", "uni"),
        ),
        rising(
            "MNTP more than repairs it, already without SimCSE",
            "S-LLaMA-1.3B 33.03 (Uni) < 42.10 (Bi+MNTP), LLaMA-2-7B 45.83 < 48.00 (Table 5, mean)",
            sts,
            ("uni", "bi+mntp"),
        ),
        rising(
            "MNTP alone beats the best causal pooling",
            "S-LLaMA-1.3B 34.99 (Uni, weighted mean) < 42.10, LLaMA-2-7B 47.85 < 48.00 (Table 5)",
            sts,
            ("uni weighted_mean", "bi+mntp"),
        ),
        rising(
            "SimCSE improves it further",
            "S-LLaMA-1.3B 42.10 < 52.40, LLaMA-2-7B 48.00 < 58.97, Mistral-7B 53.89 < 60.50 (Table 5, mean)",
            sts,
            ("bi+mntp", "bi+mntp+simcse"),
        ),
        rising(
            "Of the three that have SimCSE the one after MNTP is best",
            "S-LLaMA-1.3B: Uni+SimCSE 44.95, Bi+SimCSE 44.46 < 52.40 (Table 5, mean)",
            _better_of(sts, "bi+simcse", "uni+simcse") | dict(sts),
            ("better of bi+simcse and uni+simcse", "bi+mntp+simcse"),
        ),
        rising(
            "Echo beats the causal decoder it is made of, and LLM2Vec beats Echo",
            "S-LLaMA-1.3B 35.05 (Uni, weighted mean) < 39.10 (Echo) < 49.42 (Table 1, 56 tasks)",
            sts,
            ("uni weighted_mean", "echo", "bi+mntp+simcse"),
        ),
    ]


def pooling_trends(table: Mapping[str, Scores]) -> list[Trend]:
    """Claims on pooling.

    Args:
        table: by variant, the score of "eos_token", "mean" and "weighted_mean".
    """
    found = []
    for variant, best, paper in (
        ("uni", "weighted_mean", "S-LLaMA-1.3B: 27.72 EOS, 33.03 mean, 34.99 weighted mean (Table 5)"),
        ("bi+mntp", "mean", "S-LLaMA-1.3B: 29.16, 42.10, 38.67"),
        ("bi+mntp+simcse", "mean", "S-LLaMA-1.3B: 45.57, 52.40, 50.23"),
    ):
        words = {"mean": "the mean", "weighted_mean": "the weighted mean"}[best]
        found.append(highest(f"{variant}: {words} is the best pooling", paper, table.get(variant, {}), best))
    for variant in ("uni", "bi+mntp", "bi+mntp+simcse"):
        scores = table.get(variant, {})
        worst = _better_of(scores, "mean", "weighted_mean", worse=True)
        if "eos_token" in scores and worst:
            found.append(
                rising(
                    f"{variant}: the EOS token is the worst pooling",
                    "in all 18 rows of Table 5",
                    worst | dict(scores),
                    ("eos_token", "worse of mean and weighted_mean"),
                )
            )
    return found


def word_trends(tasks: Mapping[str, Scores], read: str) -> list[Trend]:
    """Claims on word tasks.

    Args:
        tasks: by task ("chunking", "ner", "pos"), the token accuracy x 100 by variant.
        read: where the words were read, for the claims.
    """
    papers = {
        "chunking": "S-LLaMA-1.3B 76.50 < 86.10 < 90.51 (Table 4)",
        "ner": "S-LLaMA-1.3B 92.17 < 96.09 < 96.59",
        "pos": "S-LLaMA-1.3B 89.18 < 90.89 < 92.04",
    }
    found = [
        rising(
            f"{task}, {read}: Bi < Uni < Bi+MNTP", papers.get(task, ""), scores, ("bi", "uni", "bi+mntp"), WORD_MARGIN
        )
        for task, scores in tasks.items()
    ]
    found += [
        small_loss(
            f"{task}, {read}: SimCSE after MNTP costs a little on words, at most {LITTLE:.0f} points",
            {"chunking": "S-LLaMA-1.3B 90.51 > 89.33", "ner": "96.59 > 95.90", "pos": "92.04 > 90.38"}.get(task, ""),
            scores,
            "bi+mntp",
            "bi+mntp+simcse",
        )
        for task, scores in tasks.items()
    ]
    gains = {
        task: scores["bi+mntp"] - scores["uni"] for task, scores in tasks.items() if {"uni", "bi+mntp"} <= scores.keys()
    }
    claim = f"Words {read}: chunking gains most by MNTP over Uni"
    found.append(highest(claim, "S-LLaMA-1.3B +4.41, NER +0.50, POS +1.15 (Table 4)", gains, "chunking"))
    return found


def prefix_trends(auc: Scores) -> list[Trend]:
    """Claims on the future-token test.

    Args:
        auc: area under the curve x 100 by variant, of cos(q, s+) against cos(q, s-).
    """
    figures = "Figure 4 shows histograms only: s+ and s- come apart after MNTP for S-LLaMA and LLaMA-2"
    return [
        rising("Bidirectional attention lets a prefix know what follows", figures, auc, ("uni", "bi")),
        rising("MNTP makes that knowledge useful", figures, auc, ("bi", "bi+mntp")),
    ]


def _better_of(scores: Scores, one: str, other: str, *, worse: bool = False) -> dict[str, float]:
    if one not in scores or other not in scores:
        return {}
    choose: Callable[[float, float], float] = min if worse else max
    return {f"{'worse' if worse else 'better'} of {one} and {other}": choose(scores[one], scores[other])}


def trends_table(trends: Sequence[Trend]) -> str:
    """Markdown: claim, verdict, our figures, the paper's."""
    rows = [f"| {one.claim} | **{one.verdict}** | {one.ours} | {one.paper} |" for one in trends]
    return "\n".join(["| claim of the paper | here | our figures | the paper's |", "|---|---|---|---|", *rows])
