"""What goes into an encoder: texts and [instruction, text] pairs, taken in ahead of the model, with a progress bar."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from typing import Any, TypeVar

from bivec.engine.errors import BivecError
from bivec.engine.text_format import Prompt

Item = TypeVar("Item")


def one_ahead(items: Iterable[Item]) -> Iterator[Item]:
    """The items in their order; while the caller works with one, a thread makes the next."""
    iterator = iter(items)

    def take() -> list[Item]:
        return list(islice(iterator, 1))  # none at the end

    with ThreadPoolExecutor(max_workers=1) as thread:
        found = take()
        while found:
            following = thread.submit(take)
            yield found[0]
            found = following.result()


@contextmanager
def progress_bar(
    total: int, show: bool | None, *, done: int = 0, label: str = "encode"
) -> Iterator[Callable[[int], object]]:
    """A bar of texts, advanced by what is yielded; ``show=None`` = only for more than 1,000."""
    from tqdm import tqdm

    hidden = not (total > 1000 if show is None else show)
    with tqdm(total=total, initial=done, desc=label, unit="text", disable=hidden, leave=False) as bar:
        yield bar.update


def as_list(sentences: str | Iterable[Any]) -> list[Any]:
    """One text or many, as a list.

    Raises:
        BivecError: neither.
    """
    if isinstance(sentences, str):
        return [sentences]
    try:
        return list(sentences)
    except TypeError:
        raise BivecError(f"expected a text or a list of texts, got {type(sentences).__name__}") from None


def split_pair(item: str | Sequence[str], instruction: str, index: int) -> tuple[str, str]:
    """(instruction, text) of an input; llm2vec's pairs may carry a third element, which counts for nothing."""
    if isinstance(item, str):
        return instruction, item
    if isinstance(item, (list, tuple)) and len(item) >= 2 and all(isinstance(part, str) for part in item[:2]):
        return item[0], item[1]
    raise BivecError(f"text {index} is {type(item).__name__}, expected a str or an [instruction, text] pair")


def as_texts(sentences: str | Sequence[str]) -> list[str]:
    """One text or many, as a list.

    Raises:
        BivecError: an input that is no text.
    """
    texts = as_list(sentences)
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise BivecError(f"text {index} is {type(text).__name__}, expected a str")
    return texts


def text_head(prompts: Mapping[str, str], instruction: str | None, prompt: str | None, prompt_name: str | None) -> str:
    """What stands before a text: an instruction, a :class:`Prompt`, or nothing.

    Args:
        prompts: of the encoder, by name.
        instruction: see :meth:`bivec.engine.encoder.Encoder.encode`, as the following.
        prompt: to the letter.
        prompt_name: one of ``prompts``.

    Raises:
        BivecError: an unknown name, or more than one argument.
    """
    if sum(given is not None for given in (instruction, prompt, prompt_name)) > 1:
        raise BivecError("give one of instruction, prompt and prompt_name")
    if prompt_name is not None:
        if prompt_name not in prompts:
            names = ", ".join(prompts) or "none"
            raise BivecError(f"prompt_name {prompt_name!r} is unknown; the encoder has {names}")
        prompt = prompts[prompt_name]
    return instruction or "" if prompt is None else Prompt(prompt)
