"""Two texts that are kept apart: one to judge a variant by, one that the passes may learn from.

A method that has seen the text it is judged by looks better than it is. So the pair is refused if more than 1% of the
first one's 13-grams are in the second; 13 words in a row are what GPT-3's authors took for contamination (Brown et al.,
Language Models are Few-Shot Learners, 2020, appendix C).
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
_README_CHARACTERS = 10_000  # a few packages have changelogs of a hundred thousand, which are all alike

Tokens = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Text:
    """`content` is not blank: that is refused when a text is made, with `InvalidMessage`."""

    name: str
    content: str

    def __post_init__(self) -> None:
        if not self.content.strip():
            raise InvalidMessage("the text is empty", where=self.name, fix="Give a text of a few thousand words.")

    @cached_property
    def digest(self) -> Digest:
        return digest_of(self.content.encode())


@dataclass(frozen=True)
class Texts:
    """A pair that is kept apart. Raises `InvalidMessage` if `calibration` knows the evaluation text."""

    evaluation: Text
    calibration: Text

    def __post_init__(self) -> None:
        share = overlap(self.evaluation.content, self.calibration.content)
        if share > MAX_OVERLAP:
            raise InvalidMessage(
                f"{share:.1%} of the evaluation text is in the calibration text, at most {MAX_OVERLAP:.0%} may be",
                where=f"{self.evaluation.name}, {self.calibration.name}",
                fix="Judge a variant by a text that nothing was calibrated on.",
            )


def read_texts(evaluation: Sequence[Path] = (), calibration: Sequence[Path] = ()) -> Texts:
    """From files, or what is bundled where none are given. Raises `NotFound` and `InvalidMessage`."""
    judged = evaluation_text(evaluation)
    return Texts(judged, calibration_text(calibration, judged))


def evaluation_text(paths: Sequence[Path] = ()) -> Text:
    """The files one after the other; without any, the bundled text. Raises `NotFound` and `InvalidMessage`."""
    return _from_files(paths) if paths else Text("evaluation.txt", _EVALUATION.read_text(encoding="utf-8"))


def calibration_text(paths: Sequence[Path], evaluation: Text) -> Text:
    """The files one after the other; without any, prose that is on every machine which can run this.

    That is the language reference inside Python and the READMEs of the distributions that are installed, some 300,000
    tokens beside our dependencies. One that shares 13 words in a row with the evaluation text is left out. What is
    installed differs between machines: `digest` says whether it is the same text. Raises as `evaluation_text`.
    """
    if paths:
        return _from_files(paths)
    judged = set(_grams(evaluation.content))
    return Text("installed", "\n\n".join(part for part in _installed() if judged.isdisjoint(_grams(part))))


def overlap(evaluation: str, calibration: str) -> float:
    """Share of the evaluation text's 13-grams of words that occur in the calibration text, whatever the case, 0 to 1.

    An evaluation text shorter than 13 words is one gram.
    """
    size = min(GRAM_WORDS, len(evaluation.split()))
    judged = set(_grams(evaluation, size))
    return len(judged.intersection(_grams(calibration, size))) / len(judged)


def calibration(
    tokenizer: Any, windows: int, length: int, seed: int, texts: Texts, fewest: int | None = None
) -> Tokens:
    """Tokens [windows, length] of the calibration text: the same for the same arguments, no piece of text twice.

    A text that is too short for so many gives what it has. Raises `InvalidMessage` for less than `fewest` (None: all).
    """
    found = windows_of(tokenizer, texts.calibration, length)
    if len(found) < (needed := windows if fewest is None else fewest):
        raise InvalidMessage(
            f"the calibration text makes {len(found)} windows of {length} tokens, {needed} are needed",
            where=texts.calibration.name,
            fix="Give more text, or calibrate with fewer windows.",
        )
    return found[np.random.default_rng(seed).permutation(len(found))[:windows]]


def windows_of(tokenizer: Any, text: Text, length: int) -> Tokens:
    """Every whole window of `length` tokens, in order [windows, length].

    Each begins with the token that the tokenizer puts before a text, if it does: some models are lost without it.
    Raises `InvalidModel` if the tokenizer makes no tokens.
    """
    ids = tokenizer(text.content, add_special_tokens=False, verbose=False)["input_ids"]
    if not ids:
        raise InvalidModel("the tokenizer makes no tokens of a text", where=text.name, fix="Check tokenizer.json.")
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
        if not name.startswith("slmops"):  # ours change while we work, and a calibration should not
            yield readmes[name].partition("\n\n")[2][:_README_CHARACTERS]


def _from_files(paths: Sequence[Path]) -> Text:
    try:
        content = "\n\n".join(path.read_text(encoding="utf-8") for path in paths)
    except UnicodeDecodeError as error:
        raise InvalidMessage(f"the text is not UTF-8: {error}", where=str(paths[0]), fix="Convert it.") from error
    except OSError as error:
        raise NotFound(f"the text cannot be read: {error.strerror}", where=str(error.filename)) from error
    return Text("+".join(path.name for path in paths), content)
