"""LoRA on the projections of a decoder: add, train, merge, and exchange adapters with PEFT.

The layer wraps a projection in place, so the models know nothing of it. Adapters are saved under the names that an
adapter of the *trunk* has in PEFT (``base_model.model.layers.0.self_attn.q_proj.lora_A.weight``, METHOD 9.2), in fp32.

Source: Hu et al. 2021; METHOD 3.4 for targets and rank.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from bivec.engine.distributed import ALONE, World, whole
from bivec.engine.json_files import json_text, read_json
from bivec.kernels import fold_seed, lora_linears
from bivec.models.errors import CheckpointError, ConfigError
from bivec.models.files import atomic_directory

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PEFT_PREFIX = "base_model.model."
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # PEFT's names
# fields of adapter_config.json that change what the adapter computes, in ways that no tensor of the file shows
UNSUPPORTED = (
    "use_dora",
    "use_rslora",
    "use_qalora",
    "use_bdlora",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "alora_invocation_tokens",
    "layer_replication",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
)
# ways to begin that leave the base's weights alone; all others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA, …) take from them
# what the adapter begins with, and PEFT does so again when it loads
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class LoraConfig:
    """Hyper-parameters of an adapter; the defaults are the paper's.

    Raises:
        ConfigError: a rank below 1, or a dropout outside [0, 1).
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.05
    targets: tuple[str, ...] = PROJECTIONS

    def __post_init__(self) -> None:
        if self.rank < 1 or not 0.0 <= self.dropout < 1.0:
            raise ConfigError(
                f"LoRA needs a rank of at least 1 and a dropout in [0, 1), got {self.rank} and {self.dropout}"
            )

    @property
    def scaling(self) -> float:
        """What B A is multiplied by before it is added to the weight."""
        return self.alpha / self.rank


@dataclass
class DropoutNoise:
    """What all LoRA layers of an adapter share in a forward; no seed means no dropout (evaluation)."""

    seed: int | Tensor | None = None
    token_ids: Tensor | None = None  # [T] int64


class LoraLinear(nn.Module):
    """A frozen projection with a trainable low-rank update."""

    def __init__(self, base: nn.Linear, config: LoraConfig, site: int, noise: DropoutNoise):
        super().__init__()
        self.base, self.config, self.site, self.noise = base, config, site, noise
        device = base.weight.device
        # fp32 whatever the base: METHOD 2.5
        self.lora_a = nn.Parameter(torch.empty(config.rank, base.in_features, dtype=torch.float32, device=device))
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, config.rank, dtype=torch.float32, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """[T, in_features] -> [T, out_features]."""
        return self.project_jointly(x, (self,), None)[0]

    @staticmethod
    def project_jointly(x: Tensor, layers: Sequence[LoraLinear], backend: str | None) -> tuple[Tensor, ...]:
        """The outputs of projections of one input (see ``models.projection``); all belong to one adapter.

        Together they have one dropout mask.
        """
        config, noise = layers[0].config, layers[0].noise
        dropout_p = config.dropout if noise.seed is not None else 0.0
        return lora_linears(
            x,
            [layer.base.weight for layer in layers],
            [layer.lora_a for layer in layers],
            [layer.lora_b for layer in layers],
            config.scaling,
            biases=[layer.base.bias for layer in layers],
            dropout_p=dropout_p,
            seed=None if noise.seed is None or not dropout_p else fold_seed(noise.seed, layers[0].site),
            token_ids=noise.token_ids if dropout_p else None,
            backend=backend,
        )


class Adapter:
    """The LoRA layers of a model, by the name of the projection that each wraps."""

    def __init__(self, model: nn.Module, config: LoraConfig, layers: dict[str, LoraLinear], noise: DropoutNoise):
        self.model, self.config, self.layers, self.noise = model, config, layers, noise
        self.name = "adapter"  # of its folder
        self.live, self.merged = True, False

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """The trainable matrices under their PEFT names without the prefix."""
        named = {}
        for name, layer in self.layers.items():
            named[f"{name}.lora_A.weight"] = layer.lora_a
            named[f"{name}.lora_B.weight"] = layer.lora_b
        return named

    def set_noise(self, seed: int | Tensor | None, token_ids: Tensor | None = None) -> None:
        """Keys the LoRA dropout of the coming forward and backward; ``None`` switches it off."""
        self.noise.seed, self.noise.token_ids = seed, token_ids

    @torch.no_grad()
    def merge(self) -> None:
        """Adds ``scaling · B A`` to every wrapped weight and puts the plain projections back into the model.

        Raises:
            ConfigError: it is in the weights already, or was taken off.
        """
        self._check_live()
        for layer in self.layers.values():
            # added in fp32 and rounded once, whatever the dtype of the base
            layer.base.weight += (layer.lora_b @ layer.lora_a).mul_(self.config.scaling)
        self.remove()
        self.merged = True

    def remove(self) -> None:
        """Puts the plain projections back without adding the updates.

        Raises:
            ConfigError: as :meth:`merge`.
        """
        self._check_live()
        self.live = False
        for name, layer in self.layers.items():
            _set_submodule(self.model, name, layer.base)

    def _check_live(self) -> None:
        if not self.live:
            state = "is in the weights" if self.merged else "was taken off"
            raise ConfigError(f"{self.name}: the adapter {state} already")

    def save(
        self,
        directory: str | Path,
        base_model_name: str,
        world: World = ALONE,
        write_more: Callable[[Path], object] = lambda _: None,
    ) -> None:
        """Writes ``adapter_model.safetensors`` and ``adapter_config.json`` as PEFT reads them.

        Of several ranks all must call it, since the adapter may be sharded; rank 0 writes.

        Args:
            directory: made if it is not there.
            base_model_name: of the decoder.
            world: the ranks.
            write_more: called with the folder in which the files are made, to put others beside them.

        Raises:
            BivecError: the disk is full.
        """
        tensors = {
            PEFT_PREFIX + name: whole(p.detach()).float().cpu().contiguous()
            for name, p in self.named_parameters().items()
        }
        if not world.is_main:
            return
        fields = {
            "peft_type": "LORA",
            "task_type": None,
            "base_model_name_or_path": base_model_name,
            "r": self.config.rank,
            "lora_alpha": self.config.alpha,
            "lora_dropout": self.config.dropout,
            "bias": "none",
            "target_modules": list(self.config.targets),
            "fan_in_fan_out": False,
            "inference_mode": True,
        }
        with atomic_directory(directory, last=ADAPTER_CONFIG) as temporary:
            write_more(temporary)
            save_file(tensors, temporary / ADAPTER_WEIGHTS, metadata={"format": "pt"})
            (temporary / ADAPTER_CONFIG).write_text(json_text(fields), encoding="utf-8")


def add_lora(model: nn.Module, config: LoraConfig, seed: int = 0) -> Adapter:
    """Wraps every projection named in ``config.targets`` and freezes everything else.

    A is drawn uniformly from ±1/√in by a generator of its own, B is zero: the model's output does not change at first.

    Args:
        model: a decoder; its projections are replaced in place.
        config: rank, alpha, dropout, targets.
        seed: of the initialisation.

    Raises:
        ConfigError: a target that no projection of the model is named, or the model already carries an adapter.
    """
    if any(isinstance(module, LoraLinear) for module in model.modules()):
        raise ConfigError("the model already carries a LoRA adapter; merge or remove it first")
    found = _target_projections(model, config.targets)
    model.requires_grad_(False)
    noise, layers = DropoutNoise(), {}
    for site, (name, base) in enumerate(found.items()):
        layer = LoraLinear(base, config, site, noise)
        generator = torch.Generator().manual_seed(fold_seed(seed, site))
        bound = 1 / math.sqrt(base.in_features)
        initial = torch.empty(layer.lora_a.shape).uniform_(-bound, bound, generator=generator)
        layer.lora_a.data.copy_(initial)
        _set_submodule(model, name, layer)
        layers[name] = layer
    return Adapter(model, config, layers, noise)


def load_adapter(model: nn.Module, directory: str | Path) -> Adapter:
    """Adds the adapter of a directory in PEFT's format to the model.

    Names with the trunk prefix and names with a CausalLM's extra ``model.`` level are both understood.

    Raises:
        CheckpointError: a missing or truncated file, an adapter of another kind, names or shapes that do not fit the
            model. The model is as it was.
        ConfigError: the model already carries an adapter.
    """
    directory = Path(directory)
    if any(isinstance(module, LoraLinear) for module in model.modules()):
        raise ConfigError(f"{directory}: the model already carries a LoRA adapter; merge or remove it first")
    config, tensors = read_adapter(directory)
    file, base_model = directory / ADAPTER_WEIGHTS, adapter_base(directory)
    told = f" (adapter_config.json names {base_model})" if base_model else ""
    try:
        projections = _target_projections(model, config.targets)
    except ConfigError as error:
        raise CheckpointError(f"{directory}: the adapter belongs to another base model{told}: {error}") from None
    shapes = {}
    for name, base in projections.items():
        shapes[f"{name}.lora_A.weight"] = (config.rank, base.in_features)
        shapes[f"{name}.lora_B.weight"] = (base.out_features, config.rank)
    missing, unexpected = shapes.keys() - tensors.keys(), tensors.keys() - shapes.keys()
    if missing or unexpected:
        raise CheckpointError(
            f"{file}: the adapter does not fit the model: {len(missing)} matrices missing (first: "
            f"{min(missing, default='-')}), {len(unexpected)} unexpected (first: {min(unexpected, default='-')}); it "
            f"belongs to another base model{told}, or the file is damaged"
        )
    for name, shape in shapes.items():
        if tensors[name].shape != shape:
            raise CheckpointError(
                f"{file}: {name} has shape {list(tensors[name].shape)}, expected {list(shape)}; "
                f"the adapter belongs to another base model{told}"
            )
    adapter = add_lora(model, config)
    adapter.name = directory.resolve().name
    for name, parameter in adapter.named_parameters().items():
        parameter.data.copy_(tensors[name])
    return adapter


def _target_projections(model: nn.Module, targets: tuple[str, ...]) -> dict[str, nn.Linear]:
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    own_names = {name.rpartition(".")[2] for name in linear}
    unknown = [target for target in targets if target not in own_names]
    if unknown or not targets:
        raise ConfigError(
            f"no projection of the model is named {', '.join(unknown) or '(no target given)'}; "
            f"there are {', '.join(sorted(own_names))}"
        )
    return {name: module for name, module in linear.items() if name.rpartition(".")[2] in targets}


def read_adapter(directory: str | Path) -> tuple[LoraConfig, dict[str, Tensor]]:
    """An adapter in PEFT's format: its settings, and its matrices under their names without any prefix.

    Raises:
        CheckpointError: as :func:`load_adapter`.
    """
    directory = Path(directory)
    config = read_adapter_config(directory / ADAPTER_CONFIG)
    return config, _read_adapter_tensors(directory / ADAPTER_WEIGHTS)


def adapter_base(directory: str | Path) -> str | None:
    """The base model that an adapter_config.json names; None where it names none."""
    file = Path(directory) / ADAPTER_CONFIG
    name = _read_adapter_json(file).get("base_model_name_or_path")
    if name is not None and not isinstance(name, str):
        raise CheckpointError(f"{file}: base_model_name_or_path is {str(name)[:80]!r}, expected a string")
    return name or None


def read_adapter_config(file: Path) -> LoraConfig:
    """The settings in an adapter_config.json of PEFT.

    Raises:
        CheckpointError: as :func:`load_adapter`.
    """
    raw = _read_adapter_json(file)
    if raw.get("peft_type") != "LORA":
        raise CheckpointError(f"{file}: peft_type is {raw.get('peft_type')!r}, only 'LORA' is supported")
    for field in UNSUPPORTED:
        if raw.get(field):
            raise CheckpointError(
                f"{file}: {field}={repr(raw[field])[:80]} is not supported; merge the adapter into its model with "
                "PEFT (merge_and_unload) and give that model"
            )
    start = raw.get("init_lora_weights")
    if (start.lower() if isinstance(start, str) else start) not in PLAIN_STARTS:
        raise CheckpointError(
            f"{file}: init_lora_weights={start!r} changes the base model's weights too; convert it to a plain LoRA: "
            "PEFT's save_pretrained(…, path_initial_model_for_weight_conversion=…)"
        )
    if raw.get("bias", "none") != "none":
        raise CheckpointError(f"{file}: bias={raw['bias']!r} is not supported, expected 'none'")
    rank, targets = raw.get("r"), raw.get("target_modules")
    if type(rank) is not int or abs(rank) > sys.float_info.max:  # the scaling is divided by it
        raise CheckpointError(f"{file}: r is {str(rank)[:80]!r}, expected a number")
    alpha, dropout = _number(file, "lora_alpha", raw.get("lora_alpha")), raw.get("lora_dropout")
    dropout = 0.0 if dropout is None else _number(file, "lora_dropout", dropout)
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise CheckpointError(f"{file}: target_modules={repr(targets)[:80]} are not usable, expected a list of names")
    try:
        return LoraConfig(rank, alpha, dropout, tuple(sorted(targets)))
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from error


def _number(file: Path, field: str, value: object) -> float:
    # the bound is the largest float: an integer beyond it cannot become one
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= sys.float_info.max:
        raise CheckpointError(f"{file}: {field} is {str(value)[:80]!r}, expected a number")
    return float(value)


def _read_adapter_json(file: Path) -> dict[str, Any]:
    hint = "; an adapter directory holds it beside adapter_model.safetensors"
    settings: dict[str, Any] = read_json(file, dict, CheckpointError, hint=hint, allow_nan=True)
    return settings


def _read_adapter_tensors(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file (adapters stored as .bin are pickles and are not read)")
    tensors = {}
    try:
        with safe_open(file, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118  (safe_open has no __iter__)
                trunk = name.removeprefix(PEFT_PREFIX).removeprefix("model.").replace(".default.weight", ".weight")
                if trunk in tensors:
                    raise CheckpointError(f"{file}: {name} and another tensor are both {trunk}; leave one of them out")
                tensors[trunk] = handle.get_tensor(name)
                if not tensors[trunk].is_floating_point():
                    raise CheckpointError(
                        f"{file}: {name} is stored as {tensors[trunk].dtype}, expected floating point; fetch it again"
                    )
    except SafetensorError as error:
        raise CheckpointError(f"{file}: not a whole safetensors file ({error}); fetch or write it again") from error
    return tensors


def _set_submodule(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent) if parent else model, child, module)
