"""The evaluation text and the calibration text, which must not overlap (`slmops.contracts.prompts.texts`)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
from slmops.contracts.prompts.texts import MAX_OVERLAP, grams, overlap, texts_in

_EVALUATION = files("slmops.optimizer") / "data" / "evaluation.txt"
_README_CHARACTERS = 10_000  # a few READMEs contain repetitive changelogs of 100,000 characters

Tokens = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Text:
    """A text, joined from `count` texts. The constructor raises `InvalidMessage` if `content` is blank.

    `own`: it was given by somebody, and is not one of the defaults.
    """

    name: str
    content: str
    count: int = 1
    own: bool = False

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
    excluded = set(grams(evaluation.content))
    return Text("installed", "\n\n".join(part for part in _installed() if excluded.isdisjoint(grams(part))))


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

    Raises `InvalidModel` if the tokenizer returns no tokens.
    """
    return windows_from(tokenizer, tokens_of(tokenizer, text), length)


def tokens_of(tokenizer: Any, text: Text) -> Sequence[int]:
    """Returns the tokens of a text, without special tokens. Raises `InvalidModel` if there are none."""
    ids: Sequence[int] = tokenizer(text.content, add_special_tokens=False, verbose=False)["input_ids"]
    if not ids:
        raise InvalidModel("the tokenizer returns no tokens for a text", where=text.name, fix="Check tokenizer.json.")
    return ids


def windows_from(tokenizer: Any, ids: Sequence[int], length: int) -> Tokens:
    """Returns every whole window of `length` tokens, in order [windows, length].

    Each window begins with the tokenizer's BOS token, if the tokenizer adds one: some models do not work without it.
    """
    begin = [token for token in tokenizer("")["input_ids"][:1] if token == tokenizer.bos_token_id]
    step = length - len(begin)
    rows = np.array(ids[: len(ids) // step * step], dtype=np.int64).reshape(-1, step)
    return np.concatenate([np.tile(np.array(begin, dtype=np.int64), (len(rows), 1)), rows], axis=1)


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
        parts = [text for path in paths for text in texts_in(str(path), path.read_bytes())]
    except OSError as error:
        raise NotFound(f"the text cannot be read: {error.strerror}", where=str(error.filename)) from error
    return Text("+".join(path.name for path in paths), "\n\n".join(parts), len(parts), own=True)
