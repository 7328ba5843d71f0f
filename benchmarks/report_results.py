"""The tables and numbers of results/*.md, and all tables by the name that stands in their marker."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any

import coverage_report
import long_run
import mutation
import newcomer
import quick_start
import report_tables as readmes
import round_trips
import supervised_sick
from report_text import RESULTS, Claim, constant, given, measured, result, table

LEFT = "one to the left"
WORD_COLUMNS = [column for task in ("chunking", "POS", "NER") for column in (f"{task}, own tokens", LEFT)]


def compiled(kernels: str) -> str:
    """Attention for sm_90: ours or the peer's."""
    found = result("attention_static_sm_90.json")
    return table(found["columns"], [[_grouped(cell) for cell in row] for row in found[kernels]])


def _grouped(cell: int | str) -> str:
    return f"{cell:,}" if isinstance(cell, int) else cell


def fuzz() -> str:
    """What the readers do with damaged files."""
    found = result("fuzz.json")["readers"]
    counts = ("mutants", "refused", "accepted", "as_it_was", "findings")
    before: Counter[str] = Counter()
    for row in found:
        before.update(row["before"])
    rows = [
        [row["reader"], *(row[key] for key in counts), _kinds(row["before"]), f"{row['cpu_s']:.1f}"] for row in found
    ]
    sums = [sum(row[key] for row in found) for key in counts]
    rows.append(["all", *sums, _kinds(before), f"{sum(row['cpu_s'] for row in found):.0f}"])
    return table(["reader", *(key.replace("_", " ") for key in counts), "before", "CPU s"], rows)


def _kinds(findings: Mapping[str, int]) -> str:
    if not findings:
        return "0"
    kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(findings).most_common())
    return f"{sum(findings.values())} ({kinds})"


def simcse_search() -> str:
    """Steps and batches of SimCSE for the quick start."""
    pairs = [readmes.rows_of(f"stsb_{split}.csv.gz") for split in ("dev", "test")]
    head = ["MNTP steps", "SimCSE", "dev", "test", f"dev, all {pairs[0]:,}", f"test, all {pairs[1]:,}"]
    return table(head, result("quick_start_search.json")["simcse"]["rows"])


def long_run_search() -> str:
    """SimCSE of 64 sentences, for the long run: what was tried beside the first row's settings."""
    usual, *others = result("long_run_search.json")["rows"]
    rows = [["40 steps of the quick start's: Wikipedia, 1e-3, dropout 0.3, scale 20", *_both_sets(usual)]]
    for row in others:
        changed = [f"{row['sentences']}, {row['order']}" if row["order"] != "drawn" else row["sentences"]]
        names = {"steps": "steps", "learning_rate": "rate", "attention_dropout": "dropout", "scale": "scale"}
        changed += [f"{name} {row[key]:g}" for key, name in names.items() if row[key] != usual[key]]
        rows.append([", ".join([*changed, *(() if row["pool_bos"] else ("BOS not pooled",))]), *_both_sets(row)])
    return table(["", "dev", "test"], rows)


def _both_sets(row: Mapping[str, Any]) -> list[str]:
    return [f"{row[split]:.1f}" for split in ("dev", "test")]


def mntp_search() -> str:
    """Blocks of MNTP for the quick start; one run failed, and is bold."""
    rows = result("quick_start_search.json")["mntp"]["rows"]
    cells = [
        [blocks, rate, seed, f"**{dev}**" if (rate, dev < 10) == ("3e-3", True) else dev, after or "not run"]
        for blocks, rate, seed, dev, after in rows
    ]
    return table(["blocks", "rate", "seed", "dev after MNTP", "after 45 x 32 of SimCSE"], cells)


def word_trend() -> str:
    """Bi, Uni and Bi+MNTP on the test sets."""
    scores = {(o["model"], o["task"], o["alignment"]): o for o in result("word_trend_cpu.json")["scores"]}
    columns = [(task, read) for task in ("chunking", "pos", "ner") for read in ("same_token", "next_token")]
    states = {"uni": "Uni", "bi": "Bi, no training", "bi+mntp": "Bi+MNTP: all weights, bf16, 3e-4, 30 %, 300 steps"}
    rows = [[name, *(_word(scores[(state, *column)]) for column in columns)] for state, name in states.items()]
    return table(["state", *WORD_COLUMNS], rows)


def _word(score: Mapping[str, Any]) -> str:
    return _accuracy([score["accuracy"]] if score["task"] == "pos" else [score["accuracy"], score["f1"]])


def _accuracy(found: Sequence[float]) -> str:
    return f"{found[0]:.2f}" + (f" ({found[1]:.1f})" if len(found) > 1 else "")


def word_search() -> str:
    """The same on sentences held out of the training data, for every MNTP that was tried."""
    rows = result("word_trend_search.json")["rows"]
    keys = [f"{task}{read}" for task in ("chunking", "pos", "ner") for read in ("", "_left")]
    cells = [
        [row["mntp"], *(_accuracy(row[key] if isinstance(row[key], list) else [row[key]]) for key in keys)]
        for row in rows
    ]
    return table(["MNTP", *WORD_COLUMNS], cells)


def reproduction(text: str) -> str:
    """results/reproduce/report.md: as the engine writes it of the parts; date and versions are the run's."""
    from bivec.engine.evaluation.parts import Part
    from bivec.engine.evaluation.study import Study
    from bivec.engine.evaluation.study_report import study_report

    kept = {name: result(f"reproduce/{name}.json") for name in readmes.PARTS}
    parts = {name: Part(name, part["data"], part["seconds"], reused=True) for name, part in kept.items()}
    sentences = int(kept["words"]["settings"]["data"]["ud_ewt"][0].split(" sentences")[0])
    notes = Study.notes(SimpleNamespace(pairs=None, sentences=sentences))
    images = [path.name for path in (RESULTS / "reproduce").glob("*.png")]
    whole = study_report("llm2vec-smollm2-135m", parts, images, notes).splitlines(keepends=True)
    last = "## Time\n"
    run = result("reproduce/clock.json")
    # when, and with what
    whole[2] = re.sub(r"\d+ threads", f"{run['threads']} threads", text.splitlines(keepends=True)[2])
    clock = table(["part", "minutes"], [[part, f"{spent:.1f}"] for part, spent in run["minutes"].items()])
    return f"{''.join(whole[: whole.index(last)])}{last}\n{clock}\n"


TABLES: dict[str, Callable[[], str]] = {
    name: cache(make)
    for name, make in {
        "long run": readmes.long_run,
        "quick start": readmes.quick_start,
        "newcomer": readmes.newcomer,
        "speed": readmes.speed,
        "evaluations": readmes.evaluations,
        "losses": readmes.losses,
        "recipes": readmes.recipes,
        "cards": readmes.cards,
        "recomputation": readmes.recomputation,
        "samples": readmes.samples,
        "attention": lambda: compiled("bivec"),
        "attention of fla-core": lambda: compiled("fla-core"),
        "fuzz": fuzz,
        "simcse search": simcse_search,
        "long run search": long_run_search,
        "mntp search": mntp_search,
        "word trend": word_trend,
        "word search": word_search,
    }.items()
}
# files that a script writes whole: the text as it should be, of the text as it is
WHOLE: dict[str, Callable[[str], str]] = {
    "benchmarks/results/coverage.md": lambda _: coverage_report.markdown(result("coverage.json")),
    "benchmarks/results/long_run.md": lambda _: long_run.page(result("long_run.json")),
    "benchmarks/results/mutation.md": lambda _: mutation.markdown(result("mutation.json")),
    "benchmarks/results/newcomer.md": lambda _: newcomer.table(result("newcomer.json")),
    "benchmarks/results/quick_start.md": lambda _: quick_start.report(result("quick_start.json")),
    "benchmarks/results/round_trips.md": lambda _: round_trips.markdown(result("round_trips.json")),
    "benchmarks/results/supervised_sick.md": lambda _: supervised_sick.report(result("supervised_sick.json")),
    "benchmarks/results/reproduce/report.md": reproduction,
}


def fuzz_text() -> Iterator[Claim]:
    """results/fuzz.md."""
    file, found = "fuzz.json", result("fuzz.json")
    yield measured(file, "do with {:,} mutants", sum(row["mutants"] for row in found["readers"]))
    yield measured(file, "seed {}, one process", found["seed"])
    yield measured(file, "CI reads {:,} with the same seed", found["ci_mutants"])
    worker = "tests/fuzz/worker.py"
    yield measured(worker, "a hang ({:.0f} s of CPU time)", constant(worker, r"CPU_SECONDS = ([\d.]+)"))
    allowed, peak = (constant(worker, rf"{name}_BYTES = (\d+) << 30") for name in ("ALLOWED", "PEAK"))
    yield measured(worker, "memory ({:.0f} GiB more than at the start, or a peak of {:.0f} GiB)", allowed, peak)
    inputs = "what was in a damaged file"
    yield from given(inputs, "2^31 layers", "a head count of 0", "an id of 2^31", "2^40 values", "200,000 separators")
    yield from given(
        inputs, "nested 20,000 deep", "a key that is there twice the last", "and half of an optimiser's state"
    )


def quick_start_search() -> Iterator[Claim]:
    """results/quick_start_search.md."""
    from bivec.engine.presets import SMOLLM2_135M

    file, found = "quick_start_search.json", result("quick_start_search.json")
    settings = "settings of the trials"
    yield from given(
        settings, "STS-B Spearman x 100", "first 500 pairs", "LoRA r = 16, alpha = 32", "MNTP at 3e-3 with 35 %"
    )
    yield from given(
        settings, "SimCSE at 1e-3", "dropout 0.3 and scale 20, 10 % warm-up", "blocks of 32", "blocks of 64"
    )
    yield from given(settings, "because of seed 43", "(seed 42, MNTP on 16 blocks of 64)", "(40 steps of 1,024 tokens)")
    yield from given(settings, "in a block of 64", "is a 64th of")
    mntp, simcse = SMOLLM2_135M.mntp, SMOLLM2_135M.simcse
    steps = mntp.optim.steps, mntp.batch_size, mntp.sequence_length, simcse.optim.steps, simcse.batch_size
    yield measured("engine/presets.py", "{} MNTP steps of {} x {} and {} SimCSE steps of {}, which", *steps)
    yield from given(settings, "a third of the 15 minutes", "(LoRA 5e-4, 20 %, no BOS)", "LoRA at 3e-3 with a BOS")
    yield from given(settings, "full weights at 3e-4 without BOS", "On seed 43, dev at 10, 20, 30, 40 steps")
    yield from given(settings, "failed, at half the rate too", "blocks of 32 (twice as many a step)")
    alone = found["dev_after_mntp_alone"]
    yield measured(file, "(dev after MNTP alone: 30 steps {:.1f}, 45 steps {:.1f})", alone["30"], alone["45"])
    norms = found["norms"]
    yield measured(file, "reaches a norm of {:,} where other tokens have {}", norms["sink"], norms["other"])
    yield measured(file, "such a sink (norm {:,})", norms["failed"])
    yield measured(file, "40 steps: {}, {}, {}, {} in the", *found["seed_43_blocks_of_32"].values())
    earlier = found["earlier"]
    yield measured(file, "reached {} on dev after {:.0f}k", earlier["paper"], earlier["paper_tokens"] / 1e3)
    yield measured(file, "without BOS {}; LoRA", earlier["full_weights_without_bos"])
    yield measured(file, "with a BOS in front {}. The", earlier["lora_with_bos"])


def long_run_trials() -> Iterator[Claim]:
    """results/long_run_search.md."""
    settings = "settings of the trials"
    yield from given(settings, "Spearman x 100", "seed 42", "with 64 sentences a step", "in 40 steps")
    yield from given(settings, "was to fill two hours", "because 1e-3 had lost", "more than the first 100 steps")
    yield from given(settings, "at 1e-3 as in", "Twice the batch", "A third of the rate", "Half the scale")
    file, found = "long_run.json", result("long_run.json")
    losses = {
        row["attention_dropout"]: row["mean_loss_of_the_last_ten_steps"]
        for row in result("long_run_search.json")["rows"]
        if row["sentences"] == "all that ship" and (row["scale"], row["pool_bos"], row["steps"]) == (20, True, 40)
        if row["learning_rate"] == 1e-3
    }
    text = "the last ten of 40 steps was {:.3f} with dropout 0.3 and {:.3f} with 0.5"
    yield measured("long_run_search.json", text, losses[0.3], losses[0.5])
    first = result("long_run_search.json")["first_long_run"]
    text = "of {:.1f} hours with {} steps of SimCSE and {} of the supervised stage"
    yield measured(
        "long_run_search.json", text, first["seconds"] / 3600, first["simcse_steps"], first["supervised_steps"]
    )
    text = "dev {:.1f} after 100 of its steps, then {:.1f}, {:.1f} and {:.1f} every 100 steps"
    yield measured("long_run_search.json", text, *(one["sts_dev_spearman"] for one in first["evaluations"]))
    text = "and test {:.1f} before the last stage and {:.1f} after"
    yield measured("long_run_search.json", text, *_around_supervised(first, "test"))
    settings = found["settings"]
    text = "{} and {} steps, with 3e-4"
    yield measured(file, text, *(settings[stage]["optim"]["steps"] for stage in ("simcse", "supervised")))
    scores = [one["sts_dev_spearman"] for one in found["evaluations"]]
    text = "dev {:.1f} after 100 steps of SimCSE, then {:.1f}, {:.1f}, {:.1f} and {:.1f} every 100 steps"
    yield measured(file, text, *scores)
    test = _around_supervised(found, "test")
    yield measured(file, "and test {:.1f} before the supervised stage and {:.1f} after", *test)
    yield measured(file, "missed it by {:.1f}", AIM - test[0])
    yield from given("the paper's S-LLaMA-1.3B", f"test score above the {AIM}")
    pairs = {split: (_around_supervised(first, split), _around_supervised(found, split)) for split in ("dev", "test")}
    lost = [ours[0] - ours[1] for ours, _ in pairs.values()]
    yield measured("long_run_search.json", "had lost {:.1f} on dev and {:.1f} on test", *lost)
    apart = [abs(ours[0] - theirs[0]) for ours, theirs in pairs.values()]
    yield measured(file, "and end {:.1f} apart on dev and {:.1f} on test", *apart)


AIM = 73.4  # issue 10: what the paper reports for S-LLaMA-1.3B


def _around_supervised(run: Mapping[str, Any], split: str) -> list[float]:
    scores = {one["stage"]: one[f"sts_{split}_spearman"] for one in run["stages"]}
    return [scores["bi+mntp+simcse"], scores["bi+mntp+simcse+supervised"]]


def word_trend_text() -> Iterator[Claim]:
    """results/word_trend.md: what is read off its tables and the paper's."""
    file, found = "word_trend_cpu.json", result("word_trend_cpu.json")
    own, left = found["accuracy"]["at their own tokens"], found["accuracy"]["after MNTP one to the left"]
    yield from _paper_words()
    (ewt_train, ewt_test), (ner_train, ner_test) = found["words"]["ud_ewt"], found["words"]["wnut17"]
    yield measured(file, "({:,} words to train on, {:,} to test)", ewt_train, ewt_test)
    yield measured(file, "WNUT-17 ({:,} and {:,})", ner_train, ner_test)
    text = "{:.2f} < {:.2f} < {:.2f}"
    yield measured(file, f"Bi < Uni < Bi+MNTP** ({text}), read", *(own["pos"][s] for s in ("bi", "uni", "bi+mntp")))
    chunking = own["chunking"]["bi"], own["chunking"]["uni"], left["chunking"]["bi+mntp"]
    yield measured(file, f"where the paper reads it ({text})", *chunking)
    yield measured(file, f"beyond noise** ({text})", *(own["ner"][s] for s in ("bi", "uni", "bi+mntp")))
    names = readmes.opened("wnut17_test.conll.gz").splitlines()
    tagged = [line.split("\t")[1] for line in names if "\t" in line]
    yield measured("wnut17_test.conll.gz", "names: {:.0f} % of the words", 100 * tagged.count("O") / len(tagged))
    scores = {
        one["model"]: one
        for one in result("reproduce/words.json")["data"]["scores"]
        if (one["task"], one["alignment"]) == ("ner", "same_token")
    }
    ner = [scores[state][key] for key in ("accuracy", "f1") for state in ("uni", "bi+mntp")]
    yield measured("reproduce/words.json", "ahead there ({:.2f} < {:.2f}, F1 {:.1f} < {:.1f}, on", *ner)
    yield from _word_trials()


def _paper_words() -> Iterator[Claim]:
    from bivec.engine.evaluation.paper import paper_rows

    rows = {one.variant: one.scores for one in paper_rows("4", model="S-LLaMA-1.3B")}
    for task in ("POS", "NER"):
        figures = [rows[state][task.lower()] for state in ("bi", "uni", "bi+mntp")]
        yield measured("engine/evaluation/data/paper.json", f"{task} {{:.2f}} < {{:.2f}} < {{:.2f}}", *figures)


def _word_trials() -> Iterator[Claim]:
    """results/word_trend.md: of the trials."""
    file, found = "word_trend_search.json", result("word_trend_search.json")
    held = found["held_out"]
    ewt, ner = held["ud_ewt"], held["wnut17"]
    text = "{:,} sentences of the training file, scored on the {} others ({:,} words)"
    yield measured(file, text, ewt["train_sentences"], ewt["test_sentences"], ewt["words"])
    text = "NER: {:,} training sentences, {} of the dev set ({:,} words)"
    yield measured(file, text, ner["train_sentences"], ner["test_sentences"], ner["words"])
    text = "mean loss of steps 41 to 60 at 20 % masked {:.2f} (3e-4, of 60 steps), {:.2f} (1e-4, of 60), LoRA "
    yield measured(file, text + "at 3e-3 {:.2f} (of 160", *found["mean_loss_of_steps_41_to_60"].values())
    rows = {row["mntp"]: row for row in found["rows"]}
    longest, short = rows["all weights, bf16, 3e-4, 30 %, 300 steps"], rows["all weights, 3e-4, 20 %, 60 steps"]
    text = "chunking ({:.2f} after {:.2f}) and NER ({:.2f} after {:.2f})"
    yield measured(file, text, *(row[task][0] for task in ("chunking", "ner") for row in (longest, short)))
    hours = 16e6 / found["tokens_per_s"] / 3600
    yield measured(file, "would take {:.0f} hours at the {} tokens/s seen", hours, found["tokens_per_s"])
    parts = [
        "Uni {} ({}), Bi {} ({}), LoRA BERT-style 35 % at 3e-3 for 40 steps {} ({}), at 1e-3 {} ({}), all-mask",
        "at 3e-3 {} ({}), for 120 steps {} ({}), 20 % at 3e-3 for 160 steps {} ({})",
    ]
    yield measured(file, " ".join(parts), *(score for pair in found["earlier_pos"].values() for score in pair))
    yield measured(file, "Bi+MNTP by {} in POS", found["uni_ahead_in_pos_at_the_papers_rate"])
    settings = "settings of the trials"
    yield from given(
        settings, "on 1,500 sentences to train on", "Token accuracy x 100", "blocks of 32 tokens, 1,024 tokens"
    )
    yield from given(settings, "LoRA at 3e-3 for longer", "all weights 300 steps (bf16, 30 %) beat 60 (fp32, 20 %)")
    yield from given(
        settings, "position i - 1", "after 300,000 tokens", "The paper's 16 million tokens", "on 500 + 400"
    )
    yield from given(settings, "rate for it (5e-4", "on 25,000 words")


RESULT_CLAIMS: dict[str, Callable[[], Iterator[Claim]]] = {
    "benchmarks/results/fuzz.md": fuzz_text,
    "benchmarks/results/long_run_search.md": long_run_trials,
    "benchmarks/results/quick_start_search.md": quick_start_search,
    "benchmarks/results/word_trend.md": word_trend_text,
}
