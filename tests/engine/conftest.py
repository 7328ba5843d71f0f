"""Tokenizers for the tests: files of SentencePiece, and small ones trained here."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest

MISTRAL_FILES = {
    "v1": "tokenizer.model.v1",
    "v2": "mistral_instruct_tokenizer_240216.model.v2",
    "v3": "mistral_instruct_tokenizer_240323.model.v3",
}


class TokenizerFiles:
    """Texts with what tokenizers get wrong, and tokenizers that were trained on them or are in wide use."""

    TEXTS: ClassVar[list[str]] = [
        "",
        " ",
        "a",
        "The Treaty of Westphalia (1648) ended the Thirty Years' War; about 8,000,000 people had died.",
        "  two  spaces,   three, and trailing   ",
        "tabs\tand\nnew lines\r\n\r\n   indented\n",
        "def f(x_1, *args):\n    return {'_': x_1 ** 2}  # comment",
        "naïve café, cafe\u0301, Ångström, ﬁne ligature, Ｆｕｌｌ ｗｉｄｔｈ, ½ №",
        "Привет, мир! 你好，世界。日本語テキスト 한국어 שלום مرحبا हिन्दी ไทย",
        "🙂 👩‍👩‍👧‍👦 🇫🇷 \u200b\u00a0 \x00 \x7f \U0010ffff",
        "▁literal ▁▁ marks",
        "https://example.org/a?b=c&d=%20e#f  user@example.org",
        "Donaudampfschifffahrtsgesellschaftskapitän " * 3,
    ]

    @staticmethod
    def sentencepiece(folder: Path, version: str) -> Path:
        """The folder, with a tokenizer.model of Mistral in it: "v1", "v2" or "v3"."""
        package = importlib.util.find_spec("mistral_common")
        if package is None:
            pytest.skip("pip install --no-deps mistral-common")
        source = Path(package.submodule_search_locations[0]) / "data" / MISTRAL_FILES[version]
        shutil.copy(source, folder / "tokenizer.model")
        return folder

    @classmethod
    def byte_level(
        cls, *, special: Sequence[str] = ("<|begin|>", "<|endoftext|>", "<|end|>"), split: str | None = None
    ) -> Any:
        """A byte-level BPE of the texts, as the package tokenizers has them."""
        from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

        backend = Tokenizer(models.BPE())
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
        backend.pre_tokenizer = (
            byte_level
            if split is None
            else pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(split), "isolated"), byte_level])
        )
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=400, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
        )
        backend.train_from_iterator(cls.TEXTS, trainer)
        return backend

    @staticmethod
    def byte_level_directory(folder: Path, backend: Any, **settings: Any) -> Path:
        """The folder, with it and its settings."""
        backend.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        return folder


@pytest.fixture(scope="session")
def files() -> TokenizerFiles:
    """Shared by the tests of tokenizers."""
    return TokenizerFiles()


@pytest.fixture(scope="session")
def assert_saved_alike(files: TokenizerFiles) -> Callable[..., None]:
    """Saves a tokenizer into a folder: AutoTokenizer gives the same ids there, BOS included."""
    import transformers

    from bivec.engine.tokenizer import load_tokenizer, prefix_length

    def check(tokenizer: Any, folder: Path, *, model_type: str | None = None) -> None:
        tokenizer.save_pretrained(folder)
        if model_type is not None:  # as in a merged directory, where AutoTokenizer also looks at the model
            (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
        # for a mistral model, transformers would first import mistral-common's tokenizer; --no-deps leaves it broken
        plain = transformers.AutoTokenizer.from_pretrained(folder, fix_mistral_regex=False)
        for text in files.TEXTS:
            assert plain(text).input_ids == tokenizer(text).input_ids, text
        assert (plain.pad_token, plain.bos_token, plain.eos_token) == (
            tokenizer.pad_token,
            tokenizer.bos_token,
            tokenizer.eos_token,
        )
        assert plain("one", "two").input_ids == tokenizer("one", "two").input_ids
        again = load_tokenizer(folder)
        assert again(files.TEXTS).input_ids == tokenizer(files.TEXTS).input_ids
        assert prefix_length(again) == prefix_length(tokenizer)

    return check
