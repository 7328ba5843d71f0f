"""The weights of a run on their way through the stages: loaded, with stages merged in, sharded, trained, kept.

What a stage trained lies in ``<output-dir>/<stage>/``: an adapter in PEFT's format, or after full-weight training the
whole trunk as transformers loads it, in the precision of its master weights. A model that was sharded is not put
together again in place: it is read anew, with what the stages left.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from bivec.engine.distributed import World, data_parallel, is_sharded
from bivec.engine.encoder_config import EncoderConfig, stored_origin, stored_trained_on, write_settings
from bivec.engine.errors import ConfigError
from bivec.engine.lora import ADAPTER_CONFIG, Adapter, add_lora, load_adapter, read_adapter
from bivec.engine.origin import Origin, adapter_fingerprint, shown_name, weights_fingerprint
from bivec.engine.recipe import MntpStage, Recipe, SimcseStage, SupervisedStage
from bivec.engine.run_files import base_model
from bivec.engine.sharding import HEAD, attach_head, detach_head, gathered, shard
from bivec.engine.tokenizer import prefix_ids
from bivec.models import Llama, load_pretrained, save_pretrained
from bivec.models.files import atomic_directory
from bivec.models.weights import CONFIG_FILE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Stage = MntpStage | SimcseStage | SupervisedStage


def stage_is_done(directory: Path) -> bool:
    """Whether a stage has left its result there."""
    return any((directory / file).is_file() for file in (ADAPTER_CONFIG, CONFIG_FILE))


@dataclass(frozen=True)
class Trainable:
    """What a stage trains, ready for its objective."""

    model: nn.Module  # the trunk, or the engine that reduces its gradients
    adapter: Adapter | None  # None: all weights are trained
    parameters: dict[str, nn.Parameter]
    lm_head_weight: Tensor | Callable[[], Tensor] | None  # of MNTP


class RunWeights:
    """The trunk of a run as it stands.

    ``model`` may be replaced by every method. ``merged`` names the stages whose result is in it, ``trained`` is what a
    stage is training, between :meth:`prepare` and :meth:`keep`.
    """

    model: Llama
    lm_head_weight: Tensor | None
    merged: list[str]
    trained: Trainable

    def __init__(
        self,
        recipe: Recipe,
        model_path: Path,
        directory: Path,
        *,
        device: str,
        dtype: torch.dtype,
        world: World,
        sharded: bool,
    ):
        self.recipe, self.model_path, self.directory = recipe, model_path, directory
        self.device, self.dtype, self.world, self.sharded = device, dtype, world, sharded
        self.load()

    def load(self, names: Sequence[str] = (), dtype: torch.dtype | None = None) -> None:
        """Reads the decoder and puts exactly these stages' results into it.

        Args:
            names: stages that are done, in their order.
            dtype: of the weights; None = the run's.
        """
        for old in ("model", "lm_head_weight"):  # their memory first
            vars(self).pop(old, None)
        dtype = dtype or self.dtype
        # what is to be sharded need not fit on the device
        home = "cpu" if self.sharded or (dtype != self.dtype and self.world.size > 1) else self.device
        whole = [name for name in names if (self.directory / name / CONFIG_FILE).is_file()]
        source = self.directory / whole[-1] if whole else self.model_path
        checkpoint = load_pretrained(source, dtype=dtype, device=home)
        self.model, self.lm_head_weight = checkpoint.model.requires_grad_(False), checkpoint.lm_head_weight
        if not whole:
            for adapter in self.recipe.adapters:
                load_adapter(self.model, adapter).merge()
        for name in names[names.index(whole[-1]) + 1 :] if whole else names:
            load_adapter(self.model, self.directory / name).merge()
        self.merged = list(names)

    def origin(self) -> Origin:
        """What has been merged into the decoder's weights: by the model's folder, the recipe and the stages.

        Raises:
            CheckpointError: an adapter of the recipe is in the weights already, or was trained on other ones.
        """
        origin = stored_origin(self.model_path)
        origin = replace(origin, base_model=origin.base_model or shown_name(base_model(self.recipe.model)))
        for folder in map(Path, self.recipe.adapters):
            with_it = origin.with_adapter(folder, adapter_fingerprint(*read_adapter(folder)))
            origin.check_trained_on(folder, stored_trained_on(folder))
            origin = with_it
        for folder in (self.directory / name for name in self.merged):
            if (folder / ADAPTER_CONFIG).is_file():
                origin = origin.with_adapter(folder, adapter_fingerprint(*read_adapter(folder)))
            else:
                origin = stored_origin(folder)  # with what was there before
        return origin

    def merge(self, names: Sequence[str]) -> None:
        """Puts exactly these stages' results into the weights, which are whole then, in the run's dtype."""
        begins = self.merged == list(names)[: len(self.merged)]
        added = names[len(self.merged) :]
        if is_sharded(self.model) or not begins or any((self.directory / x / CONFIG_FILE).is_file() for x in added):
            self.load(names)
            return
        for name in added:
            load_adapter(self.model, self.directory / name).merge()
            self.merged.append(name)

    def runnable(self) -> Llama:
        """The model for a forward: sharded, if it is to be."""
        if self.sharded and not is_sharded(self.model):
            self.lm_head_weight = None
            shard(self.model, self.world, self.device)
        return self.model

    def prepare(self, name: str, stage: Stage, seed: int) -> Trainable:
        """Makes ready what a stage trains: ``trained``, until :meth:`keep`.

        Args:
            name: of the stage.
            stage: its settings.
            seed: of a fresh adapter.
        """
        start = getattr(stage, "init_adapter", None)
        names = [done for done in self.merged if not (start == "simcse" and done == "simcse")]  # trained, not merged
        full, masters = stage.tuning == "full", torch.promote_types(self.dtype, torch.float32)
        if full and (masters != self.dtype or self.sharded):
            self.load(names, masters)
        else:
            self.merge(names)
        model, adapter = self.model, None
        head: Tensor | Callable[[], Tensor] | None = self.lm_head_weight if name == "mntp" else None
        self.lm_head_weight = None  # MNTP alone needs it: 1 GB of a Llama-3-8B
        if full:
            model.requires_grad_(True)
        elif start is None:
            adapter = add_lora(model, stage.lora, seed)
        else:
            adapter = load_adapter(model, self.directory / "simcse" if start == "simcse" else start)
        learns = isinstance(stage, MntpStage) and stage.lm_head == "trained"
        if learns and not full and head is model.embed_tokens.weight:
            raise ConfigError(
                "mntp.lm_head is 'trained', but the head is the input embedding here (tie_word_embeddings), which LoRA "
                "leaves frozen; give mntp.lm_head=frozen, or mntp.tuning=full"
            )
        split = full or self.sharded
        if isinstance(head, Tensor) and (split or learns):
            head = attach_head(model, head, trained=learns)
        if split:
            shard(model, self.world, self.device, self.dtype)
        parameters = dict(model.named_parameters() if adapter is None else adapter.named_parameters())
        if adapter is not None and learns:
            parameters[HEAD] = getattr(model, HEAD)
        parameters = {key: parameter for key, parameter in parameters.items() if parameter.requires_grad}
        self.trained = Trainable(model if split else data_parallel(model, self.world), adapter, parameters, head)
        return self.trained

    def keep(self, name: str, config: EncoderConfig, tokenizer: PreTrainedTokenizerFast) -> None:
        """Writes what a stage trained to ``<output-dir>/<stage>/``, and how it is to be used; has it in the weights.

        Args:
            name: of the stage.
            config: the pooling rule that it was trained for.
            tokenizer: that it was trained with; goes with a whole trunk.
        """
        before, names, adapter = self.origin(), [*self.merged, name], self.trained.adapter
        bos_token = next(iter(tokenizer.convert_ids_to_tokens(prefix_ids(tokenizer))), None)
        for parameter in self.trained.parameters.values():
            parameter.grad = None
        del self.trained
        detach_head(self.model)
        if adapter is not None:
            write_more = partial(write_settings, config=config, bos_token=bos_token, trained_on=before)
            adapter.save(self.directory / name, self.recipe.model, self.world, write_more)
        elif (model := gathered(self.model, self.world)) is not None:
            folder = self.directory / name
            with atomic_directory(folder) as temporary:  # before the config.json, which says that all is there
                after = before.with_adapter(folder, weights_fingerprint(model), whole=True)
                write_settings(temporary, config, bos_token, origin=after)
                tokenizer.save_pretrained(temporary)
            save_pretrained(model, folder, is_causal=config.causal)
            del model
        self.world.barrier()  # what rank 0 has written others may read from here on
        if adapter is not None and not is_sharded(self.model):
            adapter.merge()
            self.merged = names
            return
        del adapter
        self.load(names)
