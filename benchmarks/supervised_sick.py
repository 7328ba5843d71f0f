"""What does supervised training add to the small encoder? SICK's triples from three starts, as the paper's Table 2.

    python recipes/llm2vec_smollm2.py                       # the base: 10 minutes on two idle cores
    python benchmarks/supervised_sick.py --base runs/llm2vec-smollm2-135m --sick DIR
    python benchmarks/supervised_sick.py … --starts "Bi+MNTP+SimCSE" --set supervised.optim.learning_rate=5e-4

``--sick`` is a folder with SICK_train.txt and SICK_test_annotated.txt (SemEval 2014, task 1; CC BY-NC-SA, so not
shipped): recipes/entailment_triples.py makes triples of them, an entailed sentence as the positive, a contradicting one
as the hard negative. recipes/supervised.py then trains from the plain decoder (Uni: causal, weighted mean), from
Bi+MNTP and from Bi+MNTP+SimCSE, with the hyper-parameters of recipes/llm2vec_smollm2.py; ``--set`` goes to it too.

Spearman x 100 on all pairs of STS-B dev and test, before and after. Every supervised model is compared with the
unsupervised Bi+MNTP+SimCSE by a paired bootstrap: pairs are drawn with replacement, both models are ranked on the same
draw, and the interval holds the middle 95 % of the differences. It tells how much the choice of pairs matters, not how
much the seed of the training does. SICK and STS-B both hold captions of images and videos, so the overlap is counted:
sentences equal as they stand, and equal without case and punctuation; and all correlations are given a second time
on the pairs with neither sentence among SICK's triples. Writes supervised_sick.{json,md,png} into benchmarks/results.

Longer than 400 lines: the trainings, the bootstrap, the overlap and the page are steps of one comparison, and no other
script has a use for any of them.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from quick_start import processor
from timing import describe_run

from bivec import Encoder
from bivec.engine.data import STSPair, load_sts
from bivec.engine.encoder_config import EncoderConfig
from bivec.engine.inputs import resolve_model
from bivec.engine.lora import load_adapter
from bivec.engine.recipe import Recipe, SupervisedStage, as_dict
from bivec.engine.tokenizer import load_tokenizer
from bivec.models import load_pretrained

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ROOT / "recipes"
SICK_FILES = ("SICK_train.txt", "SICK_test_annotated.txt")
SPLITS = ("dev", "test")
UNSUPERVISED = "Bi+MNTP+SimCSE"  # what supervised training is compared with
RESAMPLES = 10_000


@dataclass(frozen=True)
class Start:
    """A model that supervised training begins with."""

    name: str
    adapters: tuple[str, ...] = ()  # of the base run, merged before
    causal: bool = False
    pooling: str = "mean"

    @property
    def folder(self) -> str:
        """The name as a directory."""
        return re.sub("[^a-z]+", "-", self.name.lower())


STARTS = (
    Start("Uni", causal=True, pooling="weighted_mean"),
    Start("Bi+MNTP", ("mntp",)),
    Start(UNSUPERVISED, ("mntp", "simcse")),
)


@dataclass(frozen=True)
class Difference:
    """Of two models' correlations on the same pairs, x 100; ``low`` to ``high`` is the bootstrap's interval."""

    points: float
    low: float
    high: float


def spearman(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Rank correlation x 100 of the rows of two [R, N] arrays -> [R]; equal values share their mean rank."""
    from scipy.stats import rankdata

    ranks = [rankdata(values, axis=-1) for values in (first, second)]
    one, other = (rank - rank.mean(axis=-1, keepdims=True) for rank in ranks)
    return 100 * (one * other).sum(-1) / np.sqrt((one**2).sum(-1) * (other**2).sum(-1))


def paired_bootstrap(
    new: np.ndarray, old: np.ndarray, scores: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0
) -> Difference:
    """By how much ``new`` follows the scores better than ``old``.

    Args:
        new: [N] cosines of a model.
        old: [N] of another one, for the same pairs.
        scores: [N] of people.
        resamples: how often N pairs are drawn with replacement.
        seed: of the draws.

    Returns:
        The difference on the pairs as they are, and its 2.5 and 97.5 percentiles over the draws.
    """
    generator = np.random.default_rng(seed)
    found = []
    for count in [500] * (resamples // 500) + [resamples % 500] * (resamples % 500 > 0):  # 500 x 1,500 ranks at a time
        drawn = generator.integers(0, len(scores), (count, len(scores)))
        found.append(spearman(new[drawn], scores[drawn]) - spearman(old[drawn], scores[drawn]))
    low, high = np.percentile(np.concatenate(found), [2.5, 97.5])
    return Difference(float(spearman(new, scores) - spearman(old, scores)), float(low), float(high))


def plain(sentence: str) -> str:
    """Without case, punctuation and double spaces: SICK's sentences have lost their full stops."""
    return " ".join(re.findall(r"[\w']+", sentence.lower()))


def overlap(triples: Sequence[Mapping[str, Any]], pairs: Sequence[STSPair]) -> dict[str, int]:
    """How much of an STS set stands in the triples."""
    trained = {text for row in triples for text in texts(row)}
    plain_trained = {plain(text) for text in trained}
    positives = {frozenset((plain(row["query"]), plain(row["positive"]))) for row in triples}
    tested = {text for pair in pairs for text in (pair.sentence1, pair.sentence2)}
    return {
        "sentences": len(tested),
        "in_the_triples_as_they_stand": len(tested & trained),
        "in_the_triples_without_case_and_punctuation": sum(plain(text) in plain_trained for text in tested),
        "pairs": len(pairs),
        "pairs_with_a_sentence_in_the_triples": int(np.count_nonzero(~unseen(triples, pairs))),
        "pairs_that_are_a_query_and_its_positive": sum(
            frozenset((plain(pair.sentence1), plain(pair.sentence2))) in positives for pair in pairs
        ),
    }


def unseen(triples: Sequence[Mapping[str, Any]], pairs: Sequence[STSPair]) -> np.ndarray:
    """[N] bool: the pairs with neither sentence in the triples, case and punctuation aside."""
    trained = {plain(text) for row in triples for text in texts(row)}
    return np.array([not {plain(pair.sentence1), plain(pair.sentence2)} & trained for pair in pairs])


def texts(row: Mapping[str, Any]) -> Iterable[str]:
    """All sentences of a triple."""
    return (row["query"], row["positive"], *row["negatives"])


def settings(stage: Mapping[str, Any], default: Mapping[str, Any], prefix: str) -> list[str]:
    """``KEY=VALUE`` for ``--set``, of every field in which a stage (as a dict) differs from the default."""
    found = []
    for name, value in stage.items():
        if isinstance(value, dict):
            found += settings(value, default[name], f"{prefix}.{name}")
        elif value != default[name]:
            text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
            found.append(f"{prefix}.{name}={text}")  # None, True and False are read in any case
    return found


def command(start: Start, base: Path, recipe: Mapping[str, Any], stage: Sequence[str], triples: Path) -> list[str]:
    """The flags of recipes/supervised.py for a start.

    Args:
        start: see there.
        base: run directory of the unsupervised model.
        recipe: of that run, as in its run.json.
        stage: settings of the supervised stage.
        triples: the training data.
    """
    if start.name == UNSUPERVISED:  # what the run has made of the decoder; its folder says how a text is pooled
        flags, assigned = ["--model", str(base)], [*stage]
    else:
        flags, assigned = ["--model", recipe["model"]], [f"pool_bos={recipe['pool_bos']}", *stage]
        flags += ["--adapters", ",".join(str(base / name) for name in start.adapters)] if start.adapters else []
        assigned += [f"bos_token={recipe['bos_token']}"] if recipe["bos_token"] else []
    assigned += ["supervised.causal=true", f"supervised.pooling={start.pooling}"] if start.causal else []
    assigned += ["eval_pairs=2", "supervised.save_every=0"]  # evaluated here, on all pairs
    flags += ["--supervised-data", str(triples)]
    return [*flags, *(word for one in assigned for word in ("--set", one))]


def start_encoder(start: Start, base: Path, recipe: Mapping[str, Any]) -> Encoder:
    """The model that training begins with."""
    checkpoint = load_pretrained(resolve_model(recipe["model"]), dtype=torch.float32)
    for name in start.adapters:
        load_adapter(checkpoint.model, base / name).merge()
    tokenizer = load_tokenizer(checkpoint.tokenizer_path, bos_token=recipe["bos_token"])
    rules = EncoderConfig(pooling=start.pooling, causal=start.causal, pool_bos=bool(recipe["pool_bos"]))
    return Encoder(checkpoint.model, tokenizer, rules)


def cosines(encoder: Encoder, pairs: Sequence[STSPair]) -> np.ndarray:
    """Of the pairs' vectors, [N] float64."""
    rows = {text: None for pair in pairs for text in (pair.sentence1, pair.sentence2)}
    vectors = encoder.encode(list(rows), normalize_embeddings=True).astype(np.float64)
    number = {text: row for row, text in enumerate(rows)}
    first, second = (vectors[[number[text] for text in side]] for side in zip(*map(both, pairs), strict=True))
    return (first * second).sum(1)


def both(pair: STSPair) -> tuple[str, str]:
    """Its two sentences."""
    return pair.sentence1, pair.sentence2


def train(start: Start, directory: Path, flags: Sequence[str]) -> dict[str, Any]:
    """Runs the recipe in a process of its own, or goes on with what is left of an earlier one."""
    resume = ["--resume"] if (directory / "run.json").is_file() else []
    script = [sys.executable, str(RECIPES / "supervised.py"), "--output-dir", str(directory), *flags, *resume]
    print(f"\n{start.name}: {' '.join(flags)}", flush=True)
    subprocess.run(script, check=True)
    results = json.loads((directory / "results.json").read_text(encoding="utf-8"))
    lines = [json.loads(x) for x in (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {
        "steps": len(lines),
        "tokens": sum(line["tokens"] for line in lines),
        "training_seconds": sum(line["tokens"] / line["tokens_per_s"] for line in lines),
        "run_seconds": results["seconds"],  # with loading and saving
        "peak_memory_bytes": results["peak_memory_bytes"],
        "losses": [line["loss"] for line in lines],
    }


def scores_of(pairs: Sequence[STSPair]) -> np.ndarray:
    """What people have given, [N]."""
    return np.array([pair.score for pair in pairs])


def correlations(found: Mapping[str, np.ndarray], sets: Mapping[str, Sequence[STSPair]], kept: Mapping) -> dict:
    """By split, on all pairs and on those that ``kept`` names."""
    row = {}
    for split, pairs in sets.items():
        scores = scores_of(pairs)
        row[split] = float(spearman(found[split], scores))
        row[f"{split}_unseen"] = float(spearman(found[split][kept[split]], scores[kept[split]]))
    return row


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line a start: before, after, and the difference from the unsupervised model."""
    header = (
        "| start | dev: before | supervised | against unsupervised Bi+MNTP+SimCSE [95 %] | test: before | supervised "
        "| training |"
    )
    lines = [
        header,
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        before, after, gain = row["before"], row["after"], row["difference"]["dev"]
        lines.append(
            f"| {row['start']} | {before['dev']:.1f} | {after['dev']:.1f} | {gain['points']:+.1f} "
            f"[{gain['low']:+.1f}, {gain['high']:+.1f}] | {before['test']:.1f} | {after['test']:.1f} "
            f"| {row['training']['training_seconds'] / 60:.1f} min |"
        )
    return "\n".join(lines)


def report(content: Mapping[str, Any]) -> str:
    """The whole Markdown file."""
    rows, shared = content["rows"], content["overlap"]
    lines = ["# Supervised training on SICK, STS-B Spearman x 100", "", table(rows), ""]
    lines.append(
        f"All {shared['dev']['pairs']:,} and {shared['test']['pairs']:,} pairs; {content['triples']:,} triples. "
        f"Intervals: paired bootstrap over the pairs, {content['resamples']:,} draws; one seed of training "
        f"({content['seed']}). Unsupervised Bi+MNTP+SimCSE: {content['unsupervised']['dev']:.1f} on dev, "
        f"{content['unsupervised']['test']:.1f} on test."
    )
    lines += ["", "## Overlap of the triples with STS-B", ""]
    lines += ["| | sentences | of them in the triples | the same but for case and punctuation | pairs with such a "]
    lines[-1] += "sentence | pairs that are a query and its positive |"
    lines.append("|---|---|---|---|---|---|")
    for split, counts in shared.items():
        lines.append(f"| {split} | " + " | ".join(f"{v:,}" for k, v in counts.items() if k != "pairs") + " |")
    lines += ["", "On the pairs with neither sentence in the triples:", ""]
    lines += ["| start | dev: before | supervised | against unsupervised [95 %] | test: before | supervised |"]
    lines.append("|---|---|---|---|---|---|")
    for row in rows:
        before, after, gain = row["before"], row["after"], row["difference"]["dev_unseen"]
        lines.append(
            f"| {row['start']} | {before['dev_unseen']:.1f} | {after['dev_unseen']:.1f} | {gain['points']:+.1f} "
            f"[{gain['low']:+.1f}, {gain['high']:+.1f}] | {before['test_unseen']:.1f} | {after['test_unseen']:.1f} |"
        )
    trained = rows[0]["training"]
    lines += ["", f"Supervised stage: {', '.join(content['settings'])}; {trained['tokens']:,} tokens."]
    lines.append(f"{content['machine']}; {content['date']}. {content['note']}".rstrip())
    return "\n".join(lines) + "\n"


def draw(path: Path, rows: Sequence[Mapping[str, Any]], unsupervised: float) -> None:
    """Before and after on dev as bars, and the loss curves."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.2), layout="constrained")
    bars, curves = figure.subplots(1, 2, width_ratios=[1.5, 1])
    places = np.arange(len(rows))
    for shift, key, colour, label in ((-0.2, "before", "#9aa5b1", "before"), (0.2, "after", "#2f6fb5", "supervised")):
        drawn = bars.barh(places + shift, [row[key]["dev"] for row in rows], height=0.38, color=colour, label=label)
        bars.bar_label(drawn, fmt="%.1f", padding=4)
    bars.axvline(unsupervised, color="k", linestyle=":", linewidth=1, label="unsupervised Bi+MNTP+SimCSE")
    bars.set_yticks(places, [row["start"] for row in rows])
    bars.invert_yaxis()
    bars.set(xlim=(0, 100), xlabel="STS-B dev, all pairs, Spearman x 100")
    bars.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=3, fontsize=8)
    for row in rows:
        curves.plot(row["training"]["losses"], linewidth=1, label=row["start"])
    curves.set(xlabel="step", title="loss")
    curves.legend(frameon=False)
    figure.savefig(path, dpi=130)


def make_triples(sick: Path, output: Path) -> list[dict[str, Any]]:
    """Runs recipes/entailment_triples.py; the rows of its file."""
    files = [str(sick / name) for name in SICK_FILES]
    subprocess.run(
        [sys.executable, str(RECIPES / "entailment_triples.py"), *files, "--output", str(output)], check=True
    )
    return [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Everything that is reported."""
    recipe = json.loads((options.base / "run.json").read_text(encoding="utf-8"))["recipe"]
    options.runs.mkdir(parents=True, exist_ok=True)
    triples_file = options.runs / "triples.jsonl"
    triples = make_triples(options.sick, triples_file)
    small: Recipe = runpy.run_path(str(RECIPES / "llm2vec_smollm2.py"))["RECIPE"]
    plain_stage = as_dict(replace(small, supervised=SupervisedStage()))["supervised"]
    stage = [*settings(as_dict(small)["supervised"], plain_stage, "supervised"), *options.set]
    sets = {split: load_sts(RECIPES / "data" / f"stsb_{split}.csv.gz") for split in SPLITS}
    kept = {split: unseen(triples, pairs) for split, pairs in sets.items()}

    def measured(stem: Path, load: Callable[[], Encoder]) -> dict[str, np.ndarray]:
        encoder, found = None, {}
        for split, pairs in sets.items():
            file = stem.with_name(f"{stem.name}-{split}.npy")
            if not file.is_file():
                encoder = encoder or load()
                np.save(file, cosines(encoder, pairs))
            found[split] = np.load(file)
        return found

    before = {}
    for start in STARTS:
        load = partial(start_encoder, start, options.base, recipe)
        before[start.name] = measured(options.runs / f"before-{start.folder}", load)
    rows = []
    for start in STARTS:
        if start.name not in options.starts:
            continue
        directory = options.runs / start.folder
        flags = [*command(start, options.base, recipe, stage, triples_file), "--seed", str(options.seed)]
        training = train(start, directory, flags)
        after = measured(options.runs / f"after-{start.folder}", partial(Encoder.from_pretrained, directory))
        difference = {}
        for split, pairs in sets.items():
            scores, old = scores_of(pairs), before[UNSUPERVISED][split]
            some = kept[split]
            difference[split] = vars(paired_bootstrap(after[split], old, scores))
            difference[f"{split}_unseen"] = vars(paired_bootstrap(after[split][some], old[some], scores[some]))
        rows.append(
            {
                "start": start.name,
                "before": correlations(before[start.name], sets, kept),
                "after": correlations(after, sets, kept),
                "difference": difference,
                "training": training,
            }
        )
    return {
        "machine": f"{processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        **{name: value for name, value in describe_run(torch.device("cpu")).items() if name != "command"},
        "command": "python benchmarks/supervised_sick.py --base RUN --sick DIR",
        "note": options.note,
        "seed": options.seed,
        "settings": stage,
        "triples": len(triples),
        "resamples": RESAMPLES,
        "unsupervised": correlations(before[UNSUPERVISED], sets, kept),
        "overlap": {split: overlap(triples, pairs) for split, pairs in sets.items()},
        "rows": rows,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    names = [start.name for start in STARTS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="run directory of recipes/llm2vec_smollm2.py")
    parser.add_argument("--sick", type=Path, required=True, help=f"folder with {' and '.join(SICK_FILES)}")
    parser.add_argument("--starts", nargs="+", choices=names, default=names)
    parser.add_argument("--seed", type=int, default=42, help="of the supervised training")
    parser.add_argument("--note", default="", help="about the machine, for the files")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="goes to the recipe")
    parser.add_argument(
        "--runs",
        type=Path,
        default=ROOT / "runs" / "supervised_sick",
        help="where runs and cosines are written; what is there already is not done again (default: %(default)s)",
    )
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results", metavar="DIR")
    options = parser.parse_args(arguments)
    for file in (
        *(options.base / name for name in ("run.json", "mntp", "simcse")),
        *map(options.sick.joinpath, SICK_FILES),
    ):
        if not file.exists():
            parser.error(f"{file}: not there; --base is a finished run with MNTP and SimCSE, --sick holds SICK's files")
    content = run(options)
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "supervised_sick.json"
    path.write_text(json.dumps(content) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(report(content), encoding="utf-8")
    draw(path.with_suffix(".png"), content["rows"], content["unsupervised"]["dev"])
    print(f"\n{report(content)}")


if __name__ == "__main__":
    main()
