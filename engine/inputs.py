"""What a recipe reads: the model's configuration, the tokenizer, the texts; checked and tokenised before any work.

What is wrong is collected first, so that one error names all the flags that have to be given.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast

import numpy as np

from bivec.engine.data import BlockDataset, SentenceDataset, STSPair, load_sts, load_texts, mntp_blocks, sentence_ids
from bivec.engine.encoder_config import is_encoder, weights_directory
from bivec.engine.errors import BivecError, CheckpointError, ConfigError, DataError, RunError
from bivec.engine.fingerprint import tokenizer_checksum
from bivec.engine.hub import prefer_offline
from bivec.engine.lora import ADAPTER_CONFIG, read_adapter_config
from bivec.engine.masking import MaskingConfig, MaskStyle
from bivec.engine.packaged import PACKAGED_MODEL, find_smollm2
from bivec.engine.recipe import Recipe
from bivec.engine.text_format import resolve_template
from bivec.engine.tokenizer import load_tokenizer, mask_token_id
from bivec.engine.triple_batches import TripleBatches
from bivec.engine.triples import OnBadLine, TripleSet, load_triples
from bivec.models import DecoderConfig
from bivec.models.weights import CONFIG_FILE, inspect_checkpoint, resolve_checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MODEL_FLAG = "--model (a decoder with its tokenizer)"
MNTP_FLAG = "--mntp-data (running text: paragraphs or articles)"
SIMCSE_FLAG = "--simcse-data (one sentence a row)"
SUPERVISED_FLAG = "--supervised-data (queries with positives and hard negatives)"

Read = TypeVar("Read")


@dataclass(frozen=True)
class Inputs:
    """What a recipe reads, ready for training; of a stage that is not run there is nothing."""

    config: DecoderConfig
    model_path: Path
    tokenizer: PreTrainedTokenizerFast
    masking: MaskingConfig | None
    blocks: BlockDataset | None
    sentences: SentenceDataset | None
    sts: dict[str, list[STSPair]]  # "dev", "test"
    triples: list[TripleSet] | None = None

    def fingerprints(self) -> dict[str, str]:
        """Size and checksum of the training tokens by stage: a resumed run must meet the same."""
        found = {}
        if self.blocks is not None:
            found["mntp"] = f"{len(self.blocks)} blocks, crc32 {zlib.crc32(self.blocks.input_ids.data):08x}"
        if self.sentences is not None:
            checksum = zlib.crc32(self.sentences.offsets.data, zlib.crc32(self.sentences.flat_ids.data))
            found["simcse"] = f"{len(self.sentences)} sentences, crc32 {checksum:08x}"
        if self.triples is not None:
            sets = [f"{one.name} {one.fingerprint()}" for one in self.triples]
            found["supervised"] = "; ".join([*sets, f"tokenizer crc32 {tokenizer_checksum(self.tokenizer)}"])
        return found


class _Problems:
    """Collects the errors of several inputs."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def attempt(self, flag: str, read: Callable[[], Read]) -> Read | None:
        """The result of ``read``, or None and a problem under the name of the flag."""
        try:
            return read()
        except BivecError as error:
            self.found.append(f"{flag}: {error}")
            return None

    def error(self) -> RunError:
        """One that names all of them."""
        if len(self.found) == 1:
            return RunError(f"the recipe cannot start: {self.found[0]}")
        return RunError("\n  ".join(["the recipe cannot start:", *self.found]))


def resolve_model(name: str) -> Path:
    """The directory or .gguf file behind ``--model``; a run directory stands for its ``merged/``.

    Raises:
        CheckpointError: nothing of that name is here or on the hub.
    """
    return find_smollm2() if name == PACKAGED_MODEL else resolve_checkpoint(_weights(name))


def _weights(name: str) -> str | Path:
    """What stands for a model that is a run, which must not be asked of the hub where it is missing."""
    if Path(name).parts[:1] == ("runs",) and not Path(name).exists():
        raise CheckpointError(f"{name}: there is no such run; give --model the directory of one, or another decoder")
    return weights_directory(name)


def model_config(recipe: Recipe) -> DecoderConfig:
    """The model's shape for ``--dry-run``: of the paper's models nothing is fetched, of others on the hub config.json.

    Raises:
        BivecError: nothing of that name is here or on the hub, or the configuration is not supported.
    """
    if recipe.model == PACKAGED_MODEL:
        return DecoderConfig.from_pretrained(find_smollm2())
    if recipe.shape is not None and not Path(recipe.model).expanduser().exists():
        return recipe.shape
    prefer_offline([recipe.model])
    return DecoderConfig.from_pretrained(resolve_checkpoint(_weights(recipe.model), (CONFIG_FILE,)))


def load_inputs(recipe: Recipe) -> Inputs:
    """Opens the model's configuration, the tokenizer and the data of the recipe's stages, and tokenises; no weights.

    Raises:
        RunError: what is missing or wrong, with the flags that fix it; everything that cannot be opened at once.
    """
    sources = {"mntp": recipe.mntp_data, "simcse": recipe.simcse_data, "supervised": recipe.supervised_data or ""}
    model = [] if recipe.model == PACKAGED_MODEL else [recipe.model]
    prefer_offline(model + [source for stage, source in sources.items() if stage in recipe.stages])
    problems = _Problems()
    decoder = _open_decoder(problems, recipe)
    masking = triples = None
    if "mntp" in recipe.stages and decoder is not None:
        masking = problems.attempt("--set mntp.mask_token", partial(_masking, recipe, decoder))
    texts = {
        stage: problems.attempt(flag, partial(_texts, recipe, stage))
        for stage, flag in (("mntp", MNTP_FLAG), ("simcse", SIMCSE_FLAG))
        if stage in recipe.stages
    }
    if "supervised" in recipe.stages:
        triples = problems.attempt(SUPERVISED_FLAG, partial(_triples, recipe))
        _check_supervised(problems, recipe)
    for adapter in recipe.adapters:
        problems.attempt("--adapters", partial(_check_adapter, adapter))
    sts = {
        split: pairs
        for split, source in (("dev", recipe.sts_dev), ("test", recipe.sts_test))
        if (pairs := problems.attempt(f"--sts-{split}", partial(_sts_pairs, source, recipe.eval_pairs))) is not None
    }
    if decoder is None or problems.found:
        raise problems.error()
    blocks = sentences = None
    if (rows := texts.get("mntp")) is not None:
        blocks = problems.attempt(MNTP_FLAG, partial(_blocks, recipe, decoder, rows))
    if (rows := texts.get("simcse")) is not None:
        sentences = problems.attempt(SIMCSE_FLAG, partial(_sentences, recipe, decoder, rows))
    if problems.found:
        raise problems.error()
    return Inputs(decoder.config, decoder.path, decoder.tokenizer, masking, blocks, sentences, sts, triples)


@dataclass(frozen=True)
class _Decoder:
    """The model of a recipe, but for its weights."""

    path: Path
    config: DecoderConfig
    tokenizer: PreTrainedTokenizerFast


def _open_decoder(problems: _Problems, recipe: Recipe) -> _Decoder | None:
    path = problems.attempt(MODEL_FLAG, partial(resolve_model, recipe.model))
    if path is None:
        return None
    config = problems.attempt(MODEL_FLAG, partial(_checked_config, recipe, path))
    if config is not None:
        _check_sizes(problems, recipe, config)
    tokenizer = problems.attempt(MODEL_FLAG, partial(_tokenizer, recipe, path))
    return None if config is None or tokenizer is None else _Decoder(path, config, tokenizer)


def _tokenizer(recipe: Recipe, path: Path) -> PreTrainedTokenizerFast:
    add_bos = recipe.bos_token is not None or not is_encoder(path)  # an encoder keeps the tokenizer it has
    return load_tokenizer(path, bos_token=recipe.bos_token, add_bos=add_bos)


def _check_sizes(problems: _Problems, recipe: Recipe, config: DecoderConfig) -> None:
    """The settings of the stages that a model may be too small for."""
    for stage, key in (("mntp", "sequence_length"), ("simcse", "max_length"), ("supervised", "max_length")):
        if stage in recipe.stages:
            _check_length(problems, f"{stage}.{key}", getattr(getattr(recipe, stage), key), config)
    if "supervised" in recipe.stages:
        dims = recipe.supervised.matryoshka_dims
        problems.attempt("--set supervised.matryoshka_dims", partial(_check_dims, dims, config))


def _check_supervised(problems: _Problems, recipe: Recipe) -> None:
    """The settings of the supervised stage that name a template or an adapter."""
    stage = recipe.supervised
    template = None if stage.template == "auto" else stage.template
    problems.attempt("--set supervised.template", partial(resolve_template, template, ""))
    start = stage.init_adapter
    if start is not None and not (start == "simcse" and "simcse" in recipe.stages):
        problems.attempt("--set supervised.init_adapter", partial(_check_start, recipe, start))


def _checked_config(recipe: Recipe, path: Path) -> DecoderConfig:
    """The configuration, after the headers of all weight files were checked: minutes of tokenising may follow."""
    config, has_head = inspect_checkpoint(path)
    if "mntp" in recipe.stages and not has_head:
        raise CheckpointError(
            f"{path}: has no LM head, which MNTP needs; use the CausalLM checkpoint or --stages bi,simcse"
        )
    return config


def _masking(recipe: Recipe, decoder: _Decoder) -> MaskingConfig:
    stage = recipe.mntp
    token = mask_token_id(decoder.tokenizer, stage.mask_token)
    _check_vocabulary(token, decoder.config)
    style = cast(MaskStyle, stage.mask_style)  # as the stage has checked
    # random replacements are real tokens: the embedding may have rows beyond the tokenizer's
    return MaskingConfig(token, min(len(decoder.tokenizer), decoder.config.vocab_size), stage.mask_probability, style)


def _texts(recipe: Recipe, stage: str) -> Sequence[str]:
    mntp = stage == "mntp"
    return load_texts(
        recipe.mntp_data if mntp else recipe.simcse_data,
        column=recipe.mntp_column if mntp else recipe.simcse_column,
        limit=recipe.data_limit,
        drop_empty=not mntp,  # an empty row of MNTP is a paragraph's end and becomes a lone BOS (METHOD 3.1)
        argument=f"--{stage}-data",
    )


def _sts_pairs(source: str, limit: int | None) -> list[STSPair]:
    pairs = load_sts(source)[:limit]
    if len(pairs) < 2:
        raise DataError(f"{source}: holds {len(pairs)} pair, a correlation needs two at least")
    return pairs


def _blocks(recipe: Recipe, decoder: _Decoder, texts: Sequence[str]) -> BlockDataset:
    stage = recipe.mntp
    blocks = mntp_blocks(texts, decoder.tokenizer, stage.sequence_length, per_block_bos=stage.bos_in_every_block)
    _check_vocabulary(blocks.input_ids, decoder.config)
    _check_enough(len(blocks), f"blocks of {stage.sequence_length} tokens", "mntp.batch_size", stage.batch_size)
    return blocks


def _sentences(recipe: Recipe, decoder: _Decoder, texts: Sequence[str]) -> SentenceDataset:
    sentences = sentence_ids(texts, decoder.tokenizer, recipe.simcse.max_length)
    _check_vocabulary(sentences.flat_ids, decoder.config)
    _check_enough(len(sentences), "sentences", "simcse.batch_size", recipe.simcse.batch_size)
    return sentences


def _check_adapter(directory: str) -> None:
    if not (Path(directory) / ADAPTER_CONFIG).is_file():
        raise CheckpointError(
            f"{directory}: no {ADAPTER_CONFIG} there; give the directory of a PEFT adapter, such as a run's simcse/"
        )


def _check_start(recipe: Recipe, start: str) -> None:
    """An adapter to go on with must not be in the weights already, and has a shape of its own."""
    _check_adapter(start)
    directory, model = Path(start).resolve(), Path(recipe.model).resolve()
    if directory.parent == model or directory in [Path(name).resolve() for name in recipe.adapters]:
        raise ConfigError(
            f"{start} is merged into the model already, by --model or --adapters; give the model as it was before it"
        )
    theirs, ours = read_adapter_config(directory / ADAPTER_CONFIG), recipe.supervised.lora
    if (theirs.rank, theirs.alpha, set(theirs.targets)) != (ours.rank, ours.alpha, set(ours.targets)):
        raise ConfigError(
            f"{start} has rank {theirs.rank}, alpha {theirs.alpha:g} and targets {','.join(theirs.targets)}; give the "
            "same to supervised.lora"
        )


def _check_dims(dims: tuple[int, ...], config: DecoderConfig) -> None:
    if any(dim > config.hidden_size for dim in dims):
        raise ConfigError(f"{dims}: the model's embeddings have {config.hidden_size} numbers")


def _triples(recipe: Recipe) -> list[TripleSet]:
    if recipe.supervised_data is None:
        raise DataError("none was given; recipes/entailment_triples.py makes some of entailment data")
    found = load_triples(
        recipe.supervised_data,
        on_bad_line=cast(OnBadLine, recipe.supervised.on_bad_line),  # as the stage has checked
        limit=recipe.data_limit,
        argument="--supervised-data",
    )
    for one in found:
        if one.bad_lines:
            print(f"{one.name}: skipped lines that hold no triple: {one.bad_lines}", flush=True)
    TripleBatches(found, recipe.supervised.batch_size, seed=0)  # is there a batch?
    return found


def _check_length(problems: _Problems, key: str, length: int, config: DecoderConfig) -> None:
    if length > config.max_position_embeddings:
        problems.found.append(
            f"--set {key}: {length} tokens exceed the model's {config.max_position_embeddings} positions; "
            f"give at most {config.max_position_embeddings}"
        )


def _check_vocabulary(ids: np.ndarray | int, config: DecoderConfig) -> None:
    largest = int(np.max(ids))
    if largest >= config.vocab_size:
        raise DataError(
            f"the tokenizer gives the id {largest}, the model's vocabulary ends at {config.vocab_size - 1}; "
            "they do not belong together: look for the tokenizer that came with the model"
        )


def _check_enough(found: int, what: str, key: str, needed: int) -> None:
    if found < needed:
        raise DataError(f"holds {found} {what}, one step needs {needed}; give more text or --set {key}={found}")
