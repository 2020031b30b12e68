"""Texts for evaluation and calibration, from plain text or from JSON lines, and how much of them is the same. Pure.

A method that has seen the evaluation text looks better than it is. Therefore a pair is refused if more than 1% of the
13-grams of the evaluation text are in the calibration text. GPT-3's authors also used 13-grams to detect contamination
(Brown et al., Language Models are Few-Shot Learners, 2020, appendix C).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath

from slmops.contracts.errors import InvalidMessage
from slmops.contracts.json_lines import loads, numbered_lines

GRAM_WORDS = 13
MAX_OVERLAP = 0.01
_EXAMPLE = 'Write {"text": "…"} in each line, or use a plain text file with another suffix than .jsonl.'


def texts_in(path: str, data: bytes) -> tuple[str, ...]:
    """Returns the texts of a file: one per line of a `.jsonl` file, `{"text": "…"}`; otherwise the whole file.

    Raises `InvalidMessage` with the number of a bad line, and for a file that is blank or not UTF-8.
    """
    content = decoded(path, data)
    if PurePosixPath(path).suffix == ".jsonl":
        found = tuple(_text(path, number, line) for number, line in numbered_lines(content))
    else:
        found = (content.replace("\r\n", "\n"),) if content.strip() else ()
    if not found:
        raise InvalidMessage("the text is empty", where=path, fix="Use a text of a few thousand words.")
    return found


def decoded(path: str, data: bytes) -> str:
    """Decodes UTF-8. Raises `InvalidMessage` for other encodings, a byte order mark, and NUL characters."""
    try:
        content = data.decode()
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise InvalidMessage(
            f"the text is not UTF-8: {error.reason}", where=f"{path} line {line}", fix="Convert it to UTF-8."
        ) from error
    if content.startswith("\ufeff"):
        raise InvalidMessage("the file begins with a byte order mark", where=path, fix="Save it as UTF-8 without BOM.")
    if "\0" in content:
        line = content[: content.index("\0")].count("\n") + 1
        raise InvalidMessage("the file has a NUL character", where=f"{path} line {line}", fix="Remove it.")
    return content


def overlap(evaluation: str, calibration: str) -> float:
    """Returns the share of the evaluation text's word 13-grams that are in the calibration text, 0 to 1; ignores case.

    An evaluation text shorter than 13 words is one gram. Takes time and memory in proportion to both texts.
    """
    size = min(GRAM_WORDS, len(evaluation.split()))
    found = set(grams(evaluation, size))
    return len(found.intersection(grams(calibration, size))) / len(found)


def grams(text: str, size: int = GRAM_WORDS) -> Iterator[tuple[str, ...]]:
    """Yields the runs of `size` words of a text, in lower case."""
    words = text.casefold().split()
    return zip(*(words[start:] for start in range(size)), strict=False)


def _text(path: str, number: int, line: str) -> str:
    where = f"{path} line {number}"
    try:
        data = loads(line)
    except ValueError as error:
        raise InvalidMessage(f"the line is not valid JSON: {error}", where=where, fix=_EXAMPLE) from None
    if not isinstance(data, dict):
        raise InvalidMessage("the line is not a JSON object", where=where, fix=_EXAMPLE)
    if unknown := sorted(data.keys() - {"text"}):
        raise InvalidMessage(f"unknown field {unknown[0][:100]!r}", where=where, fix=_EXAMPLE)
    text = data.get("text")
    if not isinstance(text, str) or not text.strip():
        raise InvalidMessage("the field text is missing, blank or not a string", where=where, fix=_EXAMPLE)
    return text
