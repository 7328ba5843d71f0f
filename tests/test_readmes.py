"""Every fenced block of every README is run: Python as it stands, commands one by one, with small models and data.

Of commands that take minutes or a GPU, and of those of the root's other pages, the flags are parsed.

The files that the READMEs name (path/to/model, runs/llm2vec-smollm2-135m, articles.txt …) lie in the working directory
of each test. What is changed beside that stands in three tables: ``NAMES``, ``WAYS`` and ``LAUNCHERS``. A command that
none of them knows fails, and so does a flag that its script does not have. Blocks with the tag ``text`` are left out.
"""

from __future__ import annotations

import argparse
import gzip
import importlib
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
DATA, BENCHMARKS = ROOT / "recipes" / "data", ROOT / "benchmarks"
MODEL, RUN = "path/to/model", "runs/llm2vec-smollm2-135m"
NAMES = {"HuggingFaceTB/SmolLM2-135M": MODEL}  # of the hub, in Python
OPTIONAL = {"lightning"}  # without it the rest of its README is run, and the test then counts as skipped
TAGS = ("python", "bash", "yaml", "text")  # the last: output, a tree of files, a format; it is not run


@dataclass(frozen=True)
class Block:
    """A fenced block: its README, the line of its first fence, the heading above it, its tag and its text."""

    file: str
    line: int
    heading: str
    tag: str
    text: str


@dataclass(frozen=True)
class Way:
    """How a script is run here."""

    add: str = ""  # flags put behind those of the command, so that they win
    default: dict[str, str] = field(default_factory=dict)  # flags for what the command does not say
    parse_only: str = ""  # why it stops as soon as its arguments are parsed


GPU, LONG = "needs a GPU", "takes minutes"
FRESH = {"--model": MODEL, "--output-dir": "runs/fresh"}
SMOKE, DRY = Way("--smoke", FRESH), Way("--dry-run")
WAYS = {
    "recipes/llm2vec_smollm2.py": SMOKE,
    "recipes/llm2vec_sheared_llama.py": DRY,
    "recipes/llm2vec_llama2.py": DRY,
    "recipes/llm2vec_llama3.py": DRY,
    "recipes/llm2vec_mistral.py": DRY,
    "recipes/supervised.py": Way("--smoke"),
    "recipes/entailment_triples.py": Way(),
    "recipes/reproduce.py": Way("--smoke --only masks"),  # the other parts: tests/recipes/test_reproduce.py
    "recipes/word_tasks.py": Way("--tasks pos --variants uni bi --sentences 12 --seeds 42"),
    "recipes/analyse.py": Way("--only similarity --paragraphs 1 --sentences 4"),
    "recipes/encode_corpus.py": Way(),
    "recipes/data/build.py": Way(parse_only="its sources are not here"),
    "benchmarks/attention.py": Way(parse_only=GPU),
    "benchmarks/compare.py": Way(),
    "benchmarks/contrastive_cost.py": Way("--shape tiny --micro-batch-tokens 256 --batches 16 32 --turns 1 --output ."),
    "benchmarks/coverage_report.py": Way(parse_only="reads what a whole run of the tests has left"),
    "benchmarks/corpus.py": Way(parse_only=LONG),
    "benchmarks/encode.py": Way("--shape tiny --quick --no-peer --output ."),
    "benchmarks/gpu_suite.py": Way(parse_only=GPU),
    "benchmarks/hard_operands.py": Way("--output ."),
    "benchmarks/how_it_works.py": Way("--output figure.png"),
    "benchmarks/losses.py": Way(parse_only=LONG),
    "benchmarks/mteb_eval.py": Way("--tasks LocalSTS"),
    "benchmarks/long_run.py": Way(parse_only=LONG),
    "benchmarks/mutation.py": Way(parse_only="takes hours"),
    "benchmarks/newcomer.py": Way(parse_only=LONG),
    "benchmarks/quick_start.py": Way(parse_only=LONG),
    "benchmarks/report.py": Way("--check"),
    "benchmarks/roofline.py": Way(),
    "benchmarks/round_trips.py": Way(parse_only="is run whole by tests/benchmarks/test_round_trips.py"),
    "benchmarks/sts.py": Way("--pairs 8"),
    "benchmarks/supervised_sick.py": Way(parse_only=LONG),
    "benchmarks/train_step.py": Way(parse_only=LONG),
    "benchmarks/tune.py": Way(parse_only=GPU),
    "benchmarks/word_trend.py": Way(parse_only=LONG),
    ".ci/api_reference.py": Way(),
    "bivec doctor": Way("--only versions,devices,backends,numerics"),
    "bivec convert": SMOKE,
    "bivec encode": Way(),
    "bivec eval": Way("--pairs 8"),
    "bivec export": Way(),
    "bivec bench": Way(),
    "bivec.kernels.aot": Way(parse_only="is run by .ci/run"),
}
# flags of a launcher that is not Python's; torchrun's are read by its own parser
LAUNCHERS = {"srun": r"--(nodes|ntasks-per-node|gpus-per-node|kill-on-bad-exit)=\d+"}
# what a block has left behind, right after it
CHECKS: dict[tuple[str, str], Callable[[dict[str, Any]], bool]] = {
    ("README.md", "Use the encoder"): lambda n: n["vectors"].shape == (2, 64),
    ("README.md", "Use in other stacks"): lambda n: abs(n["theirs"] - n["vectors"]).max() < 1e-4,
    ("engine/README.md", "The encoder"): lambda n: n["tokens"].shape[1] == n["query"].shape[0] == 64,
    ("engine/integrations/README.md", "transformers"): lambda n: n["applied"].rms_norm == 5,
    ("engine/integrations/README.md", "MNTP in Trainer"): lambda n: n["trainer"].state.global_step == 3,
    ("engine/integrations/README.md", "sentence-transformers"): lambda n: (
        n["trainer"].state.global_step == 3 and n["model"][0].auto_model.config._attn_implementation == "bivec"
    ),
    ("engine/integrations/README.md", "A plain loop"): lambda n: not torch.equal(n["first"], n["second"]),
    ("engine/integrations/README.md", "PyTorch Lightning"): lambda n: n["trainer"].global_step == 3,
    ("kernels/README.md", "Use"): lambda n: n["vectors"].shape == (3, 576) and n["queries"].grad is not None,
    ("models/README.md", "Use"): lambda n: n["hidden"].shape == (7, 64),
    ("recipes/README.md", "Recipes"): lambda n: len(n["run"].results) == 2,
}


def readmes() -> list[str]:
    """All of the repository, which has no other folders; what lies beside them is a run's or an environment's."""
    folders = ("kernels", "models", "engine", "recipes", "benchmarks", "tests")
    found = [file for folder in folders for file in sorted((ROOT / folder).rglob("README.md"))]
    return ["README.md", *(file.relative_to(ROOT).as_posix() for file in found)]


def pages() -> list[str]:
    """The root's other texts."""
    return sorted(file.name for file in ROOT.glob("*.md") if file.name != "README.md")


def blocks_of(file: str, content: str) -> list[Block]:
    """The fenced blocks of a README.

    Raises:
        ValueError: a fence that is indented, not closed, of another kind or without a tag that is known.
    """
    found, opened, heading = [], None, ""
    for number, line in enumerate(content.splitlines(), 1):
        fence = re.fullmatch(r"```(\w*)", line)
        if not fence and re.match(r"\s*(```|~~~)", line):
            raise ValueError(f"{file}:{number}: {line!r}: a fence stands alone in its line, with at most a tag")
        if fence and opened is None:
            if fence[1] not in TAGS:
                raise ValueError(f"{file}:{number}: the tag {fence[1]!r} is none of {', '.join(TAGS)}")
            opened = (number, fence[1], [])
        elif fence:
            found.append(Block(file, opened[0], heading, opened[1], "\n".join([*opened[2], ""])))
            opened = None
        elif opened is not None:
            opened[2].append(line)
        elif line.startswith("#"):
            heading = line.lstrip("# ")
    if opened is not None:
        raise ValueError(f"{file}:{opened[0]}: the block is not closed")
    return found


def commands_of(block: Block) -> list[str]:
    """The commands of a bash block: its lines, joined where one ends in a backslash, without comments."""
    joined = block.text.replace("\\\n", " ").splitlines()
    return [line for line in joined if shlex.split(line, comments=True)]


BLOCKS = [block for file in readmes() for block in blocks_of(file, (ROOT / file).read_text(encoding="utf-8"))]
COMMANDS = [
    pytest.param(command, id=f"{block.file}:{block.line}:{place}")
    for block in BLOCKS
    if block.tag == "bash"
    for place, command in enumerate(commands_of(block), 1)
]

PAGES_COMMANDS = [
    pytest.param(part, id=f"{block.file}:{block.line}:{part[:30]}")
    for file in pages()
    for block in blocks_of(file, (ROOT / file).read_text(encoding="utf-8"))
    if block.tag == "bash"
    for line in commands_of(block)
    for part in re.sub(r"\s+#.*", "", line).split(" && ")
]


class Parsed(BaseException):
    """Raised in the place of a script's work."""


@pytest.fixture(scope="session")
def world(tmp_path_factory, tiny_llama_dir) -> Path:
    """The files that the READMEs name: models, runs, texts; small ones."""
    folder = tmp_path_factory.mktemp("readmes")
    shutil.copytree(tiny_llama_dir, folder / MODEL)
    for names, source, rows in (
        (("articles.txt", "wiki.txt"), "wikitext2_paragraphs.txt.gz", 40),
        (("sentences.txt",), "wikipedia_sentences.txt.gz", 60),
        (("stsb_dev.csv", "stsb_test.csv"), "stsb_dev.csv.gz", 12),
    ):
        with gzip.open(DATA / source, "rt", encoding="utf-8") as lines:
            text = "".join(islice(lines, rows))
        for name in names:
            (folder / name).write_text(text, encoding="utf-8")
    sentences = (folder / "sentences.txt").read_text(encoding="utf-8").splitlines()
    triples = [{"query": a, "positive": b, "negative": c} for a, b, c in zip(*[iter(sentences)] * 3, strict=True)]
    (folder / "echo-data").mkdir()
    write_lines(folder / "triples.jsonl", triples)
    write_lines(folder / "echo-data" / "nli.jsonl", triples)
    write_lines(folder / "corpus.jsonl", [{"text": sentence} for sentence in sentences])
    sick = [("A man plays", "Someone plays", "ENTAILMENT"), ("A man plays", "Nobody plays", "CONTRADICTION")]
    rows = "".join(f"{i}\t{a}\t{b}\t3.5\t{label}\n" for i, (a, b, label) in enumerate(sick))
    header = "pair_ID\tsentence_A\tsentence_B\trelatedness_score\tentailment_judgment\n"
    (folder / "SICK_train.txt").write_text(header + rows, encoding="utf-8")
    for name in ("NEW.json", "OLD.json"):
        shutil.copy(BENCHMARKS / "results" / "losses_cpu.json", folder / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run(f"python recipes/llm2vec_smollm2.py --output-dir {RUN}", patch)
    shutil.copytree(folder / RUN, folder / "runs/llm2vec-mistral-7b")
    return folder


@pytest.fixture
def place(world, tmp_path, monkeypatch) -> Path:
    """A copy of it, as the working directory."""
    shutil.copytree(world, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    threads, environment = torch.get_num_threads(), dict(os.environ)
    yield tmp_path / "work"
    torch.set_num_threads(threads)
    os.environ.clear()  # of HF_HUB_OFFLINE, where the hub did not answer
    os.environ.update(environment)
    for name, module in list(sys.modules.items()):  # the scripts' own modules have names that others may want
        if Path(getattr(module, "__file__", None) or "/").parent == BENCHMARKS:
            del sys.modules[name]


def write_lines(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def run(command: str, patch: pytest.MonkeyPatch) -> None:
    """Runs a command of a README in this process, where Python is already there.

    Raises:
        AssertionError: there is no way to run it, or it fails.
    """
    words = shlex.split(command, comments=True)
    if words[0] == "pip":
        assert command in (ROOT / ".ci/run").read_text(encoding="utf-8"), f".ci/run does not run {command}"
        return
    while re.fullmatch(r"[A-Z_]+=\S+", words[0]):
        words = words[1:]
    if words[0] == "torchrun":
        from torch.distributed.run import get_args_parser

        given = get_args_parser().parse_args(words[1:])
        words = ["python", given.training_script, *given.training_script_args]
    elif words[0] in LAUNCHERS:
        while words[1].startswith("-"):
            assert re.fullmatch(LAUNCHERS[words[0]], words[1]), f"{words[0]} {words[1]}: not in LAUNCHERS"
            words = [words[0], *words[2:]]
        words = words[1:]
    if words[0] == "pytest":
        run_pytest(words[1:])
    elif words[0] == "bivec":
        name = " ".join(words[:2])
        assert name in WAYS, f"no way to run this block: {command}"
        run_main(lambda: sys.exit(console_script()()), words, WAYS[name], patch)
    elif words[:2] == ["python", "-m"]:
        module = importlib.import_module(words[2])
        run_main(lambda: sys.exit(module.main()), words[2:], WAYS[words[2]], patch)
    else:
        assert words[0] == "python" and words[1] in WAYS, f"no way to run this block: {command}"
        script = ROOT / words[1]
        if script.parent == BENCHMARKS:
            patch.syspath_prepend(str(BENCHMARKS))
        run_main(lambda: runpy.run_path(str(script), run_name="__main__"), words[1:], WAYS[words[1]], patch)


def run_main(main: Callable[[], object], words: list[str], way: Way, patch: pytest.MonkeyPatch) -> None:
    """Calls a command's ``main`` on its flags and on those of its way."""
    flags = words[1:]
    for flag, value in way.default.items():
        if flag not in flags and not (flag == "--output-dir" and "--resume" in flags):
            flags += [flag, value]
    if "--dry-run" not in flags:
        flags += shlex.split(way.add)
    patch.setattr(sys, "argv", [words[0], *flags])
    if way.parse_only:
        stop_after_parsing(patch)
    status = 0
    try:
        main()
        assert not way.parse_only, f"{words[0]} did not parse its arguments"
    except Parsed:
        pass
    except SystemExit as stop:
        status = stop.code
    assert status in (0, None), f"{shlex.join([words[0], *flags])} ended with {status}"


def stop_after_parsing(patch: pytest.MonkeyPatch) -> None:
    """``parse_known_args``, which ``parse_args`` calls too, knows no unknown flags and ends the script."""
    known = argparse.ArgumentParser.parse_known_args

    def parse(self: argparse.ArgumentParser, args=None, namespace=None):
        _, rest = known(self, args, namespace)
        assert not rest, f"unknown flags: {rest}"
        raise Parsed

    patch.setattr(argparse.ArgumentParser, "parse_known_args", parse)


def console_script() -> Callable[[], object]:
    """The function that setup.py names for ``bivec``."""
    entry = re.search(r'"bivec\s*=\s*([\w.]+):(\w+)"', (ROOT / "setup.py").read_text(encoding="utf-8"))
    assert entry, "setup.py has no console script bivec"
    return getattr(importlib.import_module(entry[1]), entry[2])


def run_pytest(words: list[str]) -> None:
    """In a process of its own, on one test of the benchmark of operators."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = ["pytest", *words, "-q", "-k", "swiglu and forward and torch", "--benchmark-disable"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout + done.stderr


def test_every_folder_has_a_readme():
    folders = ("kernels", "models", "engine", "engine/integrations", "recipes", "recipes/data", "benchmarks")
    assert {"README.md", *(f"{folder}/README.md" for folder in folders)} == set(readmes())


def test_no_way_is_left_over():
    """A script that no README shows needs no way to be run; nor does one that is gone."""
    shown = "\n".join(block.text for block in BLOCKS if block.tag == "bash")
    rest = {name for name in WAYS if name not in shown and not name.startswith("recipes/llm2vec_")}
    assert rest == set()
    assert all((ROOT / name).is_file() for name in WAYS if name.endswith(".py"))
    assert {(block.file, block.heading) for block in BLOCKS if block.tag == "python"} >= set(CHECKS)


def anchors(content: str) -> set[str]:
    """Those of GitHub for the headings."""
    headings = re.findall(r"^#+ (.+)$", content, flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("file", [*readmes(), *pages()])
def test_links_lead_somewhere(file):
    content = (ROOT / file).read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", content):
        path, _, anchor = target.partition("#")
        place = (ROOT / file).parent / path if path else ROOT / file
        assert place.exists(), target
        assert not anchor or anchor in anchors(place.read_text(encoding="utf-8")), target


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command, place, monkeypatch):
    run(command, monkeypatch)


@pytest.mark.parametrize("command", PAGES_COMMANDS)
def test_command_of_another_page_is_right(command, monkeypatch):
    """tests/test_contributing.py runs what CONTRIBUTING.md writes; here all that is asked is whether it can be run."""
    words = shlex.split(command)
    if words[0] == "python":
        monkeypatch.setitem(WAYS, words[2 if words[1] == "-m" else 1], Way(parse_only="is no block of a README"))
        run(command, monkeypatch)
    elif words[0] == "pytest":
        assert all((ROOT / word).exists() for word in words[1:] if not word.startswith("-"))
    else:
        assert command in (ROOT / ".ci/run").read_text(encoding="utf-8"), f".ci/run does not run {command}"


@pytest.mark.parametrize("block", [pytest.param(b, id=f"{b.file}:{b.line}") for b in BLOCKS if b.tag == "yaml"])
def test_settings(block, place, monkeypatch):
    """A file of settings is one for ``bivec convert``."""
    (place / "settings.yaml").write_text(block.text, encoding="utf-8")
    run("bivec convert --config settings.yaml", monkeypatch)


@pytest.mark.parametrize("file", sorted({block.file for block in BLOCKS if block.tag == "python"}))
def test_python(file, place, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["block"])
    names, missing = {"__name__": "block"}, set()
    torch.manual_seed(0)
    for block in BLOCKS:
        if block.file != file or block.tag != "python":
            continue
        text = block.text
        for name, replacement in NAMES.items():
            text = text.replace(name, replacement)
        try:
            exec(compile("\n" * block.line + text, str(ROOT / file), "exec"), names)
        except ModuleNotFoundError as error:
            if error.name not in OPTIONAL:
                raise
            missing.add(error.name)
            continue
        check = CHECKS.get((file, block.heading), lambda names: True)
        assert check(names), f"{file}:{block.line}"
    if missing:
        pytest.skip(f"all but the blocks of {', '.join(missing)}, which is not installed, have run")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("python recipes/nothing.py", "no way to run"),
        ("python benchmarks/roofline.py --gpus 1", "ended with 2"),
        ("python benchmarks/attention.py --gpus 1", "unknown flags"),
        ("python benchmarks/quick_start.py --gpus 1", "unknown flags"),
        ("torchrun --nproc-per-host=8 recipes/supervised.py", "2"),
        ("srun --gpus=8 python recipes/supervised.py", "not in LAUNCHERS"),
        ("pip install bivec", "does not run"),
    ],
)
def test_what_cannot_be_run_fails(command, message, place, monkeypatch):
    with pytest.raises((AssertionError, SystemExit), match=message):
        run(command, monkeypatch)


@pytest.mark.parametrize(
    "content", ["```\nls\n```", "```toml\na = 1\n```", "  ```bash\nls\n  ```", "```bash\nls", "~~~"]
)
def test_a_block_without_a_known_tag_is_refused(content):
    with pytest.raises(ValueError, match="README"):
        blocks_of("README.md", content)
