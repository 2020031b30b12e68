"""JSON that people write: one value per line, and no key twice. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any


def numbered_lines(text: str) -> Iterator[tuple[int, str]]:
    """Yields each line that is not blank with its number, from 1.

    Only a line feed ends a line. `str.splitlines` also splits at U+2028, U+0085 and others, which a JSON string may
    contain.
    """
    return ((number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip())


def loads(text: str | bytes) -> Any:
    """Parses JSON. Raises `ValueError` if it is not JSON, has a NaN or an infinity, or is nested too deeply, and
    `RepeatedKey` if an object has a key twice.

    Python's `json` and pydantic keep the last of two values, so a reader may see another value than the author.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


class RepeatedKey(ValueError):
    """An object has a key twice."""


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a JSON number")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise RepeatedKey(f"the key {twice[:100]!r} occurs twice")
    return found
