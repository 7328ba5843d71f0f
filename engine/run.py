"""A run: the recipe's steps on one model, with everything they leave in the output directory.

    with start(RECIPE, __doc__) as run:     reads the command line, checks every input, loads the model
        run.evaluate("uni", causal=True)
        run.mntp(); run.simcse()            train, save the adapter, merge it
        run.finish()                        saves merged/, reads the test set, prints the table

The files of a run are listed in the README ("What a run writes"). Each step that finds its result already there (after
``--resume``) takes it from the disk instead of doing it again.
"""

from __future__ import annotations

import json
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bivec.engine.checkpoint import list_checkpoints
from bivec.engine.encoder import Encoder, EncoderConfig
from bivec.engine.errors import BivecError, RunError
from bivec.engine.estimate import describe
from bivec.engine.evaluation import sts_spearman
from bivec.engine.inputs import Inputs, load_inputs, model_config
from bivec.engine.lora import add_lora, load_adapter
from bivec.engine.metrics import Evaluation, StepLog, losses_by_stage
from bivec.engine.objectives import MntpObjective, SimcseObjective
from bivec.engine.planner import Setting, batch_tokens, free_memory, parse_memory, plan_mntp, plan_simcse
from bivec.engine.recipe import (
    MntpStage,
    Recipe,
    RunOptions,
    SimcseStage,
    as_dict,
    differences,
    parse_arguments,
    with_horizon,
)
from bivec.engine.report import StageResult, draw_results, results_table, similarity_table
from bivec.engine.tokenizer import prefix_length
from bivec.engine.trainer import Intervals, Objective, StepMetrics, is_out_of_memory, peak_memory_bytes, train
from bivec.kernels import BackendError, fold_seed
from bivec.kernels.backend import resolve
from bivec.models import load_pretrained
from bivec.models.files import write_text_atomic

RUN_FILE = "run.json"
LEFT_BY_A_RUN = ("metrics.jsonl", "evaluations.jsonl", "checkpoints", "mntp", "simcse", "results.json")
VERSIONS_OF = (
    "torch",
    "transformers",
    "tokenizers",
    "datasets",
    "safetensors",
    "sentencepiece",
    "numpy",
    "scipy",
    "triton",
)
MNTP_SEED, SIMCSE_SEED, LORA_SEED = 1, 2, 3  # folded into the run's seed
SHOWN = (
    "A man is playing the guitar on stage.",
    "Someone performs music for an audience.",
    "The stock market fell sharply on Monday.",
    "Shares lost much of their value this week.",
    "A kitten is sleeping on the sofa.",
)


@contextmanager
def start(recipe: Recipe, description: str | None, arguments: Sequence[str] | None = None) -> Iterator[Run]:
    """Reads the command line, checks every input and loads the model, for the steps in the ``with`` block.

    Bad input, and what stops a step (a NaN loss, a full disk), end the process with the error on stderr and exit code
    2; Ctrl-C with the command that goes on and exit code 130; ``--dry-run`` with its figures and exit code 0.

    Args:
        recipe: the defaults of the command line.
        description: of the recipe, for ``--help``.
        arguments: of the command; None = those of the process.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    directory = None
    try:
        recipe, options = parse_arguments(recipe, description, arguments)
        if options.dry_run:
            print(describe(recipe, model_config(recipe)))
            sys.exit(0)
        directory = options.output_dir
        yield Run(recipe, options)
    except (BivecError, BackendError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        advice = "give --memory auto, or lower mntp.micro_batch_tokens or simcse.batch_size by --set"
        print(f"error: {str(error).splitlines()[0]}\n{advice}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        command = shlex.join(["python", sys.argv[0], *(word for word in arguments if word != "--resume"), "--resume"])
        begun = directory is not None and (directory / RUN_FILE).is_file()
        print(f"stopped; to go on: {command}" if begun else "stopped before anything was written", file=sys.stderr)
        sys.exit(130)


class Run:
    """The model on its way from decoder to encoder. Made by :func:`start`."""

    def __init__(self, recipe: Recipe, options: RunOptions):
        self._started = time.monotonic()
        self.recipe, self.options, self.directory = recipe, options, options.output_dir
        earlier = _earlier_run(recipe, options)
        self.device = _device(options)
        _check_same_device(earlier, self.device, self.directory)
        self.inputs = load_inputs(recipe)
        _check_same_data(earlier, self.inputs, self.directory)
        self.results, self._earlier_seconds, self._earlier_peak = _read_results(self.directory, options.resume)
        self.cuts = self._cuts(earlier)
        # before anything is written: damaged weights must not leave a directory behind that asks for --resume
        self._load_model()
        self.directory.mkdir(parents=True, exist_ok=True)
        if earlier is None:
            self._write_run_file()
        elif self.cuts != earlier.get("cuts", {}):  # by another --memory
            self._rewrite_run_file(memory=options.memory, cuts=self.cuts)
        self.metrics = StepLog(self.directory / "metrics.jsonl", StepMetrics)
        self.evaluations = StepLog(self.directory / "evaluations.jsonl", Evaluation)
        self.metrics.path.touch()

    def _load_model(self) -> None:
        self.model = self.lm_head_weight = None  # the memory of the old one first
        checkpoint = load_pretrained(self.inputs.model_path, dtype=self._dtype(), device=self.device)
        self.model, self.lm_head_weight = checkpoint.model, checkpoint.lm_head_weight
        self.model.requires_grad_(False)
        self.state = "bi"  # what has been done to the weights: "bi", "bi+mntp", "bi+mntp+simcse"

    def _dtype(self) -> str:
        """bf16 as the paper, but for the CPU, where it runs a hundred times slower than fp32."""
        return self.recipe.dtype or ("float32" if torch.device(self.device).type == "cpu" else "bfloat16")

    def _cuts(self, earlier: dict[str, Any] | None) -> dict[str, dict[str, Any]]:
        """By stage, the fields of its objective that ``--memory`` decides; nothing without it.

        A resumed run keeps its first cut, on which the rounding of its sums depends, unless another ``--memory`` is
        given.
        """
        if earlier is not None and self.options.memory in (None, earlier.get("memory")):
            return earlier.get("cuts", {})
        if self.options.memory is None:
            return {}
        asked = parse_memory(self.options.memory)
        device = torch.device(self.device)
        available = free_memory(device) if asked is None else asked
        cuts, config = {}, self.inputs.config
        dtype = getattr(torch, self._dtype().removeprefix("torch."), None)
        if not isinstance(dtype, torch.dtype):
            raise RunError(f"--dtype {self._dtype()}: no dtype of torch; expected float32, bfloat16 or float16")
        for stage in (self.recipe.mntp, self.recipe.simcse):
            name = "mntp" if isinstance(stage, MntpStage) else "simcse"
            done = self.options.resume and (self.directory / name / "adapter_config.json").is_file()
            if done and name in (earlier or {}).get("cuts", {}):
                cuts[name] = earlier["cuts"][name]
            if done or name not in self.recipe.stages:
                continue
            itemsize = dtype.itemsize
            triton = resolve(self.options.backend, "flash_attention", device) == "triton"
            setting = Setting(config, stage.lora, itemsize, name == "mntp", device.type, triton)
            if isinstance(stage, MntpStage):
                plan = plan_mntp(setting, stage.batch_size, stage.sequence_length, stage.mask_probability, available)
                cuts[name] = {"micro_batch_tokens": plan.micro_batch_tokens, "recompute": plan.recompute}
            else:
                tokens = 2 * batch_tokens(self.inputs.sentences.lengths, stage.batch_size)
                plan = plan_simcse(setting, tokens, stage.batch_size, available)
                cuts[name] = {"recompute": plan.recompute}
            print(f"{name}: {plan}", flush=True)
        return cuts

    def evaluate(self, stage: str | None = None, *, causal: bool = False, pooling: str = "mean") -> None:
        """STS-B dev of the model as it stands; ``stage`` names the result, by default after what has been trained."""
        stage = stage or self.state
        if any(result.stage == stage for result in self.results):
            return
        score = sts_spearman(self._encode(causal, pooling), self.inputs.sts["dev"])
        self.results.append(StageResult(stage, pooling, score))
        self._write_results()
        print(f"{stage}: STS-B dev {score:.1f}", flush=True)

    def mntp(self) -> None:
        """Masked next-token prediction with LoRA, then the adapter is saved to ``mntp/`` and merged (METHOD 3)."""
        stage = self.recipe.mntp
        if "mntp" not in self.recipe.stages:
            return
        objective = partial(
            MntpObjective,
            self.model,
            self.lm_head_weight,
            blocks=self.inputs.blocks,
            masking=self.inputs.masking,
            batch_size=stage.batch_size,
            seed=fold_seed(self.recipe.seed, MNTP_SEED),
            backend=self.options.backend,
            **{"micro_batch_tokens": stage.micro_batch_tokens} | self.cuts.get("mntp", {}),
        )
        self._train("mntp", stage, len(self.inputs.blocks), objective)

    def simcse(self) -> None:
        """Unsupervised SimCSE with a fresh LoRA, then the adapter is saved to ``simcse/`` and merged (METHOD 4)."""
        stage = self.recipe.simcse
        if "simcse" not in self.recipe.stages:
            return
        self.lm_head_weight = None  # MNTP alone needed it: 1 GB of a Llama-3-8B
        objective = partial(
            SimcseObjective,
            self.model,
            sentences=self.inputs.sentences,
            batch_size=stage.batch_size,
            seed=fold_seed(self.recipe.seed, SIMCSE_SEED),
            device=self.device,
            scale=stage.scale,
            skip_prefix=0 if self.recipe.pool_bos else prefix_length(self.inputs.tokenizer),
            attention_dropout=stage.attention_dropout,
            backend=self.options.backend,
            **self.cuts.get("simcse", {}),
        )
        self._train("simcse", stage, len(self.inputs.sentences), objective)

    def _train(
        self, name: str, stage: MntpStage | SimcseStage, samples: int, make_objective: Callable[..., Objective]
    ) -> None:
        finished = self.directory / name
        if self.options.resume and (finished / "adapter_config.json").is_file():
            load_adapter(self.model, finished).merge()
            self.state += f"+{name}"
            return
        checkpoints = self.directory / "checkpoints"
        saved = list_checkpoints(checkpoints, name) if self.options.resume else []
        for log in (self.metrics, self.evaluations):
            log.truncate(name, int(saved[-1].name.rpartition("-")[2]) if saved else 0)
        # the state's length, so that every stage starts from another draw
        adapter = add_lora(self.model, stage.lora, fold_seed(self.recipe.seed, LORA_SEED, len(self.state)))
        train(
            name,
            make_objective(adapter=adapter),
            adapter.named_parameters(),
            with_horizon(stage.optim, stage.decay_epochs, samples, stage.batch_size),
            intervals=Intervals(log=1, evaluate=stage.evaluate_every, save=stage.save_every),
            checkpoints=checkpoints,
            log=self.metrics.append,
            evaluate=partial(self._evaluate_midway, name),
            cut=partial(self._keep_cut, name),
            resume=self.options.resume,
        )
        adapter.save(finished, self.recipe.model)
        adapter.merge()
        self.state += f"+{name}"

    def _keep_cut(self, name: str, objective: Objective) -> None:
        """A resumed run begins with the cut that memory forced on this one."""
        fields = ("micro_batch_tokens", "recompute")
        self.cuts[name] = {field: getattr(objective, field) for field in fields if hasattr(objective, field)}
        self._rewrite_run_file(cuts=self.cuts)

    def _evaluate_midway(self, name: str, step: int) -> None:
        try:
            score = sts_spearman(self._encode(False, "mean"), self.inputs.sts["dev"])
        except RunError as error:  # the update of this step broke the weights, its loss was still finite
            saved = list_checkpoints(self.directory / "checkpoints", name)
            good = saved[-1] if saved else "none yet"
            raise RunError(f"{name}, step {step}: {error}. Last good checkpoint: {good}") from error
        self.evaluations.append(Evaluation(name, step, score))

    def finish(self) -> None:
        """Saves ``merged/``, reads the test set once for every stage, prints and writes the results."""
        vectors = self._save_encoder()
        if any(result.sts_test_spearman is None for result in self.results):
            self._test_all_stages()
        self._write_results()
        losses = losses_by_stage(self.metrics.read())
        draw_results(self.directory / "results.png", self.recipe.name, self.results, losses)
        table = results_table(self.results, {split: len(pairs) for split, pairs in self.inputs.sts.items()})
        summary = f"{self._seconds() / 60:.1f} minutes, peak memory {self._peak() / 2**30:.1f} GiB ({self.device})"
        write_text_atomic(
            self.directory / "results.md", f"# {self.recipe.name}\n\n{table}\n\nSpearman x 100. {summary}.\n"
        )
        similarities = (vectors @ vectors.T).tolist()
        print(f"\n{table}\n\n{summary}\n\nCosine similarities:\n{similarity_table(list(SHOWN), similarities)}")
        print(f'\nThe encoder is in {self.directory / "merged"}: bivec.Encoder.from_pretrained("{self.directory}")')

    def _save_encoder(self) -> np.ndarray:
        """Writes ``merged/``; returns the unit vectors of the sentences that are shown. Keeps no second model alive."""
        encoder = self._encoder(causal=False, pooling="mean")
        encoder.save_pretrained(self.directory / "merged")
        return encoder.encode(list(SHOWN), normalize_embeddings=True)

    def _test_all_stages(self) -> None:
        """Walks once more from the decoder through the saved adapters: no choice could have seen the test set."""
        self._load_model()
        tested = []
        for result in self.results:
            for name in ("mntp", "simcse"):
                if name in result.stage and name not in self.state:
                    load_adapter(self.model, self.directory / name).merge()
                    self.state += f"+{name}"
            causal = result.stage.startswith("uni")
            embed = self._encode(causal, result.pooling)
            tested.append(replace(result, sts_test_spearman=sts_spearman(embed, self.inputs.sts["test"])))
        self.results = tested

    def _encoder(self, causal: bool, pooling: str) -> Encoder:
        config = EncoderConfig(pooling=pooling, pool_bos=self.recipe.pool_bos, causal=causal)
        return Encoder(self.model, self.inputs.tokenizer, config, backend=self.options.backend)

    def _encode(self, causal: bool, pooling: str) -> Callable[[list[str]], np.ndarray]:
        return partial(self._encoder(causal, pooling).encode, show_progress_bar=True)

    def _seconds(self) -> float:
        return self._earlier_seconds + time.monotonic() - self._started

    def _peak(self) -> int:
        return max(self._earlier_peak, peak_memory_bytes())

    def _write_results(self) -> None:
        content = {
            "stages": [result.to_dict() for result in self.results],
            "seconds": round(self._seconds(), 1),
            "peak_memory_bytes": self._peak(),
        }
        write_text_atomic(self.directory / "results.json", json.dumps(content, indent=2) + "\n")

    def _write_run_file(self) -> None:
        versions = {"bivec": _version("bivec"), "python": platform.python_version()}
        versions |= {name: version for name in VERSIONS_OF if (version := _version(name))}
        content = {
            "recipe": as_dict(self.recipe),
            "seed": self.recipe.seed,
            "versions": versions,
            "data": self.inputs.fingerprints(),
            "device": self.device,
            "machine": platform.machine(),
            "threads": torch.get_num_threads(),
            "memory": self.options.memory,
            "cuts": self.cuts,
        }
        write_text_atomic(self.directory / RUN_FILE, json.dumps(content, indent=2) + "\n")

    def _rewrite_run_file(self, **changes: Any) -> None:
        """Of fields that do not belong to the recipe."""
        file = self.directory / RUN_FILE
        content = json.loads(file.read_text(encoding="utf-8")) | changes
        write_text_atomic(file, json.dumps(content, indent=2) + "\n")


def _earlier_run(recipe: Recipe, options: RunOptions) -> dict[str, Any] | None:
    """The ``run.json`` of the run that ``--resume`` goes on with, None for a new run. Two runs are never mixed."""
    directory, file = options.output_dir, options.output_dir / RUN_FILE
    if directory.exists() and not directory.is_dir():
        raise RunError(f"{directory} is a file; give another --output-dir")
    if not file.is_file():
        if options.resume:
            raise RunError(f"{directory}: --resume was given, but there is no {RUN_FILE}; leave --resume out to start")
        left = [name for name in LEFT_BY_A_RUN if (directory / name).exists()]
        if left:
            raise RunError(
                f"{directory}: holds {', '.join(left)} of a run, but no {RUN_FILE}; give another --output-dir"
            )
        return None
    if not options.resume:
        raise RunError(f"{directory}: holds a run already; give --resume to go on with it, or another --output-dir")
    try:
        earlier = json.loads(file.read_text(encoding="utf-8"))
        changed = differences(earlier["recipe"], as_dict(recipe))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{file}: not the {RUN_FILE} of a recipe ({error}); choose another --output-dir") from error
    if changed:
        raise RunError(
            f"{directory}: --resume with other hyper-parameters than the run was started with: {'; '.join(changed)}"
        )
    return earlier


def _check_same_data(earlier: dict[str, Any] | None, inputs: Inputs, directory: Path) -> None:
    """A data file may change under the same name; the losses of a resumed run would be others."""
    if earlier is None:
        return
    for stage, now in inputs.fingerprints().items():
        before = earlier.get("data", {}).get(stage)
        if before != now:
            raise RunError(
                f"{directory}: --resume with other text: --{stage}-data gives {now}, at the start of the run {before}; "
                "the file or the tokenizer has changed. Put the old one back or start anew in another --output-dir"
            )


def _check_same_device(earlier: dict[str, Any] | None, device: str, directory: Path) -> None:
    """Another kind of device computes in another dtype: the run would go on, but not as the same run."""
    before = None if earlier is None else str(earlier.get("device"))
    if before is not None and before.partition(":")[0] != device.partition(":")[0]:
        raise RunError(
            f"{directory}: --resume on {device}, but the run was started on {before}; give --device {before}"
        )


def _device(options: RunOptions) -> str:
    """The device of the run, tried; and that the kernels' backend can be had."""
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise RunError(f"--device {device}: not usable here ({str(error).splitlines()[0]})") from error
    try:
        resolve(options.backend, "flash_attention", torch.device(device))
    except (BackendError, ValueError) as error:
        raise RunError(f"--backend: {error}") from error
    return device


def _read_results(directory: Path, resume: bool) -> tuple[list[StageResult], float, int]:
    """The results so far, with the seconds and the peak memory spent on them."""
    file = directory / "results.json"
    if not (resume and file.is_file()):
        return [], 0.0, 0
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        results = [StageResult(**stage) for stage in raw["stages"]]
        return results, float(raw["seconds"]), int(raw["peak_memory_bytes"])
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{file}: not a results file of this version ({error}); delete it to evaluate again") from error


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
