"""The numbers in the READMEs' text: each with the file or the code that has its value, or why it needs none."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from statistics import mean, stdev

from report_tables import (
    GIB,
    MIB,
    OURS,
    PARTS,
    ROOT,
    TARGET,
    rows_of,
)
from report_text import Claim, constant, given, measured, result

NAMES = "names of models, data and licences"
TOLERANCES = "a bound that the tests hold"
QWEN, GEMMA = "Qwen 2 and 3", "Gemma 1 to 3"
SPELLED_OUT = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
PAIRS = {split: rows_of(f"stsb_{split}.csv.gz") for split in ("dev", "test")}


def bound(value: float, decimals: int = 0) -> float:
    """Rounded up: what stands in a "within"."""
    return math.ceil(value * 10**decimals) / 10**decimals


def readme() -> Iterator[Claim]:
    """README.md."""
    yield from quick_start()
    yield from versions()
    yield from evaluations()
    yield from given(NAMES, QWEN, GEMMA, "Gemma 2's", "hold at 135M", "LLaMA (1 to 3.x", "SmolLM 1 and 2")
    yield from given(NAMES, "Qwen 2, 2.5 and 3", "Gemma 1, 2 and 3", "Gemma 3 its", "(2024)")
    yield from given(NAMES, "CC BY-SA 3.0", "CC BY-SA 4.0", "CC BY 4.0", "a 4-bit GGUF file")
    yield from given("engine/cli: exit codes", "0 for done, 1 for failed, 2 for wrong usage, 130 after Ctrl-C")
    yield of_two_processes()
    yield from given("units", "Spearman x 100")
    yield from given(".ci/run: what its environments take", "some 6 GB")
    steps = result("train_step_cpu.json")["stages"]
    off = max(stage["losses"]["largest_relative_difference"] for stage in steps.values())
    count = len(steps["mntp"]["losses"][OURS])
    yield measured("train_step_cpu.json", "agree within {:.2f} % over {} steps", bound(100 * off, 2), count)
    yield supervised_preset()
    yield from hard_operands()


def faq() -> Iterator[Claim]:
    """FAQ.md."""
    yield from given(NAMES, QWEN, GEMMA, "a 7B model")
    yield measured("setup.py", "transformers ≥ {}", oldest()["transformers"])
    yield from given("an example of --set supervised.margin", "positive's - 0.05")
    yield mteb_tasks()


def quick_start() -> Iterator[Claim]:
    """What the quick start costs and gives."""
    from bivec.engine.presets import SMOLLM2_135M

    file, runs = "quick_start.json", result("quick_start.json")["runs"]
    minutes, memory = (max(run[key] for run in runs) for key in ("seconds", "peak_memory_bytes"))
    yield measured(file, "takes {:.0f} minutes and {:.1f} GiB", minutes / 60, memory / GIB)
    yield measured("engine/recipe.py: eval_pairs", "first {} pairs", SMOLLM2_135M.eval_pairs)
    yield from given("the first of two commands", "Command 1 takes")
    yield measured("recipes/data", "all {:,} and {:,} pairs", *PAIRS.values())
    installs = [step["packages"] for step in result("newcomer.json")["steps"] if "packages" in step]
    found = [sum(one[key] for one in installs) for key in ("on_disk", "downloaded")]
    yield measured("newcomer.json", "pip had {} of {} packages, torch", found[0], sum(found))
    seconds = result("long_run.json")["readings"][-1]["seconds"]
    yield measured("long_run.json", "triples, {:.1f} hours", seconds / 3600)
    file, encoders = "quick_start_whole_sets.json", result("quick_start_whole_sets.json")
    dev, test = ([one[split] for one in encoders] for split in ("dev", "test"))
    text = "{:.1f} ± {:.1f} dev and {:.1f} ± {:.1f} test"
    yield measured(file, text, mean(dev), stdev(dev), mean(test), stdev(test))


def supervised_preset() -> Claim:
    """The paper's supervised training."""
    from bivec.engine.presets import SUPERVISED

    stage = SUPERVISED.supervised
    text = "the paper's: {} triples, {:,} steps"
    return measured("engine/presets.py: SUPERVISED", text, stage.batch_size, stage.optim.steps)


def of_two_processes() -> Claim:
    """How close two processes are to one."""
    file = "tests/engine/test_ranks.py"
    tolerance = constant(file, r'TOLERANCE = \{"float64": ([\d.e-]+)')
    return measured(file, "float64 to {:.0e} with two processes", tolerance)


def mteb_tasks() -> Claim:
    """How many tasks MTEB has in the paper."""
    from bivec.engine.evaluation.paper import paper_tasks

    return measured("engine/evaluation/data/paper.json", "each of its {} tasks", len(paper_tasks()))


def oldest() -> dict[str, str]:
    """Package -> lower bound, of setup.py."""
    return dict(re.findall(r'"([a-z0-9-]+)>=([\d.]+)', (ROOT / "setup.py").read_text(encoding="utf-8")))


def versions() -> Iterator[Claim]:
    """The oldest versions, as setup.py has them."""
    source, setup, bounds = "setup.py", (ROOT / "setup.py").read_text(encoding="utf-8"), oldest()
    python = re.search(r'python_requires=">=([\d.]+)', setup)[1]
    newest = re.search(r"range\(\d+, (\d+)\)", setup)[1]
    yield measured(source, "Python ≥ {}", python)
    yield measured(source, "torch ≥ {}", bounds["torch"])
    yield measured(source, "transformers ≥ {}", bounds["transformers"])
    text = "torch {}, numpy {}, transformers {}, triton {} (in its interpreter with numpy before 2.4), peft {}, "
    packages = ("torch", "numpy", "transformers", "triton", "peft", "sentence-transformers")
    yield measured(source, text + "sentence-transformers {}", *(bounds[name] for name in packages))
    yield measured(source, "Python {} to 3.{}:", python, int(newest) - 1)
    yield from given("what .ci/run has been run with", "newest versions on torch 2.13", "(3.11 so far)")
    yield from given("a limit of triton 3.6", "For sm_100 triton 3.6 fails")
    yield from given("changelog of transformers", "transformers before 5.21 leaves out")


def hard_operands() -> Iterator[Claim]:
    """What nearly parallel vectors and large scores cost."""
    file, found = "hard_operands.json", result("hard_operands.json")
    rows = [row for row in found["losses"] if row["cosine"] >= 0.95]

    def ends(key: str) -> tuple[float, float]:
        return 100 * min(row[key] for row in rows), 100 * max(row[key] for row in rows)

    yield measured(file, "gradients of `info_nce` are off by {:.1f} to {:.1f} %", *ends("info_nce"))
    yield measured(file, "those of `linear_cross_entropy` by {:.1f} to {:.1f} %", *ends("linear_cross_entropy"))
    yield measured(file, "(mean cosine {} to {})", rows[0]["cosine"], rows[-1]["cosine"])
    large = found["attention"][-1]
    text = "scores of {:.0f} thousand (q and k at {} times the usual size)"
    yield measured(file, text, large["largest_score"] / 1e3, large["size"])
    yield measured(file, "off by up to {:.0e} there", max(large[name] for name in ("dq", "dk", "dv")))


def evaluations() -> Iterator[Claim]:
    """Is it a better encoder, and why?"""
    from bivec.engine.evaluation.parts import Part
    from bivec.engine.evaluation.study_report import study_trends
    from bivec.engine.evaluation.trends import CLOSE, FAILS, HOLDS

    parts = {name: result(f"reproduce/{name}.json") for name in PARTS}
    minutes = result("reproduce/clock.json")["minutes"]["all"]
    yield measured("reproduce/clock.json", "{:.0f} minutes on two quiet cores", minutes)
    trends = study_trends({name: Part(name, part["data"], part["seconds"], True) for name, part in parts.items()})
    count = {verdict: sum(one.verdict == verdict for one in trends) for verdict in (HOLDS, FAILS, CLOSE)}
    source = "reproduce/*.json: the trends"
    yield measured(source, "{} of {} claims of the paper hold", count[HOLDS], len(trends))
    yield measured(source, "{} do not (words read", count[FAILS])
    yield measured(source, "{} are too close to call", count[CLOSE])
    from bivec.engine.presets import SMOLLM2_135M

    yield measured("engine/presets.py: SMOLLM2_135M", "On words {} steps of MNTP", SMOLLM2_135M.mntp.optim.steps)
    pos = parts["words"]["data"]["accuracy"]["at their own tokens"]["pos"]
    lost = pos["bi+mntp"] - pos["bi+mntp+simcse"]
    yield measured("reproduce/words.json", "SimCSE then costs {:.0f} points of POS", lost)
    yield from word_trend()
    yield from supervised_sick()


def word_trend() -> Iterator[Claim]:
    """An MNTP for words."""
    file, found = "word_trend_cpu.json", result("word_trend_cpu.json")
    yield measured(file, "trains an MNTP of {} steps for words", found["recipe"]["optim"]["steps"])
    own, left = (found["accuracy"][read] for read in ("at their own tokens", "after MNTP one to the left"))

    def row(task: str) -> tuple[float, ...]:
        return own[task]["bi"], own[task]["uni"], own[task]["bi+mntp"], left[task]["bi+mntp"]

    text = "POS {:.1f} (bi) < {:.1f} (uni) < {:.1f} (bi+mntp; read to the left {:.1f})"
    yield measured(file, text, *row("pos"))
    yield measured(file, "chunking {:.1f} < {:.1f} < {:.1f} (to the left {:.1f})", *row("chunking"))
    yield measured(file, "NER {:.1f} < {:.1f} = {:.1f} (to the left {:.1f};", *row("ner"))


def supervised_sick() -> Iterator[Claim]:
    """What SICK's triples add to the quick start."""
    file, found = "supervised_sick.json", result("supervised_sick.json")
    row = next(one for one in found["rows"] if one["start"] == "Bi+MNTP+SimCSE")
    settings = dict(one.split("=") for one in found["settings"])
    steps, batch = (int(settings[f"supervised.{key}"]) for key in ("optim.steps", "batch_size"))
    minutes = row["training"]["training_seconds"] / 60
    yield measured(file, "{} steps of {} SICK triples ({:.0f} minutes on one busy core)", steps, batch, minutes)
    before, after, gain = row["before"], row["after"], row["difference"]["dev"]
    yield measured(file, "STS-B dev from {:.1f} to {:.1f}", before["dev"], after["dev"])
    yield measured(file, "bootstrap's 95 % interval ({:+.1f} … {:+.1f})", gain["low"], gain["high"])
    yield measured(file, "test from {:.1f} to {:.1f}", before["test"], after["test"])


def benchmarks() -> Iterator[Claim]:
    """benchmarks/README.md."""
    minutes = max(run["seconds"] for run in result("quick_start.json")["runs"]) / 60
    yield measured("quick_start.json", "{:.0f} minutes each on two cores", minutes)
    sizes = [row["batch"] for row in result("contrastive_cost_cpu.json")["rows"]]
    yield measured("contrastive_cost_cpu.json", "from {} to {:,} triples", min(sizes), max(sizes))
    worse = constant("benchmarks/compare.py", r'"--tolerance", type=float, default=([\d.]+)')
    yield measured("compare.py: --tolerance", "{:.0f} % worse than", 100 * worse)
    minutes = constant("benchmarks/gpu_suite.py", r'"--minutes", type=float, default=([\d.]+)')
    yield from given("gpu_suite.py: --minutes", f"in {SPELLED_OUT[int(minutes)]} minutes")
    yield from given(NAMES, "trends at 135M")
    mntp = result("train_step_cpu.json")["stages"]["mntp"]["sides"][OURS]
    yield measured("train_step_cpu.json", "MNTP runs at {:.0f} % of the rate", 100 * mntp["of_gemms"])
    dims = {row["dim"] for row in result("losses_cpu.json")["rows"]}
    yield measured("losses_cpu.json", "operands in fp32, D = {}", *dims)
    file, huge = "losses_huge.json", result("losses_huge.json")
    rows, dim = huge["rows"], huge["dim"]
    yield measured(file, "info_nce at {:,} pairs", rows)
    text = "{:,} pairs at D = {:,}, forward and backward, take {:.0f} minutes and {:,.0f} MiB above the operands"
    yield measured(file, text, rows, dim, huge["seconds"] / 60, huge["peak_bytes"] / MIB)
    yield measured(file, "their {:.0f} MiB of gradients", 2 * rows * dim * 4 / MIB)
    yield measured(file, "the logits alone would take {:.0f} GiB", rows**2 * 4 / GIB)


def engine() -> Iterator[Claim]:
    """engine/README.md."""
    yield from given(f"{TOLERANCES}: tests/engine/test_planner.py", "agree within 10 % in the tests")


def integrations() -> Iterator[Claim]:
    """engine/integrations/README.md."""
    yield from given("dimensions of a mask", "(2D `attention_mask`", "custom 4D masks")
    yield from given(NAMES, "Gemma 1, 2 and 3")


def kernels() -> Iterator[Claim]:
    """kernels/README.md."""
    yield from given(f"{TOLERANCES}: tests/kernels", "within 1 % of float64 at scales 1 to 100")
    from bivec.kernels.tuning import read_table

    widest = max(row["key"]["head_dim"] for row in read_table("attention"))
    yield measured("tuning/attention.json", "head dims up to {}, padded", widest)
    yield short_path()
    yield from given("triton's", "compute capability 8.0")
    yield from hard_operands()


def short_path() -> Claim:
    """Which tiles of attention's short path fit, by the rows of its backward."""
    from bivec.kernels.tuning import read_table

    keys = [(row["arch"], row["key"]) for row in read_table("attention") if row["kernel"] == "attention_short_backward"]
    lengths = sorted({key["length"] for _, key in keys})
    longest: dict[tuple[str, int], int] = {}
    for arch, key in keys:
        at = arch, key["head_dim"]
        longest[at] = max(longest.get(at, 0), key["length"])
    full = max(width for (_, width), length in longest.items() if length == lengths[-1])
    ((less_on, less_at, less),) = ((*at, n) for at, n in longest.items() if at[1] <= full and n < lengths[-1])
    wide = {arch: (width, length) for (arch, width), length in longest.items() if width > full}
    ((widest, length),) = set(wide.values())
    text = (
        "sequences up to {} tokens where a tile of {} or {} fits the registers (head dims up to {}: {}, "
        f"on {less_on} {{}} at {{}}; head dim {{}}: {{}} on {' and '.join(wide)})"
    )
    values = (lengths[-1], *lengths, full, lengths[-1], less, less_at, widest, length)
    return measured("tuning/attention.json", text, *values)


def models() -> Iterator[Claim]:
    """models/README.md."""
    yield from given(NAMES, QWEN, "LLaMA 1 to 3.x", "SmolLM 1 and 2", "Qwen 2, 2.5", "Qwen 3", "multimodal Gemma 3")
    yield from given(NAMES, "Gemma 1, 2 and 3", "from 2 on four norms", "2: softcap; 3: q and k norms")
    yield from given("a formula", "(1 + w) norms")


def recipes() -> Iterator[Claim]:
    """recipes/README.md."""
    from attention import BF16_PEAKS

    from bivec.engine.distributed import BEAT_SECONDS, MISSED_BEATS
    from bivec.engine.evaluation.mteb_encoder import MAX_TEXT_LENGTH
    from bivec.engine.presets import MISTRAL_7B, SHEARED_LLAMA_1B
    from bivec.engine.recipe_arguments import RunOptions

    yield measured("engine/presets.py", "SimCSE batch {} for S-LLaMA", SHEARED_LLAMA_1B.simcse.batch_size)
    yield measured("engine/presets.py", "the stop at step {:,}", SHEARED_LLAMA_1B.mntp.optim.steps)
    yield measured("engine/recipe.py", "micro-batch of {:,} tokens", MISTRAL_7B.mntp.micro_batch_tokens)
    yield measured("report_tables.py: TARGET", "at {:.0f} % of the card's bf16 peak", 100 * TARGET)
    peaks = (BF16_PEAKS[name] for name in ("A100", "H100"))
    yield measured("attention.py: BF16_PEAKS, of the data sheets", "(A100 {:.0f}, H100 {:.0f} TFLOP/s)", *peaks)
    yield from given(f"{TOLERANCES}: tests/engine/test_planner.py", "agree within 10 % in the tests")
    yield supervised_preset()
    yield mteb_tasks()
    yield from given("engine/triples.py: an offset in 64 bits", "keeps 8 bytes a row")
    yield from given("an example of --set supervised.margin", "positive's - 0.05")
    yield from contrastive_cost()
    text = "documents of title and text, {} tokens"
    yield measured("engine/evaluation/mteb_encoder.py: MAX_TEXT_LENGTH", text, MAX_TEXT_LENGTH)
    yield measured("recipes/data", "on {} triples of our own", rows_of("future_token_triples.jsonl"))
    yield from given("the main process", "Process 0 writes")
    yield from given("name of a shared task", "SemEval 2014, task 1;")
    yield measured("engine/recipe_arguments.py: timeout", "after `--timeout` ({:.0f} s)", RunOptions.timeout)
    beats = SPELLED_OUT[int(BEAT_SECONDS * MISSED_BEATS)]
    yield from given("engine/distributed.py: BEAT_SECONDS, MISSED_BEATS", f"within some {beats} seconds")
    yield of_two_processes()
    yield from given("tests/recipes/test_recipes.py", "under 150 lines")
    yield from given("engine/trainer.py: what follows a step out of memory", "micro-batches of half the size")


def contrastive_cost() -> Iterator[Claim]:
    """Contrastive steps of any size."""
    file, found = "contrastive_cost_cpu.json", result("contrastive_cost_cpu.json")
    rows, verdict = found["rows"], found["verdict"]
    largest, whole = rows[-1], [row for row in rows if "one forward" in row["sides"]][-1]
    text = "From {} to {:,} triples a step, time grows in line with the tokens (within {:.0f} %)"
    off, more = bound(100 * verdict["time_off_the_line"]), 100 * verdict["rest_growth"]
    yield measured(file, text, rows[0]["batch"], largest["batch"], off)
    peaks = largest["sides"]["cached"]["peak_bytes"] / MIB, whole["sides"]["one forward"]["peak_bytes"] / MIB
    text = "beyond the embeddings by {:.0f} %: {:.0f} MiB at {:,}, where one forward needs {:,.0f} at {} already"
    yield measured(file, text, more, peaks[0], largest["batch"], peaks[1], whole["batch"])


def samples() -> Iterator[Claim]:
    """recipes/data/README.md."""
    yield from given(NAMES, "CC BY-SA 3.0", "CC BY-SA 4.0", "CC BY 4.0", "Apache-2.0 licence")
    yield from given("years of publications", "Models*, 2016:", "LREC 2014", "W-NUT 2017", "SemEval-2017 Task 1")


def security() -> Iterator[Claim]:
    """SECURITY.md."""
    yield measured(
        "fuzz.json", "damaged files: {:,} mutants", sum(row["mutants"] for row in result("fuzz.json")["readers"])
    )
    yield from given("a version of bivec", "before 1.0 no older one")
    yield from given(".ci/run: what its environments take", "some 6 GB")


def changelog() -> Iterator[Claim]:
    """CHANGELOG.md; bounds of versions are those of setup.py as it was then."""
    yield from given(NAMES, "Qwen 2, 2.5 and 3", "SmolLM 1 to 3", "Gemma 1 to 3")
    yield from given("a version of bivec", "Before 1.0 a minor version")
    bounds = ("torch 2.13 (with 2.11 LoRA", "numpy 2.0 (pyarrow", "scipy 1.13,", "matplotlib 3.9,", "scikit-learn 1.5,")
    yield from given("setup.py of 0.1.0; tests/test_packaging.py compares", *bounds, "huggingface_hub 1.3,")


def contributing() -> Iterator[Claim]:
    """CONTRIBUTING.md."""
    yield from given("pyproject.toml: markers", "more than ten seconds")
    yield from given("house rules", "Files up to 400 lines, functions up to 60")


CLAIMS: dict[str, Callable[[], Iterator[Claim]]] = {
    "README.md": readme,
    "CHANGELOG.md": changelog,
    "CONTRIBUTING.md": contributing,
    "FAQ.md": faq,
    "SECURITY.md": security,
    "benchmarks/README.md": benchmarks,
    "engine/README.md": engine,
    "engine/integrations/README.md": integrations,
    "kernels/README.md": kernels,
    "models/README.md": models,
    "recipes/README.md": recipes,
    "recipes/data/README.md": samples,
}
