"""Installs a wheel where the repository is not, and uses it: as on a machine of somebody who has nothing but the wheel.

    python .ci/clean_machine.py WHEEL EMPTY_FOLDER

A fresh virtual environment in EMPTY_FOLDER gets the wheel, and by a line in a .pth file the libraries of the Python
that runs this, to save the download of torch: not its bivec, since lines of .pth files there are not followed. All
else runs in an empty working directory, without PYTHONPATH and offline: every module, every command (but bench, which
needs a clone), a whole conversion of a tiny random model, and the encoder that comes of it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from importlib import import_module, metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TEXTS = ["A man plays the guitar.", "Someone makes music.", "It rains."]
CONVERT = ("convert", "--preset", "smollm2-135m", "--model", "model", "--smoke", "--output-dir", "run")
COMMANDS = (
    CONVERT,
    ("encode", "run", "texts.txt", "-o", "vectors.npy"),
    ("eval", "run", "--pairs", "16", "--json"),
    ("export", "run", "encoder.gguf"),
    ("export", "run", "exported"),
)


def main(wheel: Path, folder: Path) -> None:
    """Runs everything.

    Raises:
        SystemExit: what has failed, with its output.
    """
    folder = folder.resolve()
    python = installed(wheel.resolve(), folder / "venv")
    work = folder / "work"
    work.mkdir()
    (work / "texts.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    script = shutil.copy(__file__, folder / "inside.py")  # a script's own folder is the first of sys.path
    bivec = python.with_name("bivec")

    printed = run(work, bivec, "--version")
    print(f"{printed.strip()} in a fresh environment: {run(work, python, script, 'modules', ROOT).strip()}", flush=True)
    print(run(work, bivec, "doctor").strip().splitlines()[-1], flush=True)
    run(work, python, script, "model", work / "model")
    for command in COMMANDS:
        run(work, bivec, *command)
        print("bivec", *command, flush=True)
    print(run(work, python, script, "vectors", work).strip(), flush=True)


def installed(wheel: Path, environment: Path) -> Path:
    """The Python of a fresh environment with the wheel, and the libraries of the one that runs."""
    venv.create(environment, symlinks=True)
    python = environment / "bin" / "python"
    # first the wheel: pip takes a bivec that it sees through the .pth file for installed
    run(environment, sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", wheel)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    libraries = environment / "lib" / version / "site-packages" / "libraries.pth"
    libraries.write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return python


def run(directory: Path, *command: object) -> str:
    """What a command prints."""
    kept = {name: os.environ[name] for name in ("OMP_NUM_THREADS", "PIP_CACHE_DIR") if name in os.environ}
    home = directory.parent / "home"
    environment = {"PATH": os.defpath, "HOME": str(home), "HF_HUB_OFFLINE": "1", **kept}
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=directory, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(words)} ended with {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done.stdout


def modules(repository: Path) -> None:
    """Imports every module of the installed package, and makes sure that nothing comes from the repository."""
    import pkgutil

    import bivec

    check(Path(bivec.__file__).is_relative_to(sys.prefix), f"bivec is {bivec.__file__}, not that of {sys.prefix}")
    check(metadata.version("bivec") == bivec.__version__, f"metadata {metadata.version('bivec')}, {bivec.__version__}")
    names = [module.name for module in pkgutil.walk_packages(bivec.__path__, "bivec.", onerror=fail)]
    for name in names:
        if not name.endswith(".__main__"):  # which would be the command
            import_module(name)
    files = [Path(module.__file__) for module in sys.modules.values() if getattr(module, "__file__", None)]
    outside = [str(file) for file in files if file.is_relative_to(repository)]
    check(not outside, f"loaded from the repository: {outside}")
    check(bivec.Encoder.__module__ == "bivec.engine.encoder", "bivec.Encoder is another one")
    print(f"{len(names)} modules imported")


def check(true: bool, otherwise: str) -> None:
    """Ends the process where something is not so."""
    if not true:
        sys.exit(otherwise)


def fail(name: str) -> None:
    """What walk_packages calls where a package does not import."""
    raise ImportError(name)


def model(directory: Path) -> None:
    """Writes a random LLaMA of two layers, and a tokenizer of 1,000 entries from the text that the wheel brings."""
    import gzip
    from itertools import islice

    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    import bivec

    bos, eos = "<s>", "</s>"
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1000, special_tokens=[bos, eos], initial_alphabet=alphabet, show_progress=False
    )
    data = Path(bivec.__file__).parent / "recipes" / "data" / "wikitext2_paragraphs.txt.gz"
    with gzip.open(data, "rt", encoding="utf-8") as lines:
        backend.train_from_iterator(islice(lines, 400), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos, pad_token=eos)
    tokenizer.save_pretrained(directory)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(directory)


def vectors(directory: Path) -> None:
    """The command's vectors are the encoder's, and those of the exported folder and file."""
    import numpy as np

    from bivec import Encoder

    found = np.load(directory / "vectors.npy")
    check(found.shape == (len(TEXTS), 64) and np.isfinite(found).all(), f"vectors.npy holds {found}")
    check(np.linalg.norm(found, axis=1).min() > 0, "a vector is zero")
    for name, allowed in (("run", 0.0), ("exported", 1e-5), ("encoder.gguf", 1e-2)):
        error = np.abs(Encoder.from_pretrained(directory / name).encode(TEXTS) - found).max() / np.abs(found).max()
        check(error <= allowed, f"{name}: its vectors are off by {error:.1e}, allowed {allowed:.0e}")
    print(f"{len(TEXTS)} sentences: the same vectors by bivec encode, bivec.Encoder and both exports")


if __name__ == "__main__":
    parts = {"modules": modules, "model": model, "vectors": vectors}
    if len(sys.argv) != 3:
        sys.exit("usage: python .ci/clean_machine.py WHEEL EMPTY_FOLDER")
    if sys.argv[1] in parts:
        parts[sys.argv[1]](Path(sys.argv[2]))
    else:
        main(Path(sys.argv[1]), Path(sys.argv[2]))
