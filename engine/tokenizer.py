"""Fast tokenizers from every kind of checkpoint. A decoder's puts a BOS in front of a text.

A small decoder parks its attention on the first token. Where a checkpoint's tokenizer adds no BOS (SmolLM2), the first
word would have to serve, so ours adds one through the post-processor: it is part of ``tokenizer.json`` and the exported
tokenizer adds it by itself in plain transformers. An encoder that somebody else made keeps the tokenizer it was
trained with.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from itertools import takewhile
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bivec.engine.json_files import read_json
from bivec.engine.sentencepiece_bpe import CONTROL, USER_DEFINED, read_sentencepiece, sentencepiece_backend
from bivec.models.errors import BivecError, CheckpointError, ConfigError
from bivec.models.gguf import read_header
from bivec.models.weights import TOKENIZER_PATTERNS, resolve_checkpoint

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tokenizers.pre_tokenizers import PreTokenizer
    from transformers import PreTrainedTokenizerFast

DOCUMENT_TOKEN = "<|endoftext|>"  # noqa: S105 - begins every document in the pretraining of GPT-2-style vocabularies
BLANK = "_"  # LLM2Vec hides a token behind an underscore: a token of every vocabulary that text seldom uses
SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "mask_token")
LARGEST_ID = 2**22  # the largest vocabularies have a quarter of that
# Llama 3 splits contractions, words, up to three digits, punctuation and white space before its merges
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")  # digit by digit


def load_tokenizer(path: str | Path, *, bos_token: str | None = None, add_bos: bool = True) -> PreTrainedTokenizerFast:
    """Loads the tokenizer of a checkpoint as a fast tokenizer that prepends a BOS.

    Args:
        path: a directory with tokenizer.json or else a SentencePiece tokenizer.model; a .gguf file; or a hub id.
        bos_token: the token to put in front where the checkpoint's tokenizer puts none; by default ``<|endoftext|>`` if
            the vocabulary has it, else the tokenizer's own BOS, else its EOS.
        add_bos: False = none is put in front where the checkpoint's tokenizer puts none: an encoder trained that way.

    Returns:
        A ``PreTrainedTokenizerFast`` with a pad token (the EOS where the checkpoint names none). Saved with
        ``save_pretrained`` it gives the same ids through ``AutoTokenizer``.

    Raises:
        CheckpointError: no tokenizer there, or one of a kind that is not supported (named).
        ConfigError: ``bos_token`` is not in the vocabulary, or the tokenizer already puts another token in front.
    """
    path = resolve_checkpoint(path, TOKENIZER_PATTERNS)
    if path.is_file():
        backend, settings = _from_gguf(path)
    elif (path / "tokenizer.json").is_file():
        backend, settings = _from_fast_directory(path)
    elif (path / "tokenizer.model").is_file():
        backend, settings = _from_sentencepiece(path)
    else:
        others = [name for name in ("tekken.json", "vocab.json") if (path / name).is_file()]
        hint = f"; {others[0]} is not supported, convert it to tokenizer.json" if others else ""
        raise CheckpointError(f"{path}: neither tokenizer.json nor tokenizer.model is there{hint}")
    length = settings.get("model_max_length")
    if isinstance(length, bool) or not isinstance(length, (int, float, type(None))):
        raise CheckpointError(f"{path}: model_max_length is {repr(length)[:80]}, expected a number of tokens")
    try:
        if add_bos:
            settings["bos_token"] = _ensure_bos(backend, settings, bos_token, path)
        settings["pad_token"] = settings.get("pad_token") or settings.get("eos_token") or settings.get("bos_token")
        return _wrap(backend, settings)
    except BivecError:
        raise
    except BaseException as error:
        if not _of_the_tokenizer(error):
            raise
        raise CheckpointError(f"{path}: the tokenizer cannot be used ({error}); download it again") from error


def _of_the_tokenizer(error: BaseException) -> bool:
    """Whether what was raised says that the file is bad: a panic of tokenizers' Rust is not even an Exception."""
    if isinstance(error, (ImportError, MemoryError)):
        return False
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def prefix_length(tokenizer: PreTrainedTokenizerFast) -> int:
    """The number of special tokens that the tokenizer puts in front of a text."""
    return len(prefix_ids(tokenizer))


def prefix_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The ids of the special tokens that the tokenizer puts in front of a text."""
    return _prefix(tokenizer.backend_tokenizer)


def mask_token_id(tokenizer: PreTrainedTokenizerFast, kind: str = "blank") -> int:
    """The id that stands for a hidden token in MNTP (METHOD 3.2). A mask token of the tokenizer's own always wins.

    Args:
        tokenizer: from ``load_tokenizer``.
        kind: "blank" (the underscore), "eos", or "mask" (only the tokenizer's own).

    Raises:
        ConfigError: the vocabulary has no such token, or ``kind`` is unknown.
    """
    if kind not in ("blank", "eos", "mask"):
        raise ConfigError(f"mask token {kind!r}: expected 'blank', 'eos' or 'mask'")
    own: int | None = tokenizer.mask_token_id
    if own is not None:
        return own
    if kind == "mask":
        raise ConfigError("mask token 'mask': the tokenizer has no mask token of its own; use 'blank' or 'eos'")
    token = tokenizer.eos_token if kind == "eos" else BLANK
    token_id: int | None = None if token is None else tokenizer.backend_tokenizer.token_to_id(token)
    if token_id is None:
        missing = "the tokenizer has no eos token" if token is None else f"{token!r} is not one token of the vocabulary"
        raise ConfigError(f"mask token {kind!r}: {missing}; use {'blank' if kind == 'eos' else 'eos'!r}")
    return token_id


def append_eos(backend: Tokenizer, eos: str, number: int) -> None:
    """Makes a tokenizer put an EOS behind a text, unless it does already.

    The template that puts the BOS in front gets one element more: of two templates in a row the second takes what the
    first has made for a pair of texts.

    Args:
        backend: changed in place.
        eos: the token.
        number: its id.
    """
    from tokenizers import Tokenizer

    if backend.encode("a").ids[-1] == number:
        return
    rules = json.loads(backend.to_str())
    own = rules["post_processor"]
    steps = [] if own is None else own["processors"] if own["type"] == "Sequence" else [own]
    template = next((step for step in steps if step["type"] == "TemplateProcessing"), None)
    if template is None:
        template = {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}}
        template["single"] = [{"Sequence": {"id": "A", "type_id": 0}}]
        template["pair"] = [{"Sequence": {"id": name, "type_id": kind}} for name, kind in (("A", 0), ("B", 1))]
        steps.append(template)
    for name in ("single", "pair"):
        last = template[name][-1]
        kind = next(iter(last.values()))["type_id"]
        template[name].append({"SpecialToken": {"id": eos, "type_id": kind}})
    template["special_tokens"][eos] = {"id": eos, "ids": [number], "tokens": [eos]}
    rules["post_processor"] = steps[0] if len(steps) == 1 else {"type": "Sequence", "processors": steps}
    backend.post_processor = Tokenizer.from_str(json.dumps(rules)).post_processor


def _prefix(backend: Tokenizer) -> list[int]:
    """The special ids in front of a text, without the padding that an earlier call may have asked for."""
    encoding = backend.encode("a")
    found = zip(encoding.ids, encoding.special_tokens_mask, encoding.attention_mask, strict=True)
    row = [(number, special) for number, special, attended in found if attended]
    return [number for number, _ in takewhile(itemgetter(1), row)]


def _ensure_bos(backend: Tokenizer, settings: dict[str, Any], asked: str | None, path: Path) -> str:
    """Makes the tokenizer prepend a BOS if it does not yet; returns the token in front."""
    from tokenizers import AddedToken
    from tokenizers.processors import Sequence, TemplateProcessing

    if asked is not None and backend.token_to_id(asked) is None:
        raise ConfigError(f"{path}: bos_token {asked!r} is not in the tokenizer's vocabulary")
    prefix = _prefix(backend)
    if prefix:
        own = backend.id_to_token(prefix[0]) or ""  # an id that it gave has a token
        if asked not in (None, own):
            raise ConfigError(
                f"{path}: bos_token {asked!r} was asked for, but the tokenizer already puts {own!r} in front"
            )
        return own
    document = DOCUMENT_TOKEN if backend.token_to_id(DOCUMENT_TOKEN) is not None else None
    bos = asked or document or settings.get("bos_token") or settings.get("eos_token")
    if bos is None:
        raise ConfigError(f"{path}: the tokenizer has neither a BOS nor an EOS to put in front; give bos_token")
    backend.add_special_tokens([AddedToken(bos, special=True, normalized=False)])  # keeps its id
    template = TemplateProcessing(
        single=[bos, "$A"],
        pair=[bos, "$A", f"{bos}:1", "$B:1"],
        special_tokens=[(bos, backend.token_to_id(bos))],
    )
    own = backend.post_processor
    backend.post_processor = template if own is None else Sequence([own, template])
    return bos


def _wrap(backend: Tokenizer, settings: dict[str, Any]) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    # The generic class, whatever the checkpoint names: LlamaTokenizer and GPT2Tokenizer of transformers 5 rebuild
    # normalisation and pre-tokenisation instead of reading them from tokenizer.json. `add_bos_token` stays out of the
    # settings, since its presence would have the post-processor rebuilt on loading.
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        **{name: value for name, value in settings.items() if value is not None},
    )


def _from_fast_directory(path: Path) -> tuple[Tokenizer, dict[str, Any]]:
    from transformers import PreTrainedTokenizerFast

    _read_tokenizer_config(path)
    rules = _checked_rules(path / "tokenizer.json")
    try:
        loaded = PreTrainedTokenizerFast.from_pretrained(path)
    except BaseException as error:  # tokenizers raises bare Exception for a damaged tokenizer.json
        if not _of_the_tokenizer(error):
            raise
        raise CheckpointError(f"{path}: tokenizer.json cannot be read ({error})") from error
    for token in rules.get("added_tokens") or ():
        if not token["content"]:  # which tokenizers leaves out
            continue
        if (given := loaded.backend_tokenizer.token_to_id(token["content"])) != token["id"]:
            raise CheckpointError(
                f"{path}: tokenizer.json says that {token['content'][:80]!r} is {token['id']}, tokenizers gives it "
                f"{given}: a token is missing, or two have one id; download the file again, or save it with tokenizers"
            )
    settings = {name: getattr(loaded, name) for name in SPECIAL_NAMES}
    settings |= {
        "chat_template": loaded.chat_template,
        "model_max_length": loaded.model_max_length,
        "padding_side": loaded.padding_side,
    }
    return loaded.backend_tokenizer, settings


def _checked_rules(file: Path) -> Any:
    """The content of a tokenizer.json, whose numbers tokenizers can be given.

    By the largest it reserves memory; of two tokens with one id it takes one, by chance or by where they stand.
    """
    try:
        rules = json.loads(file.read_bytes())  # not parse_json: large, its keys are the library's matter
        largest = max(_sizes(rules))
        in_range = 0 <= largest <= LARGEST_ID
        twice = _id_of_two(rules)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file.parent}: tokenizer.json cannot be read ({error!r}); download it again") from None
    if not in_range:
        raise CheckpointError(
            f"{file.parent}: tokenizer.json cannot be read (the number {str(largest)[:40]} is out of range); "
            "download it again"
        )
    if twice is not None:
        raise CheckpointError(f"{file.parent}: tokenizer.json gives the id {twice} to two tokens; download it again")
    return rules


def _id_of_two(rules: Any) -> int | None:
    """An id that two tokens have, of the vocabulary or added; None = there is none. In a list every place is an id."""
    vocabulary = rules["model"]["vocab"]
    ids = dict(vocabulary) if isinstance(vocabulary, dict) else {}
    ids |= {token["content"]: token["id"] for token in rules.get("added_tokens") or ()}
    return next((number for number, count in Counter(ids.values()).most_common(1) if count > 1), None)


def _sizes(rules: Any) -> list[int]:
    """Ids of tokens and lengths of padding; one number at least."""
    vocabulary, padding = rules["model"]["vocab"], rules.get("padding")
    ids = vocabulary.values() if isinstance(vocabulary, dict) else ()
    strategy = padding["strategy"] if isinstance(padding, dict) else None
    fixed = strategy.values() if isinstance(strategy, dict) else ()
    multiple = padding.get("pad_to_multiple_of") if isinstance(padding, dict) else None
    return [*ids, *(token["id"] for token in rules.get("added_tokens") or ()), *fixed, multiple or 0]


def _read_tokenizer_config(path: Path) -> dict[str, Any]:
    """The content of tokenizer_config.json, nothing where there is none."""
    file = path / "tokenizer_config.json"
    config: dict[str, Any] = read_json(file, dict, CheckpointError, allow_nan=True) if file.is_file() else {}
    return config


def _from_sentencepiece(path: Path) -> tuple[Tokenizer, dict[str, Any]]:
    model = read_sentencepiece(path / "tokenizer.model")
    backend = sentencepiece_backend(model.pieces, dummy_prefix=model.dummy_prefix, byte_fallback=model.byte_fallback)
    settings: dict[str, Any] = dict(model.special_tokens())
    settings["chat_template"] = _read_tokenizer_config(path).get("chat_template")
    model.check_same_ids(backend)
    if settings.get("bos_token"):
        # LLaMA and Mistral begin with <s>; the file itself only says which piece it is
        _ensure_bos(backend, settings, settings["bos_token"], path)
    return backend, settings


def _from_gguf(path: Path) -> tuple[Tokenizer, dict[str, Any]]:
    metadata = read_header(path).metadata

    def field(name: str, default: Any = None) -> Any:
        return metadata.get(f"tokenizer.ggml.{name}", default)

    kind, pre_tokenizer, tokens = field("model"), field("pre"), field("tokens")
    if not tokens:
        raise CheckpointError(f"{path}: the GGUF file carries no tokenizer (tokenizer.ggml.tokens)")
    types, merges, scores = field("token_type") or [1] * len(tokens), field("merges") or [], field("scores")
    scores = scores or [0.0] * len(tokens)
    _check_lists(path, tokens, types, merges, scores)
    if kind == "gpt2":
        backend = _byte_level_backend(path, tokens, types, merges, pre_tokenizer)
        adds_bos = field("add_bos_token", pre_tokenizer == "llama-bpe")
    elif kind == "llama":
        pieces = list(zip(tokens, scores, types, strict=True))
        backend = sentencepiece_backend(pieces, dummy_prefix=field("add_space_prefix", True), byte_fallback=True)
        adds_bos = field("add_bos_token", True)
    else:
        raise CheckpointError(f"{path}: GGUF tokenizer model {kind!r} is not supported; supported: 'gpt2', 'llama'")
    ids = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding", "mask_token": "mask"}
    settings: dict[str, Any] = {}
    for name, key in ids.items():
        number = field(f"{key}_token_id")
        if number is None:
            continue
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < len(tokens):
            raise CheckpointError(
                f"{path}: tokenizer.ggml.{key}_token_id is {number!r}, the vocabulary has {len(tokens)} tokens"
            )
        settings[name] = tokens[number]
    settings["chat_template"] = metadata.get("tokenizer.chat_template")
    settings["model_max_length"] = metadata.get(f"{metadata.get('general.architecture')}.context_length")
    if adds_bos and settings.get("bos_token"):
        _ensure_bos(backend, settings, settings["bos_token"], path)
    if field("add_eos_token", False) and settings.get("eos_token"):
        append_eos(backend, settings["eos_token"], field("eos_token_id"))
    return backend, settings


def _check_lists(path: Path, tokens: Any, types: Any, merges: Any, scores: Any) -> None:
    """Whether a GGUF file's vocabulary is one: lists of one length and the right kinds, no token twice."""
    kinds = {"tokens": (tokens, str), "token_type": (types, int), "merges": (merges, str), "scores": (scores, float)}
    for name, (values, kind) in kinds.items():
        if not isinstance(values, list) or not all(type(value) is kind for value in values):
            raise CheckpointError(
                f"{path}: tokenizer.ggml.{name} is no list of {kind.__name__}; download the file again"
            )
        if name != "merges" and len(values) != len(tokens):
            raise CheckpointError(f"{path}: tokenizer.ggml.{name} has {len(values)} entries for {len(tokens)} tokens")
    if len(set(tokens)) < len(tokens):
        raise CheckpointError(f"{path}: tokenizer.ggml.tokens holds a token twice; download the file again")


def byte_level_splits() -> dict[str, Callable[[], PreTokenizer]]:
    """How the byte-level vocabularies split text before their merges, by llama.cpp's names."""
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split

    def split_by(pattern: str) -> Sequence:
        return Sequence([Split(Regex(pattern), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)])

    return {
        "smollm": lambda: Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]),
        "gpt-2": lambda: ByteLevel(add_prefix_space=False),
        "llama-bpe": lambda: split_by(LLAMA3_SPLIT),
        "qwen2": lambda: split_by(QWEN2_SPLIT),
    }


def _byte_level_backend(
    path: Path, tokens: list[str], types: list[int], merges: list[str], pre: str | None
) -> Tokenizer:
    """A byte-level BPE tokenizer; ``pre`` is llama.cpp's name for how text is split before the merges."""
    from tokenizers import AddedToken, Tokenizer, decoders
    from tokenizers.models import BPE
    from tokenizers.normalizers import NFC

    splits = byte_level_splits()
    if pre not in splits:
        raise CheckpointError(
            f"{path}: GGUF pre-tokenizer {pre!r} is not supported; supported: {', '.join(splits)}; "
            "give a directory with tokenizer.json instead"
        )
    vocabulary = {token: number for number, token in enumerate(tokens)}
    try:
        pairs = [(left, right) for left, right in (merge.split(" ", 1) for merge in merges)]
        backend = Tokenizer(BPE(vocab=vocabulary, merges=pairs, ignore_merges=pre == "llama-bpe"))
    except Exception as error:  # noqa: BLE001 - tokenizers raises no other, of a merge of what is no token
        raise CheckpointError(f"{path}: tokenizer.ggml.merges do not fit the tokens ({error})") from None
    backend.pre_tokenizer = splits[pre]()
    backend.decoder = decoders.ByteLevel()
    if pre == "qwen2":
        backend.normalizer = NFC()
    for token, kind in zip(tokens, types, strict=True):
        if kind == CONTROL:
            backend.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        elif kind == USER_DEFINED:
            backend.add_tokens([AddedToken(token, normalized=False)])
    return backend
