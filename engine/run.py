"""A run: the recipe's steps on one model, with everything they leave in the output directory.

    with start(RECIPE, __doc__) as run:     run_start.py: reads the command line, checks every input, loads the model
        run.evaluate("uni", causal=True)
        run.mntp(); run.simcse()            train, save the adapter, merge it
        run.supervised()                    the same, where it was asked for
        run.finish()                        saves merged/, reads the test set, prints the table

The files of a run are listed in the README ("What a run writes"). Each step that finds its result already there (after
``--resume``) takes it from the disk instead of doing it again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from bivec.engine.checkpoint import list_checkpoints
from bivec.engine.cuts import as_cut, plan_cuts
from bivec.engine.distributed import ALONE, World
from bivec.engine.encoder import Encoder
from bivec.engine.encoder_config import POOLINGS, EncoderConfig, stored_prompts, text_format
from bivec.engine.errors import RunError
from bivec.engine.evaluation import sts_spearman
from bivec.engine.export import rewrite_card
from bivec.engine.inputs import load_inputs
from bivec.engine.json_files import json_text
from bivec.engine.metrics import Evaluation, StepLog, losses_by_stage
from bivec.engine.model_card import card_of_run
from bivec.engine.objectives import MntpObjective, SimcseObjective
from bivec.engine.recipe import TRAINED, Recipe, with_horizon
from bivec.engine.recipe_arguments import RunOptions
from bivec.engine.report import SHOWN, StageResult, draw_results, results_table, similarity_table
from bivec.engine.run_files import (
    check_same_data,
    check_same_device,
    check_shared,
    chosen_device,
    chosen_template,
    device_type,
    earlier_run,
    read_results,
    rewrite_run_file,
    start_settings,
    start_state,
    write_run_file,
)
from bivec.engine.run_weights import RunWeights, Stage, stage_is_done
from bivec.engine.supervised import SupervisedObjective, TripleRows
from bivec.engine.tokenizer import prefix_length
from bivec.engine.trainer import Intervals, Objective, StepMetrics, peak_memory_bytes, train
from bivec.engine.triple_batches import TripleBatches
from bivec.engine.triples import TripleSet
from bivec.kernels import fold_seed
from bivec.models.files import remove_abandoned, write_text_atomic
from bivec.models.weights import named_dtype

MNTP_SEED, SIMCSE_SEED, LORA_SEED, SUPERVISED_SEED = 1, 2, 3, 4  # folded into the run's seed
ORDER = 5  # into the supervised one
KEPT = ("normalize", "similarity", "max_length", "skip_instruction")  # settings of an encoder that is trained further
OF_A_STAGE = ("pooling", "causal", "template", "pool_tail")  # what a contrastive stage leaves in the folder, besides


class Run:
    """The model on its way from decoder to encoder. Made by :func:`bivec.engine.run_start.start`."""

    def __init__(self, recipe: Recipe, options: RunOptions, world: World = ALONE):
        self._started = time.monotonic()
        self.recipe, self.options, self.directory, self.world = recipe, options, options.output_dir, world
        earlier = earlier_run(recipe, options)
        self.device = chosen_device(options.device, options.backend, world)
        check_same_device(earlier, self.device, self.directory)
        self.inputs = load_inputs(recipe)
        check_same_data(earlier, self.inputs, self.directory)
        self.results, self._earlier_seconds, self._earlier_peak = read_results(self.directory, options.resume)
        is_causal = self.inputs.config.is_causal
        self.stored = stored = start_settings(self.inputs.model_path, recipe.adapters, is_causal=is_causal)
        # METHOD 2.5: the BOS is no part of a text
        self.pool_bos = bool(stored and stored.pool_bos) if recipe.pool_bos is None else recipe.pool_bos
        for name in TRAINED:
            if name in recipe.stages:
                world.share(getattr(recipe, name).batch_size)  # is there something for every rank?
        self.template: str | None = None
        self.triple_rows: TripleRows | None = None
        if self.inputs.triples is not None:
            self.template = chosen_template(recipe, stored)
            self.triple_rows = self._triple_rows(self.inputs.triples)
        # bf16 as the paper, but for the CPU, where it runs a hundred times slower than fp32
        self.dtype = named_dtype(recipe.dtype or ("float32" if device_type(options.device) == "cpu" else "bfloat16"))
        self.cuts = world.from_main(self._cuts(earlier))
        # before anything is written: damaged weights must not leave a directory behind that asks for --resume
        self.weights = RunWeights(
            recipe,
            self.inputs.model_path,
            self.directory,
            device=self.device,
            dtype=self.dtype,
            world=world,
            sharded=options.shard,
        )
        self.weights.origin()  # an adapter that is there twice is told of before anything is trained
        # what has been done to the weights: "bi", "bi+mntp", "bi+mntp+simcse" …
        self.begun = self.state = start_state(recipe.model, recipe.adapters, stored)
        self.metrics = StepLog(self.directory / "metrics.jsonl", StepMetrics)
        self.evaluations = StepLog(self.directory / "evaluations.jsonl", Evaluation)
        world.barrier()  # everyone has looked at the directory as it was
        if world.is_main:
            self._begin(earlier)
        world.barrier()
        check_shared(self.directory, world)

    def _begin(self, earlier: dict[str, Any] | None) -> None:
        """The first that is written."""
        self.directory.mkdir(parents=True, exist_ok=True)
        fields = self._asked() | {"cuts": self.cuts}
        if earlier is None:
            write_run_file(self.directory, self.recipe, self.inputs, self.device, **fields)
        elif fields != {key: earlier.get(key) for key in fields}:  # by another --memory
            rewrite_run_file(self.directory, **fields)
        if earlier is not None:  # what a kill has left of unfinished writes; of a stage or of merged/ a whole model
            for name in ("", "checkpoints", "merged", *TRAINED):
                remove_abandoned(self.directory / name)
        self.metrics.path.touch()

    def _asked(self) -> dict[str, Any]:
        """What the cuts depend on beside the recipe."""
        return {"memory": self.options.memory, "processes": self.world.size, "shard": self.options.shard}

    def _cuts(self, earlier: dict[str, Any] | None) -> dict[str, dict[str, Any]]:
        """By stage, the fields of its objective that ``--memory`` decides; nothing without it.

        A resumed run keeps its first cut, on which the rounding of its sums depends, unless another ``--memory`` or
        number of processes is given.
        """
        before: dict[str, dict[str, Any]] = (earlier or {}).get("cuts", {})
        asked = self._asked()
        if self.options.memory is None or (earlier and asked == {key: earlier.get(key) for key in asked}):
            return before
        done = [name for name in TRAINED if self.options.resume and stage_is_done(self.directory / name)]
        left = replace(self.recipe, stages=tuple(name for name in self.recipe.stages if name not in done))
        rows = self.triple_rows if "supervised" in left.stages else None
        plans = plan_cuts(left, self.options, self.inputs, rows, torch.device(self.device), self.dtype, self.world)
        for name, plan in plans.items():
            print(f"{name}: {plan}", flush=True)
        kept = {name: before[name] for name in done if name in before}
        return kept | {name: as_cut(name, plan) for name, plan in plans.items()}

    def _triple_rows(self, triples: Sequence[TripleSet]) -> TripleRows:
        stage, seed = self.recipe.supervised, fold_seed(self.recipe.seed, SUPERVISED_SEED, ORDER)
        rules = replace(self._encoder_config("supervised"), max_length=stage.max_length)
        return TripleRows(
            TripleBatches(triples, stage.batch_size, seed),
            text_format(rules, self.inputs.tokenizer),
            symmetric_instruction=stage.symmetric_instruction,
            vocab_size=self.inputs.config.vocab_size,
        )

    def evaluate(self, stage: str | None = None, *, causal: bool | None = None, pooling: str | None = None) -> None:
        """STS-B dev of the model as it stands.

        Args:
            stage: names the result; None = after what has been trained.
            causal: the decoder's own mask; None = bidirectional, unless the stage's name begins with "uni".
            pooling: None = the mean, or that of the last contrastive stage. What an earlier run has trained is used
                as its folder says.
        """
        stage = stage or self.state
        if any(result.stage == stage for result in self.results):
            return
        trained = self._last_trained(self.state)
        config = self._encoder_config(trained, stage.startswith("uni") if causal is None else causal, pooling)
        score = self._sts("dev", stage, config)
        self.results.append(StageResult(stage, config.pooling, score))
        self._write_results()
        print(f"{stage}: STS-B dev {score:.1f}", flush=True)

    def mntp(self) -> None:
        """Masked next-token prediction with LoRA, then the adapter is saved to ``mntp/`` and merged (METHOD 3)."""
        stage, blocks, masking = self.recipe.mntp, self.inputs.blocks, self.inputs.masking
        if blocks is None or masking is None:  # not a stage of this run
            return
        objective = partial(
            MntpObjective,
            blocks=blocks,
            masking=masking,
            batch_size=stage.batch_size,
            seed=fold_seed(self.recipe.seed, MNTP_SEED),
            backend=self.options.backend,
            **{"micro_batch_tokens": stage.micro_batch_tokens} | self.cuts.get("mntp", {}),
        )
        self._train("mntp", stage, len(blocks), objective)

    def simcse(self) -> None:
        """Unsupervised SimCSE with a fresh LoRA, then the adapter is saved to ``simcse/`` and merged (METHOD 4)."""
        stage, sentences = self.recipe.simcse, self.inputs.sentences
        if sentences is None:
            return
        pools_first = self.pool_bos or stage.pooling == "bos_token"  # the special tokens in front
        objective = partial(
            SimcseObjective,
            sentences=sentences,
            batch_size=stage.batch_size,
            seed=fold_seed(self.recipe.seed, SIMCSE_SEED),
            device=self.device,
            scale=stage.scale,
            pooling=POOLINGS[stage.pooling],
            causal=stage.causal,
            skip_prefix=0 if pools_first else prefix_length(self.inputs.tokenizer),
            attention_dropout=stage.attention_dropout,
            backend=self.options.backend,
            **{"micro_batch_tokens": stage.micro_batch_tokens} | self.cuts.get("simcse", {}),
        )
        self._train("simcse", stage, len(sentences), objective)

    def supervised(self) -> None:
        """Supervised contrastive training, then the adapter is saved to ``supervised/`` and merged (METHOD 5).

        It goes on with the adapter of ``init_adapter``; without one a fresh adapter is put on the merged weights.
        """
        stage, rows = self.recipe.supervised, self.triple_rows
        if rows is None:
            return
        objective = partial(
            SupervisedObjective,
            rows=rows,
            seed=fold_seed(self.recipe.seed, SUPERVISED_SEED),
            device=self.device,
            scale=stage.scale,
            pooling=POOLINGS[stage.pooling],
            causal=stage.causal,
            attention_dropout=stage.attention_dropout,
            filter_same=stage.filter_same,
            margin=stage.margin,
            matryoshka_dims=stage.matryoshka_dims or None,
            backend=self.options.backend,
            **{"micro_batch_tokens": stage.micro_batch_tokens} | self.cuts.get("supervised", {}),
        )
        self._train("supervised", stage, rows.batches.steps_per_epoch * stage.batch_size, objective)

    def _train(self, name: str, stage: Stage, samples: int, make_objective: Callable[..., Objective]) -> None:
        if self.options.resume and stage_is_done(self.directory / name):
            self.weights.merge(self._without_start(stage, [*self.weights.merged, name]))
            self.state = self._state_after(name, stage)
            return
        checkpoints = self.directory / "checkpoints"
        saved = list_checkpoints(checkpoints, name) if self.options.resume else []
        if self.world.is_main:
            for log in (self.metrics, self.evaluations):
                log.truncate(name, int(saved[-1].name.rpartition("-")[2]) if saved else 0)
        # the state's length, so that every stage starts from another draw
        trained = self.weights.prepare(name, stage, fold_seed(self.recipe.seed, LORA_SEED, len(self.state)))
        head = {"lm_head_weight": trained.lm_head_weight} if name == "mntp" else {}
        train(
            name,
            make_objective(trained.model, adapter=trained.adapter, world=self.world, **head),
            trained.parameters,
            with_horizon(stage.optim, stage.decay_epochs, samples, stage.batch_size),
            intervals=Intervals(log=1, evaluate=stage.evaluate_every, save=stage.save_every),
            checkpoints=checkpoints,
            log=self.metrics.append,
            evaluate=partial(self._evaluate_midway, name),
            cut=partial(self._keep_cut, name),
            resume=self.options.resume,
            world=self.world,
        )
        self.weights.keep(name, self._encoder_config(name), self.inputs.tokenizer)
        self.state = self._state_after(name, stage)

    def _state_after(self, name: str, stage: Stage) -> str:
        """The name of the model's state begins with the mask of the last stage."""
        mask = "uni" if getattr(stage, "causal", False) else "bi"
        return "+".join([mask, *self.state.split("+")[1:], name])

    def _trained(self, state: str) -> list[str]:
        """The stages of this run that are in a state; what was trained before is in the weights that it began with."""
        return [name for name in state.split("+")[len(self.begun.split("+")) :] if name in TRAINED]

    def _last_trained(self, state: str) -> str:
        """The last of them; "" where there is none."""
        return (self._trained(state) or [""])[-1]

    @staticmethod
    def _without_start(stage: Stage, names: Sequence[str]) -> list[str]:
        """Without the stage whose adapter this one goes on with: the result of this one takes its place."""
        return [name for name in names if not (name == "simcse" == getattr(stage, "init_adapter", None))]

    def _keep_cut(self, name: str, objective: Objective) -> None:
        """A resumed run begins with the cut that memory forced on this one."""
        fields = ("micro_batch_tokens", "recompute")
        self.cuts[name] = {field: getattr(objective, field) for field in fields if hasattr(objective, field)}
        rewrite_run_file(self.directory, cuts=self.cuts)

    def _evaluate_midway(self, name: str, step: int) -> None:
        try:
            score = self._sts("dev", name, self._encoder_config(name))
        except RunError as error:  # the update of this step broke the weights, its loss was still finite
            saved = list_checkpoints(self.directory / "checkpoints", name)
            good = saved[-1] if saved else "none yet"
            raise RunError(f"{name}, step {step}: {error}. Last good checkpoint: {good}") from error
        if self.world.is_main:
            self.evaluations.append(Evaluation(name, step, score))

    def finish(self) -> None:
        """Saves ``merged/``, reads the test set once for every stage, prints and writes the results."""
        vectors = self._save_encoder()
        if any(result.sts_test_spearman is None for result in self.results):
            self._test_all_stages()
        self._write_results()
        if not self.world.is_main:
            return
        rewrite_card(self.directory / "merged", card_of_run(self.directory))  # with the test set
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
        self.weights.merge(self.weights.merged)  # whole, where it was sharded
        config = self._encoder_config(self._last_trained(self.state))
        if self.world.is_main:
            encoder = Encoder(
                self.weights.model,
                self.inputs.tokenizer,
                config,
                prompts=stored_prompts(self.inputs.model_path),
                origin=self.weights.origin(),
            )
            encoder.save_pretrained(self.directory / "merged", card=card_of_run(self.directory))
        return np.asarray(self._encoder(config).encode(list(SHOWN), normalize_embeddings=True))

    def _test_all_stages(self) -> None:
        """Walks once more from the decoder through the saved adapters: no choice could have seen the test set."""
        self.weights.load()
        tested = []
        for result in self.results:
            names = self._trained(result.stage)
            if names[-1:] == ["supervised"]:
                names = self._without_start(self.recipe.supervised, names)
            self.weights.merge(names)
            trained = self._last_trained(result.stage)
            config = self._encoder_config(trained, result.stage.startswith("uni"), result.pooling)
            tested.append(replace(result, sts_test_spearman=self._sts("test", result.stage, config)))
        self.results = tested

    def _encoder_config(self, stage: str, causal: bool | None = None, pooling: str | None = None) -> EncoderConfig:
        """How a stage of this run ("" = none yet) has trained the model to be used; arguments given count more."""
        rules: dict[str, Any] = {"pooling": "mean", "pool_bos": self.pool_bos, "causal": False}
        if self.stored is not None:  # what no recipe says stays as the folder of the model or adapter has it
            rules |= {name: getattr(self.stored, name) for name in (KEPT if stage else (*KEPT, *OF_A_STAGE))}
        if stage in ("simcse", "supervised"):
            trained = getattr(self.recipe, stage)
            rules |= {"pooling": trained.pooling, "causal": trained.causal}
        if stage == "supervised":
            rules |= {"pool_tail": trained.pool_tail, "template": self.template}
        asked = {"pooling": pooling, "causal": causal}
        return EncoderConfig(**rules | {name: value for name, value in asked.items() if value is not None})

    def _encoder(self, config: EncoderConfig) -> Encoder:
        """The model as it stands."""
        return Encoder(self.weights.runnable(), self.inputs.tokenizer, config, backend=self.options.backend)

    def _sts(self, split: str, state: str, config: EncoderConfig) -> float:
        """Spearman's correlation x 100 of the model as it stands after a stage, or in a state of this name."""
        last = state.rpartition("+")[2]
        instruction = self.recipe.supervised.sts_instruction if last == "supervised" else None
        encode = partial(self._encoder(config).encode, instruction=instruction, show_progress_bar=self.world.is_main)
        return sts_spearman(encode, self.inputs.sts[split])

    def _seconds(self) -> float:
        return self._earlier_seconds + time.monotonic() - self._started

    def _peak(self) -> int:
        return max(self._earlier_peak, peak_memory_bytes(self.device))

    def _write_results(self) -> None:
        if not self.world.is_main:
            return
        content = {
            "stages": [result.to_dict() for result in self.results],
            "seconds": round(self._seconds(), 1),
            "peak_memory_bytes": self._peak(),
        }
        write_text_atomic(self.directory / "results.json", json_text(content))
