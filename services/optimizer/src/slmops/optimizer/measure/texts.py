"""The evaluation text and the calibration text, which must not overlap.

A method that has seen the evaluation text looks better than it is. Therefore a pair is refused if more than 1% of the
13-grams of the evaluation text are in the calibration text. GPT-3's authors also used 13-grams to detect contamination
(Brown et al., Language Models are Few-Shot Learners, 2020, appendix C).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import distributions
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from slmops.contracts.descriptor import Digest, digest_of
from slmops.contracts.errors import InvalidMessage, InvalidModel, NotFound

GRAM_WORDS = 13
MAX_OVERLAP = 0.01
_EVALUATION = files("slmops.optimizer") / "data" / "evaluation.txt"
_README_CHARACTERS = 10_000  # a few READMEs contain repetitive changelogs of 100,000 characters

Tokens = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Text:
    """A text. The constructor raises `InvalidMessage` if `content` is blank."""

    name: str
    content: str

    def __post_init__(self) -> None:
        if not self.content.strip():
            raise InvalidMessage("the text is empty", where=self.name, fix="Use a text of a few thousand words.")

    @cached_property
    def digest(self) -> Digest:
        return digest_of(self.content.encode())


@dataclass(frozen=True)
class Texts:
    """A pair of texts. The constructor raises `InvalidMessage` if they overlap by more than `MAX_OVERLAP`."""

    evaluation: Text
    calibration: Text

    def __post_init__(self) -> None:
        share = overlap(self.evaluation.content, self.calibration.content)
        if share > MAX_OVERLAP:
            raise InvalidMessage(
                f"{share:.1%} of the evaluation text is in the calibration text, more than {MAX_OVERLAP:.0%}",
                where=f"{self.evaluation.name}, {self.calibration.name}",
                fix="Use an evaluation text that is not part of the calibration text.",
            )


def read_texts(evaluation: Sequence[Path] = (), calibration: Sequence[Path] = ()) -> Texts:
    """Reads both texts from files; without files, uses the defaults. Raises `NotFound` and `InvalidMessage`."""
    text = evaluation_text(evaluation)
    return Texts(text, calibration_text(calibration, text))


def evaluation_text(paths: Sequence[Path] = ()) -> Text:
    """Joins the files; without files, returns the bundled text. Raises `NotFound` and `InvalidMessage`."""
    return _from_files(paths) if paths else Text("evaluation.txt", _EVALUATION.read_text(encoding="utf-8"))


def calibration_text(paths: Sequence[Path], evaluation: Text) -> Text:
    """Joins the files; without files, returns prose that is installed on this machine.

    The installed prose is Python's language reference and the READMEs of the installed distributions, about 300,000
    tokens with our dependencies. A part that shares 13 consecutive words with the evaluation text is left out. The
    installed prose differs between machines: compare `digest`. Raises `NotFound` and `InvalidMessage`.
    """
    if paths:
        return _from_files(paths)
    excluded = set(_grams(evaluation.content))
    return Text("installed", "\n\n".join(part for part in _installed() if excluded.isdisjoint(_grams(part))))


def overlap(evaluation: str, calibration: str) -> float:
    """Returns the share of the evaluation text's word 13-grams that are in the calibration text, 0 to 1; ignores case.

    An evaluation text shorter than 13 words is one gram.
    """
    size = min(GRAM_WORDS, len(evaluation.split()))
    grams = set(_grams(evaluation, size))
    return len(grams.intersection(_grams(calibration, size))) / len(grams)


def calibration(
    tokenizer: Any, windows: int, length: int, seed: int, texts: Texts, fewest: int | None = None
) -> Tokens:
    """Returns random tokens [windows, length] of the calibration text; no part of the text occurs twice.

    The same arguments give the same tokens. A short text gives fewer windows. Raises `InvalidMessage` for fewer than
    `fewest` windows (None: `windows`).
    """
    found = windows_of(tokenizer, texts.calibration, length)
    if len(found) < (needed := windows if fewest is None else fewest):
        raise InvalidMessage(
            f"the calibration text has {len(found)} windows of {length} tokens, fewer than the required {needed}",
            where=texts.calibration.name,
            fix="Use more text, or calibrate with fewer windows.",
        )
    return found[np.random.default_rng(seed).permutation(len(found))[:windows]]


def windows_of(tokenizer: Any, text: Text, length: int) -> Tokens:
    """Returns every whole window of `length` tokens, in order [windows, length].

    Each window begins with the tokenizer's BOS token, if the tokenizer adds one: some models do not work without it.
    Raises `InvalidModel` if the tokenizer returns no tokens.
    """
    ids = tokenizer(text.content, add_special_tokens=False, verbose=False)["input_ids"]
    if not ids:
        raise InvalidModel("the tokenizer returns no tokens for a text", where=text.name, fix="Check tokenizer.json.")
    begin = [token for token in tokenizer("")["input_ids"][:1] if token == tokenizer.bos_token_id]
    step = length - len(begin)
    rows = np.array(ids[: len(ids) // step * step], dtype=np.int64).reshape(-1, step)
    return np.concatenate([np.tile(np.array(begin, dtype=np.int64), (len(rows), 1)), rows], axis=1)


def _grams(text: str, size: int = GRAM_WORDS) -> Iterator[tuple[str, ...]]:
    words = text.casefold().split()
    return zip(*(words[start:] for start in range(size)), strict=False)


def _installed() -> Iterable[str]:
    from pydoc_data.topics import topics

    yield from (topics[name] for name in sorted(topics))
    readmes = {str(found.name).casefold(): found.read_text("METADATA") or "" for found in distributions()}
    for name in sorted(readmes):
        if not name.startswith(
            "slmops"
        ):  # our own READMEs change during development, and the calibration text should not
            yield readmes[name].partition("\n\n")[2][:_README_CHARACTERS]


def _from_files(paths: Sequence[Path]) -> Text:
    try:
        content = "\n\n".join(path.read_text(encoding="utf-8") for path in paths)
    except UnicodeDecodeError as error:
        raise InvalidMessage(
            f"the text is not UTF-8: {error}", where=str(paths[0]), fix="Convert it to UTF-8."
        ) from error
    except OSError as error:
        raise NotFound(f"the text cannot be read: {error.strerror}", where=str(error.filename)) from error
    return Text("+".join(path.name for path in paths), content)
