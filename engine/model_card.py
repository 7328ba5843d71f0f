"""The model card of a saved encoder (README.md): what it is, how it was trained, how to load it in each library.

It holds no date, no duration and no path, so that the same run writes the same card.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bivec.engine.encoder_config import EncoderConfig
from bivec.engine.errors import RunError
from bivec.engine.origin import Origin, is_hub_id
from bivec.engine.packaged import PACKAGED_MODEL, PACKAGED_NAME
from bivec.engine.recipe import RUN_FILE, TRAINED
from bivec.engine.sentence_transformers_files import attention_elsewhere
from bivec.engine.text_format import SLOT
from bivec.models import DecoderConfig
from bivec.models.plain_json import parse_json

CARD_FILE = "README.md"
MARK = "<!-- written by bivec"
SEE_BASE = "see the base model"
# what is known of decoders that the recipes use: how an id begins, its licence on the hub
LICENCES = (
    ("meta-llama/Llama-2", "llama2"),
    ("meta-llama/Meta-Llama-3.1", "llama3.1"),
    ("meta-llama/Llama-3.1", "llama3.1"),
    ("meta-llama/Llama-3.2", "llama3.2"),
    ("meta-llama/Meta-Llama-3-", "llama3"),
    ("mistralai/Mistral-7B", "apache-2.0"),
    ("princeton-nlp/Sheared-LLaMA", "apache-2.0"),
    ("TinyLlama/TinyLlama", "apache-2.0"),
    ("HuggingFaceTB/SmolLM", "apache-2.0"),
    ("Qwen/Qwen3-", "apache-2.0"),
    ("google/gemma-", "gemma"),
)
LLAMA_CPP_POOLINGS = {"mean": "mean", "bos_token": "cls", "last_token": "last", "eos_token": "last"}


@dataclass(frozen=True)
class ModelCard:
    """What a model card says beside what the encoder itself knows.

    All of it may be left out; :func:`card_of_run` takes it from a run's files.
    """

    base_model: str | None = None  # None: as the encoder's origin says
    licence: str | None = None  # the hub's short name; None: that of the base model, where it is known
    data: Mapping[str, str] = field(default_factory=dict)  # stage -> the name of what it was trained on
    hyperparameters: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # stage -> field -> value
    results: Sequence[Mapping[str, Any]] = ()  # rows of the table, as in results.json
    recipe: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)


def card_of_run(directory: str | Path) -> ModelCard:
    """The card of a run, from its run.json and, where it is there, its results.json.

    Raises:
        RunError: a run.json or results.json that is not one.
    """
    directory = Path(directory)
    file = directory / RUN_FILE
    try:
        content = parse_json(file.read_bytes())
        recipe = content["recipe"]
        stages = [name for name in TRAINED if name in recipe["stages"]]
        data = {name: Path(str(recipe[f"{name}_data"])).name for name in stages if recipe.get(f"{name}_data")}
        found = content.get("data", {})
        data = {name: f"{where} ({found[name]})" if name in found else where for name, where in data.items()}
        hyperparameters = {name: _flat(recipe[name]) for name in stages}
        results_file = directory / "results.json"
        results: list[Mapping[str, Any]] = []
        if results_file.is_file():
            file = results_file
            results = list(parse_json(file.read_bytes(), allow_nan=False)["stages"])
        return ModelCard(
            data=data,
            hyperparameters=hyperparameters,
            results=results,
            recipe=str(recipe["name"]),
            versions={name: str(content["versions"][name]) for name in ("bivec", "torch", "transformers")},
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{file}: not a file of a run of this version ({error!r})") from error


def _flat(stage: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """optim.learning_rate and so on; settings of memory and of what is written down are no hyper-parameters."""
    found: dict[str, Any] = {}
    for name, value in stage.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{name}.")
        elif name not in ("micro_batch_tokens", "save_every", "evaluate_every", "on_bad_line"):
            found[prefix + name] = Path(value).name if name == "init_adapter" and value else value
    return found


def is_ours(file: Path) -> bool:
    """Whether a README.md was written here, and so may be written again."""
    return MARK in file.read_text(encoding="utf-8", errors="replace")


def render_card(
    config: EncoderConfig,
    shape: DecoderConfig,
    origin: Origin,
    card: ModelCard,
    *,
    name: str,
    differences: Sequence[str],
) -> str:
    """The text of the card.

    Args:
        config: of the encoder that is saved.
        shape: of its decoder.
        origin: of its weights.
        card: what else is known.
        name: of the folder.
        differences: in what other libraries differ, see ``sentence_transformers_files``.
    """
    base = card.base_model or origin.base_model
    base = PACKAGED_NAME if base == PACKAGED_MODEL else base
    shown = base and (base if is_hub_id(base) else Path(base).name)
    licence = card.licence or next((known for start, known in LICENCES if (base or "").startswith(start)), None)
    parts = [
        _front_matter(base, licence),
        f"# {card.recipe or name}\n\n{MARK}; delete this line to keep your own text when it is saved again -->",
        _what_it_is(config, shape, shown),
        _usage(config, shape, name),
        _differences(differences),
        _training(origin, card),
        _results(card.results),
        f"## Licence\n\n{licence or SEE_BASE}" + (f" (base model: {shown})." if shown else "."),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(base: str | None, licence: str | None) -> str:
    tags = ("sentence-transformers", "feature-extraction", "sentence-similarity", "transformers", "bivec", "llm2vec")
    lines = ["---", "library_name: sentence-transformers", "pipeline_tag: sentence-similarity"]
    lines += ["tags:", *(f"- {tag}" for tag in tags)]
    lines += [f"base_model: {json.dumps(base)}"] if base and is_hub_id(base) else []
    lines += [f"license: {json.dumps(licence)}"] if licence else []
    return "\n".join([*lines, "---"])


def _what_it_is(config: EncoderConfig, shape: DecoderConfig, base: str | None) -> str:
    mask = "its causal mask" if config.causal else "attention in both directions (`is_causal: false` in config.json)"
    rows = [
        ("base model", base or "not recorded"),
        ("architecture", f"{shape.family.trunk}, {shape.num_layers} layers"),
        ("attention", "causal" if config.causal else "bidirectional"),
        ("pooling", config.pooling + ("" if config.pool_bos else ", without the BOS")),
        ("dimensions", shape.hidden_size),
        ("longest text", f"{config.max_length} tokens"),
        ("template", "none" if config.template is None else f"`{json.dumps(config.template, ensure_ascii=False)}`"),
        ("vectors", "of length 1" if config.normalize else "of any length"),
        ("similarity", config.similarity),
    ]
    table = "\n".join(["|  |  |", "|---|---|", *(_row(name, value) for name, value in rows)])
    return (
        "A text encoder made of a decoder-only language model by the method of LLM2Vec (arXiv 2404.05961), with "
        f"{mask}.\n\n{table}"
    )


def _usage(config: EncoderConfig, shape: DecoderConfig, name: str) -> str:
    causal = "" if config.causal else " --attention non-causal"
    pooling = LLAMA_CPP_POOLINGS.get(config.pooling)
    flags = "" if pooling is None else f" --pooling {pooling}"
    tei = {"cls": "cls", "mean": "mean", "last": "last-token"}.get(pooling or "")
    blocks = [
        "## How to load it",
        (
            f'bivec:\n\n```python\nfrom bivec import Encoder\n\nencoder = Encoder.from_pretrained("{name}")\n'
            'vectors = encoder.encode(["A man plays the guitar.", "Someone makes music."])\n```'
        ),
        (
            "sentence-transformers (5.4 or later, over transformers 5.2 or later):\n\n```python\n"
            f'from sentence_transformers import SentenceTransformer\n\nmodel = SentenceTransformer("{name}")\n'
            'vectors = model.encode(["A man plays the guitar.", "Someone makes music."])\n```'
        ),
        _transformers_block(config, shape, name),
        (
            f'vLLM:\n\n```python\nfrom vllm import LLM\n\nllm = LLM(model="{name}", runner="pooling")\n'
            'outputs = llm.embed(["A man plays the guitar."])\n```'
        ),
    ]
    if tei:
        blocks.append(
            f"Text Embeddings Inference:\n\n```bash\ntext-embeddings-router --model-id {name} --pooling {tei}\n```"
        )
    if pooling:
        blocks.append(
            f'llama.cpp, after `encoder.save_gguf("{name}.gguf")` in bivec:\n\n```bash\n'
            f'llama-embedding -m {name}.gguf{flags}{causal} -p "A man plays the guitar."\n```'
        )
    if not config.causal:
        blocks.append(
            "A server that does not honour `is_causal: false` gives other vectors without a word: compare one with "
            "bivec's or sentence-transformers'."
        )
    return "\n\n".join(blocks)


def _transformers_block(config: EncoderConfig, shape: DecoderConfig, name: str) -> str:
    head, _, tail = (config.template or SLOT).partition(SLOT)
    of_span = config.pooling in ("mean", "weighted_mean")
    attention = attention_elsewhere(shape)
    keyword = "" if attention is None else f', attn_implementation="{attention}"'
    lines = [
        "import torch",
        "from transformers import AutoModel, AutoTokenizer",
        "",
        f'tokenizer, model = AutoTokenizer.from_pretrained("{name}"), AutoModel.from_pretrained("{name}"{keyword})',
        'texts = ["A man plays the guitar.", "Someone makes music."]',
        *([] if config.template is None else [f"head, tail = {head!r}, {tail!r}  # the template"]),
        (
            f"batch = tokenizer({'texts' if config.template is None else '[head + text + tail for text in texts]'}, "
            'padding=True, return_offsets_mapping=True, return_tensors="pt")'
        ),
        "with torch.no_grad():",
        "    hidden = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state",
        *(_mask_lines(config, head) if of_span else []),
        {
            "mean": "vectors = (hidden * mask).sum(1) / mask.sum(1)",
            "weighted_mean": "mask = mask * mask.cumsum(1)\nvectors = (hidden * mask).sum(1) / mask.sum(1)",
            "bos_token": "vectors = hidden[:, 0]",
        }.get(config.pooling, "vectors = hidden[torch.arange(len(hidden)), batch.attention_mask.sum(1) - 1]"),
        *(["vectors = torch.nn.functional.normalize(vectors, dim=-1)"] if config.normalize else []),
    ]
    return "\n".join(["transformers (5.2 or later, which honours `is_causal`):", "", "```python", *lines, "```"])


def _mask_lines(config: EncoderConfig, head: str) -> list[str]:
    """Which tokens are pooled; offsets are of characters, those of special tokens are (0, 0)."""
    lines = ["mask = batch.attention_mask.unsqueeze(-1)"]
    if head and config.skip_instruction:
        begun = "(batch.offset_mapping[..., 1] > len(head)).long().cumsum(1).clamp(max=1)"
        lines.append(f"mask = mask * {begun}.unsqueeze(-1)  # the head is not pooled")
    elif not config.pool_bos:
        lines.append("mask[:, 0] = 0  # the BOS is not pooled")
    if not config.pool_tail:
        lines += [
            f"ends = torch.tensor([[len({'head + text' if config.template else 'text'})] for text in texts])",
            "before, end = batch.offset_mapping.unbind(-1)  # what follows the text is not pooled",
            "mask = mask * ((before < ends) & ((end > 0) | (end.cumsum(1) == 0))).unsqueeze(-1)",
        ]
    return lines


def _differences(differences: Sequence[str]) -> str:
    if not differences:
        return ""
    return "\n".join(["## Where other libraries differ from bivec", "", *(f"* {one}." for one in differences)])


def _training(origin: Origin, card: ModelCard) -> str:
    parts = []
    for stage in dict.fromkeys((*card.data, *card.hyperparameters)):
        rows = [f"### {stage}"]
        rows += [f"Data: {card.data[stage]}."] if stage in card.data else []
        values = card.hyperparameters.get(stage)
        if values:
            rows.append("\n".join(["| setting | value |", "|---|---|", *(_row(*item) for item in values.items())]))
        parts.append("\n\n".join(rows))
    if origin.adapters:
        names = ", ".join(one.name + (" (all weights)" if one.whole else "") for one in origin.adapters)
        parts.append(f"In the weights, in this order: {names}.")
    if card.versions:
        parts.append("Versions: " + ", ".join(f"{name} {version}" for name, version in card.versions.items()) + ".")
    return "\n\n".join(["## Training", *parts]) if parts else ""


def _row(name: str, value: Any) -> str:
    shown = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
    shown = "-" if shown in (None, "") else str(shown).replace("|", "\\|").replace("\n", " ")
    return f"| {name} | {shown} |"


def _results(results: Sequence[Mapping[str, Any]]) -> str:
    if not results:
        return ""
    rows = ["| stage | pooling | STS-B dev | STS-B test |", "|---|---|---|---|"]
    for result in results:
        scores = (result.get(f"sts_{split}_spearman") for split in ("dev", "test"))
        dev, test = ("" if score is None else f"{score:.1f}" for score in scores)
        rows.append(_row(result["stage"], result["pooling"]) + f" {dev} | {test} |")
    return "\n".join(["## Results", "", "Spearman x 100, on the pairs that the run was given.", "", *rows])
