"""What a recipe is: the hyper-parameters of every stage as frozen dataclasses.

The defaults are the paper's (METHOD 3.6 and 4.5). Where the paper and its repository differ (METHOD 13), the choice
is written at the field.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from bivec.engine.encoder_config import POOLINGS
from bivec.engine.errors import ConfigError
from bivec.engine.lora import PROJECTIONS, LoraConfig
from bivec.engine.optim import OptimConfig
from bivec.models import DecoderConfig

STAGES = ("bi", "mntp", "simcse", "supervised")
TRAINED = STAGES[1:]  # those that train, in their order
RUN_FILE = "run.json"  # what a recipe's run is known by, in its directory
TUNINGS = ("lora", "full")


@dataclass(frozen=True)
class MntpStage:
    """Masked next-token prediction (METHOD 3).

    Raises:
        ConfigError: a value out of range.
    """

    optim: OptimConfig = field(default_factory=lambda: OptimConfig(learning_rate=5e-5, steps=1000))
    # the decay reaches zero after so many epochs (HF's default of 3), training stops long before; None = at the stop
    decay_epochs: int | None = 3
    batch_size: int = 32  # blocks a step
    sequence_length: int = 512
    bos_in_every_block: bool = False  # False: rows with their BOS are joined and cut anywhere, as in the repository
    mask_probability: float = 0.2
    mask_style: str = "bert"  # "bert" (80/10/10) | "all_mask"
    mask_token: str = "blank"  # noqa: S105 - "blank" (_) | "eos" | "mask"
    lora: LoraConfig = field(default_factory=LoraConfig)
    tuning: str = "lora"  # "lora" | "full": all weights of the trunk, with fp32 masters of bf16 ones
    # "frozen" | "trained", then thrown away: the repository's, where the head is not the embedding (METHOD 3.4)
    lm_head: str = "frozen"
    micro_batch_tokens: int | None = 8192  # tokens of one forward and backward; the step's gradient does not change
    save_every: int = 200
    evaluate_every: int = 0

    def __post_init__(self) -> None:
        _check_stage(self)
        _check_at_least(self, {"batch_size": 1, "sequence_length": 2, "micro_batch_tokens": 1})
        if not 0 < self.mask_probability <= 1:
            raise ConfigError(f"mask_probability is {self.mask_probability}, expected above 0 and at most 1")
        for name, known in (
            ("mask_style", ("bert", "all_mask")),
            ("mask_token", ("blank", "eos", "mask")),
            ("lm_head", ("frozen", "trained")),
        ):
            if getattr(self, name) not in known:
                raise ConfigError(f"{name} is {getattr(self, name)!r}, expected one of {', '.join(known)}")


@dataclass(frozen=True)
class SimcseStage:
    """Unsupervised SimCSE (METHOD 4).

    Raises:
        ConfigError: a value out of range.
    """

    optim: OptimConfig = field(default_factory=lambda: OptimConfig(learning_rate=3e-5, steps=1000))
    decay_epochs: int | None = 3
    batch_size: int = 128  # sentences a step; the repository's. The paper has 32 for S-LLaMA-1.3B
    max_length: int = 128
    pooling: str = "mean"
    causal: bool = False  # Uni+SimCSE, a baseline of the paper's: the decoder's own mask
    attention_dropout: float = 0.3
    scale: float = 20.0
    micro_batch_tokens: int | None = None  # of one forward and backward, by gradient caching; None = both views at once
    lora: LoraConfig = field(default_factory=LoraConfig)
    tuning: str = "lora"  # "lora" | "full"
    save_every: int = 200
    evaluate_every: int = 0

    def __post_init__(self) -> None:
        _check_stage(self)
        _check_at_least(
            self, {"batch_size": 2, "max_length": 2, "micro_batch_tokens": 1}
        )  # a batch of one has no negatives and no gradient
        if not (0 <= self.attention_dropout < 1 and self.scale > 0):
            raise ConfigError(
                f"expected attention_dropout in [0, 1) and scale above 0, got {self.attention_dropout} and {self.scale}"
            )
        if self.pooling not in POOLINGS:
            raise ConfigError(f"pooling is {self.pooling!r}, expected one of {', '.join(POOLINGS)}")
        if self.pooling == "eos_token":
            raise ConfigError("pooling 'eos_token': SimCSE's rows end without an EOS; choose 'last_token'")


@dataclass(frozen=True)
class SupervisedStage:
    """Supervised contrastive training (METHOD 5; the defaults are those of 5.7).

    Raises:
        ConfigError: a value out of range.
    """

    optim: OptimConfig = field(default_factory=lambda: OptimConfig(learning_rate=2e-4, steps=1000, warmup_steps=300))
    decay_epochs: int | None = 3
    batch_size: int = 512  # triples a step, over all processes; all of one data set
    max_length: int = 512
    scale: float = 50.0
    pooling: str = "mean"
    causal: bool = False  # the Uni baseline: the decoder's own mask, with pooling "weighted_mean"
    # a short name, "none", or a string with {text}; "auto" = of the model's folder, else by its name (METHOD 5.3)
    template: str = "auto"
    pool_tail: bool = True  # the template's tail is pooled, as in the released models (METHOD 5.4)
    sts_instruction: str = ""  # in front of the sentences of the STS evaluation
    symmetric_instruction: bool = True  # documents of symmetric sets get it too: the paper's; the repository's do not
    filter_same: bool = True  # a document that is a query's positive is no negative of it; the repository has no filter
    margin: float | None = None  # negatives with a cosine above the positive's - margin are left out; None = none is
    matryoshka_dims: tuple[int, ...] = ()
    attention_dropout: float = 0.0
    # an adapter to go on with, as the paper's full LLM2Vec does with SimCSE's ("simcse" = this run's; METHOD 13);
    # None = a fresh one on the merged weights
    init_adapter: str | None = None
    lora: LoraConfig = field(default_factory=LoraConfig)
    tuning: str = "lora"  # "lora" | "full"
    on_bad_line: str = "error"  # "skip" counts lines that hold no triple and goes on
    micro_batch_tokens: int | None = 16384  # of one forward and backward, by gradient caching
    save_every: int = 200
    evaluate_every: int = 0

    def __post_init__(self) -> None:
        _check_stage(self)
        _check_at_least(self, {"batch_size": 1, "max_length": 2, "micro_batch_tokens": 1})
        if not (0 <= self.attention_dropout < 1 and 0 < self.scale < math.inf):
            raise ConfigError(
                f"expected attention_dropout in [0, 1) and scale above 0, got {self.attention_dropout} and {self.scale}"
            )
        if self.margin is not None and not math.isfinite(self.margin):
            raise ConfigError(f"margin is {self.margin}, expected a number")
        if len(set(self.matryoshka_dims)) < len(self.matryoshka_dims) or min(self.matryoshka_dims, default=1) < 1:
            raise ConfigError(f"matryoshka_dims are {self.matryoshka_dims}, expected different numbers of at least 1")
        if self.tuning == "full" and self.init_adapter is not None:
            raise ConfigError(f"init_adapter is {self.init_adapter!r}, but tuning is 'full', which has no adapter")
        for name, known in (("pooling", tuple(POOLINGS)), ("on_bad_line", ("error", "skip"))):
            if getattr(self, name) not in known:
                raise ConfigError(f"{name} is {getattr(self, name)!r}, expected one of {', '.join(known)}")


@dataclass(frozen=True)
class Recipe:
    """Everything that determines the result of a run.

    Raises:
        ConfigError: a value out of range.
    """

    name: str
    model: str  # directory, .gguf file, hub id or packaged.PACKAGED_MODEL
    mntp_data: str
    simcse_data: str
    sts_dev: str
    sts_test: str
    mntp: MntpStage = field(default_factory=MntpStage)
    simcse: SimcseStage = field(default_factory=SimcseStage)
    supervised: SupervisedStage = field(default_factory=SupervisedStage)
    supervised_data: str | None = None  # triples: a folder, a file or a hub id (engine/triples.py)
    stages: tuple[str, ...] = ("bi", "mntp", "simcse")
    adapters: tuple[str, ...] = ()  # PEFT adapters that are merged into the model first, such as those of other runs
    # the repository pools BOS in SimCSE training only (METHOD 4.3); here one rule holds for training and encoding
    pool_bos: bool | None = False  # None = as the model's folder says
    bos_token: str | None = None  # of the default model, where its tokenizer adds none; None = load_tokenizer's choice
    mntp_column: str | None = None
    simcse_column: str | None = None
    data_limit: int | None = None  # rows read from each training file
    eval_pairs: int | None = 500  # first pairs of each STS file; None = all
    dtype: str | None = None  # of the frozen weights; None = float32 on a CPU, bfloat16 elsewhere
    seed: int = 42
    shape: DecoderConfig | None = None  # of the default model, for --dry-run where its files are out of reach

    def __post_init__(self) -> None:
        _check_at_least(self, {"eval_pairs": 2, "data_limit": 1})
        if self.supervised.init_adapter == "simcse" and self.simcse.tuning == "full":
            raise ConfigError("supervised.init_adapter is 'simcse', but simcse.tuning is 'full', which has no adapter")

    def trains_all_weights(self) -> bool:
        """Whether one of its stages does."""
        return any(getattr(self, name).tuning == "full" for name in self.stages if name != "bi")


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Names and values of the hyper-parameters in which two recipes (as dicts) differ."""
    found = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            found += differences(before, after, f"{prefix}{key}.")
        elif before != after:
            found.append(f"{prefix}{key} (was {before!r}, now {after!r})")
    return found


def _check_stage(stage: MntpStage | SimcseStage | SupervisedStage) -> None:
    """What the stages have in common."""
    if stage.tuning not in TUNINGS:
        raise ConfigError(f"tuning is {stage.tuning!r}, expected one of {', '.join(TUNINGS)}")
    _check_at_least(stage, {"decay_epochs": 1, "save_every": 0, "evaluate_every": 0})
    unknown = [name for name in stage.lora.targets if name not in PROJECTIONS]
    if unknown or not stage.lora.targets:
        raise ConfigError(
            f"lora.targets names {', '.join(unknown) or 'nothing'}, expected some of {', '.join(PROJECTIONS)}"
        )
    optim = stage.optim
    if not (all(0 <= beta < 1 for beta in optim.betas) and optim.eps >= 0 and optim.weight_decay >= 0):
        raise ConfigError(
            "expected betas in [0, 1), eps and weight_decay of at least 0, got "
            f"{optim.betas}, {optim.eps} and {optim.weight_decay}"
        )


def _check_at_least(settings: Any, least: dict[str, float]) -> None:
    """Every field named must be no less than its bound; None (off) passes."""
    for name, bound in least.items():
        value = getattr(settings, name)
        if value is not None and not value >= bound:
            raise ConfigError(f"{name} is {value}, expected at least {bound}")


def as_dict(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain JSON values (tuples become lists)."""
    plain: dict[str, Any] = json.loads(json.dumps(asdict(recipe)))
    return plain


def with_horizon(optim: OptimConfig, decay_epochs: int | None, samples: int, batch_size: int) -> OptimConfig:
    """Fixes where the learning rate reaches zero, once the size of the data is known; a horizon that is given stays."""
    if decay_epochs is None or optim.horizon is not None:
        return optim
    return replace(optim, horizon=max(optim.steps, decay_epochs * -(-samples // batch_size)))
