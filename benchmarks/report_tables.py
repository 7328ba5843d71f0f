"""The tables of the READMEs, each out of results/*.json, the presets or the samples: a function makes one."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from report_text import result, table

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "recipes" / "data"
MIB, GIB = 2**20, 2**30
OURS, PEER = "bivec", "transformers + peft"
SBERT = "sentence-transformers"
RECOMPUTING, KEPT = PEER, f"{PEER}, kept"
TARGET = 0.4  # of a card's bf16 peak


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation; without the second where all are the same."""
    return f"{mean(values):.1f} ± {stdev(values):.1f}" if stdev(values) else f"{mean(values):.1f}"


def stage_scores(stage: str, split: str) -> list[float]:
    """Of the quick start, one a seed."""
    runs = result("quick_start.json")["runs"]
    return [s[f"sts_{split}_spearman"] for run in runs for s in run["stages"] if s["stage"] == stage]


STAGES = (  # name, in words, pooling
    ("uni", "decoder as it is (`uni`)", "mean"),
    ("uni weighted-mean", "decoder, the best causal pooling", "weighted mean"),
    ("bi", "bidirectional attention (`bi`)", "mean"),
    ("bi+mntp", "+ MNTP", "mean"),
    ("bi+mntp+simcse", "+ SimCSE", "mean"),
)


def long_run() -> str:
    """STS-B by stage of the long run, on all pairs; beside it the quick start's last stage."""
    scores = {one["stage"]: one for one in result("long_run.json")["stages"]}
    rows = []
    for stage, what, pooling in (*STAGES, ("bi+mntp+simcse+supervised", "+ supervised (SICK)", "mean")):
        bold = "**" if stage == "bi+mntp+simcse" else ""
        found = [f"{bold}{scores[stage][f'sts_{split}_spearman']:.1f}{bold}" for split in ("dev", "test")]
        rows.append([f"{bold}{what}{bold}", pooling, *found])
    short = [spread([one[split] for one in result("quick_start_whole_sets.json")]) for split in ("dev", "test")]
    rows.append(["+ SimCSE, of the quick start (three seeds)", "mean", *short])
    return table(["stage", "pooling", "dev", "test"], rows)


def quick_start() -> str:
    """STS-B by stage."""
    rows = []
    for stage, what, pooling in STAGES:
        bold = "**" if stage == "bi+mntp+simcse" else ""
        scores = [f"{bold}{spread(stage_scores(stage, split))}{bold}" for split in ("dev", "test")]
        rows.append([f"{bold}{what}{bold}", pooling, *scores])
    return table(["stage", "pooling", "dev", "test"], rows)


def newcomer() -> str:
    """The seconds from ``git clone`` to the finished quick start."""
    found = result("newcomer.json")
    rows = [[step["step"], f"{step['seconds']:.0f}"] for step in found["steps"]]
    return table(["step", "seconds"], [*rows, ["**all**", f"**{found['seconds']:.0f}**"]])


def speed() -> str:
    """A training step and encoding, against the peers."""
    steps, encoding = result("train_step_cpu.json"), result("encode_cpu.json")
    lengths = {"mntp": f"MNTP, {{batch}} x {steps['sequence_length']}", "simcse": "SimCSE, {batch} sentences"}
    rows = []
    for stage, label in lengths.items():
        found = steps["stages"][stage]
        sides = [found["sides"].get(side) for side in (OURS, RECOMPUTING, KEPT)]
        rows.append(
            [label.format(batch=found["batch"]), *("not run" if side is None else _step(side) for side in sides)]
        )
    version = encoding["peer"]["version"]
    for name, found in encoding["workloads"].items():
        order = "" if name == "one call" else "given order, "
        ours, theirs = (found["sides"][side]["sentences_per_s"] for side in (OURS, SBERT))
        peer = f"{SBERT} {version}: {theirs:.1f} ({found['ours_is_faster_by']:.2f} x)"
        rows.append([f"encoding STS-B sentences, {order}{name}", f"{ours:.1f} sentences/s", peer, None])
    return table(["", OURS, "as the original", "keeping activations"], rows)


def _step(side: dict[str, Any]) -> str:
    rate, memory = f"{side['tokens_per_s']:.0f} tokens/s", f"{side['peak_bytes'] / MIB:,.0f} MiB"
    if side["ours_is_faster_by"] is None:
        return f"{rate}, {memory}"
    return f"{rate} ({side['ours_is_faster_by']:.2f} x), {memory} ({side['ours_is_smaller_by']:.1f} x)"


PARTS = ("pooling", "tasks", "words", "prefixes", "masks", "curves")  # of recipes/reproduce.py, that write a file
STATES = ("uni", "echo", "bi", "bi+mntp", "bi+mntp+simcse", "uni+simcse", "bi+simcse")


def evaluations() -> str:
    """The paper's evaluations by state of the quick start's run."""
    data = {name: result(f"reproduce/{name}.json")["data"] for name in ("pooling", "tasks", "words", "prefixes")}
    pooled = {(one["variant"], one["pooling"]): one["spearman"] for one in data["pooling"]["scores"]}
    words = {(o["model"], o["task"]): o for o in data["words"]["scores"] if o["alignment"] == "same_token"}
    kinds: list[tuple[str, Callable[[str], str | None]]] = [
        ("STS-B test, all pairs, mean", lambda state: _one(pooled.get((state, "mean")))),
        ("the same, weighted mean", lambda state: _one(pooled.get((state, "weighted_mean")))),
        ("the same, EOS", lambda state: _one(pooled.get((state, "eos_token")))),
        (
            "a small retrieval task, nDCG@10",
            lambda state: _one(data["tasks"]["scores"].get(state, {}).get("LocalRetrieval")),
        ),
        ("POS (UD-EWT), accuracy at own tokens", lambda state: _word(words.get((state, "pos")), "accuracy")),
        (
            "NER (WNUT-17), accuracy, F1 at own tokens",
            lambda state: _word(words.get((state, "ner")), "accuracy", "f1"),
        ),
        ("does a prefix know what follows? AUC", lambda state: f"{data['prefixes']['auc'][state] / 100:.2f}"),
    ]
    return table(["", *STATES], [[name, *map(cell, STATES)] for name, cell in kinds])


def _one(score: float | None) -> str | None:
    return None if score is None else f"{score:.1f}"


def _word(score: dict[str, float] | None, *keys: str) -> str | None:
    return None if score is None else ", ".join(f"{score[key]:.1f}" for key in keys)


def losses() -> str:
    """Gradient error on a nearly solved batch in bf16, and memory in fp32."""
    found = result("losses_cpu.json")
    errors = {
        (one["loss"], one["scale"], one["implementation"]): 100 * one["gradient_error"]
        for one in found["errors"]
        if one["dtype"] == "bf16" and one["batch"] == "solved"
    }
    memory = {(o["loss"], o["rows"], o["columns"], o["implementation"]): o["peak_bytes"] / MIB for o in found["rows"]}
    rows = []
    for loss, name, scales, sides in (
        ("info_nce", "scale", (20, 50, 100), (OURS, "torch", SBERT)),
        ("linear_cross_entropy", "logits x", (1, 5, 20), (OURS, "torch")),
    ):
        sizes = sorted({(rows, columns) for of, rows, columns, _ in memory if of == loss})
        for index, (scale, (count, columns)) in enumerate(zip(scales, sizes, strict=True)):
            units = ("pairs",) if loss == "info_nce" else ("rows, V =",)
            size = f"{count:,}" if index else f"{count:,} {units[0]}"
            if loss != "info_nce":
                size += f" {columns:,}" if index == 0 else f", {columns:,}"
            error = [f"{_two(errors[loss, scale, side])} %" for side in sides]
            bytes_ = [_two(memory[loss, count, columns, side]) for side in sides]
            bytes_[0] += f" ({size})"
            missing = [None] * (3 - len(sides))
            rows.append([f"`{loss}`, {name} {scale}", *error, *missing, *bytes_, *missing])
    head = "gradient error, solved batch: ours"
    cached = "sentence-transformers' cached loss"
    return table(["loss", head, "torch, bf16 logits", cached, "memory, MiB: ours", "torch", "cached loss"], rows)


def _two(value: float) -> str:
    """At least two digits."""
    return f"{value:.2f}" if value < 1 else f"{value:.1f}" if value < 10 else f"{value:,.0f}"


def recipes() -> str:
    """The settings of the presets."""
    from bivec.engine.presets import LLAMA_2_7B, LLAMA_3_8B, MISTRAL_7B, SHEARED_LLAMA_1B, SMOLLM2_135M

    small, paper, mistral = (one.mntp for one in (SMOLLM2_135M, SHEARED_LLAMA_1B, MISTRAL_7B))
    hub, same = "WikiText-103, Wiki1M (hub)", "the same"
    rows = [
        ("llm2vec_smollm2.py", "SmolLM2-135M", SMOLLM2_135M, f"{_share(small)}, tuned for minutes on a CPU", None),
        (
            "llm2vec_sheared_llama.py",
            "Sheared-LLaMA-1.3B",
            SHEARED_LLAMA_1B,
            f"the paper's: {_share(paper)}, {paper.optim.steps:,} x {paper.batch_size} x {paper.sequence_length}",
            hub,
        ),
        ("llm2vec_llama2.py", "Llama-2-7b-chat", LLAMA_2_7B, same, same),
        ("llm2vec_llama3.py", "Meta-Llama-3-8B-Instruct", LLAMA_3_8B, same, same),
        ("llm2vec_mistral.py", "Mistral-7B-Instruct-v0.2", MISTRAL_7B, f"the paper's: {_share(mistral)}", same),
    ]
    return table(
        ["recipe", "model", "MNTP", "SimCSE", "data"],
        [
            [f"`{script}`", model, mntp, f"batch {preset.simcse.batch_size}", data or "ships with bivec"]
            for script, model, preset, mntp, data in rows
        ],
    )


def _share(stage: Any) -> str:
    style = {"bert": "BERT-style", "all_mask": "all-mask"}[stage.mask_style]
    return f"{100 * stage.mask_probability:.0f} % {style}"


def cards() -> str:
    """Predicted memory, disk and hours of the paper's recipes."""
    from attention import BF16_PEAKS

    from bivec.engine.checkpoint import KEPT as CHECKPOINTS
    from bivec.engine.estimate import estimate_stage
    from bivec.engine.presets import LLAMA_2_7B, LLAMA_3_8B, MISTRAL_7B, SHEARED_LLAMA_1B

    rows = []
    for script, preset in (
        ("llm2vec_sheared_llama.py", SHEARED_LLAMA_1B),
        ("llm2vec_llama2.py", LLAMA_2_7B),
        ("llm2vec_llama3.py", LLAMA_3_8B),
        ("llm2vec_mistral.py", MISTRAL_7B),
    ):
        shape = preset.shape
        costs = [estimate_stage(shape, stage, 2, "cuda") for stage in (preset.mntp, preset.simcse)]
        memory = [cost.memory_bytes for cost in costs]
        card = next(size for size in (24, 80) if max(memory) < size * 1e9)
        adapter = 4 * costs[0].trainable_parameters
        # weights and the merged trunk; of both stages the adapter, and checkpoints with it and AdamW's two moments
        disk = 2 * (shape.num_parameters(lm_head=True) + shape.num_parameters()) + 2 * (1 + 3 * CHECKPOINTS) * adapter
        steps = (preset.mntp.optim.steps, preset.simcse.optim.steps)
        flops = sum(count * cost.flops_per_step for count, cost in zip(steps, costs, strict=True))
        hours = [f"{flops / (TARGET * BF16_PEAKS[gpu] * 1e12) / 3600:.1f} h" for gpu in ("A100", "H100")]
        sizes = [f"{size / GIB:.0f} GiB" for size in memory]
        rows.append([f"`{script}`", *sizes, f"{card} GB", f"{disk / 1e9:.0f} GB", *hours])
    return table(["recipe", "MNTP", "SimCSE", "card", "disk", "A100", "H100"], rows)


def recomputation() -> str:
    """Bytes that a layer of Mistral-7B keeps a token."""
    from bivec.engine.estimate import setting_of
    from bivec.engine.planner import kept_per_token
    from bivec.engine.presets import MISTRAL_7B

    setting = setting_of(MISTRAL_7B.shape, MISTRAL_7B.mntp, 2, "cuda")
    again = {
        "none": "nothing",
        "selective": "outputs of the norms, gated product; no matrix product",
        "layer": "the layer",
    }
    kept = "kept of a layer, Mistral-7B in bf16 on Triton, a token (computed: `kept_per_token` in `engine/planner.py`)"
    return table(
        ["recomputation", kept, "computed again"],
        [[f"`{level}`", f"{kept_per_token(setting, level) / 1e3:.0f} kB", what] for level, what in again.items()],
    )


def opened(name: str) -> str:
    """The text of a sample."""
    raw = (DATA / name).read_bytes()
    return (gzip.decompress(raw) if name.endswith(".gz") else raw).decode()


def rows_of(name: str) -> int:
    """Texts, pairs, sentences or triples of a sample."""
    lines = opened(name).splitlines()
    if ".conll" in name:
        return sum(bool(line) and not before for before, line in zip(["", *lines], lines, strict=False))
    return sum(map(bool, lines)) - name.startswith("stsb")  # its header


def words_of(name: str) -> str:
    """Words of a sample, in thousands."""
    text = opened(name)
    count = sum("\t" in line for line in text.splitlines()) if ".conll" in name else len(text.split())
    return f"{count / 1e3:.1f}k words"


def samples() -> str:
    """What ships: rows, size and words are counted."""
    sts = "STS benchmark, English, dev: `sentence1,sentence2,score` with this header, score 0 to 5, original order"
    ewt = "UD English EWT, its *dev* file: word number, form, UPOS, XPOS, head and relation in CoNLL-U's ten columns; "
    ewt += "{words}"
    triples = (
        "our own writing, made for bivec (Apache-2.0 as the code): a prefix of under ten words and three ways to go "
        "on, ten words at least, of which `query` and `positive` mean the same and `negative` does not"
    )
    tokens = f"{result('samples.json')['tokens'] / 1e3:.0f}k SmolLM2 tokens"
    wikitext = f"paragraphs of WikiText-2 (validation, then test), detokenised, one a line; {{words}}, {tokens}"
    sentences = "different sentences of the same text, 6 to 60 words, one a line; {words}"
    rows = [
        ("wikitext2_paragraphs.txt.gz", "MNTP", wikitext),
        ("wikipedia_sentences.txt.gz", "SimCSE", sentences),
        ("stsb_dev.csv.gz", "evaluation", sts),
        ("stsb_test.csv.gz", "evaluation", "the same, test"),
        ("ud_ewt_train.conllu.gz", "word tasks (POS, chunking)", ewt),
        ("ud_ewt_test.conllu.gz", "word tasks", "the same, its test file; {words}"),
        ("wnut17_train.conll.gz", "word tasks (NER)", "WNUT-17, training: word, tab, BIO label; {words}"),
        ("wnut17_dev.conll.gz", "word tasks", "the same, development; {words}"),
        ("wnut17_test.conll.gz", "word tasks", "the same, test; {words}"),
        ("future_token_triples.jsonl", "future-token test", triples),
    ]
    return table(
        ["file", "used for", "content", "rows", "size"],
        [
            [
                f"`{name}`",
                use,
                content.format(words=words_of(name)),
                f"{rows_of(name):,}",
                f"{(DATA / name).stat().st_size / 1e3:.0f} kB",
            ]
            for name, use, content in rows
        ],
    )
