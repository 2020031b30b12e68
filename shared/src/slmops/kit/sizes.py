"""Parses and formats sizes in binary units, which NATS uses, too."""

from __future__ import annotations

import re

from slmops.contracts.errors import InvalidMessage

_UNITS = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_TOO_LARGE = 1 << 63
"""The server uses signed 64-bit integers."""
_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?(B|KiB|MiB|GiB|TiB)")


def parse_size(text: str) -> int:
    """Returns the bytes of a text like `2GiB` or `1.5 GiB`. Raises `InvalidMessage`."""
    found = _SIZE.fullmatch(text)
    if found is None or not 0 < (size_bytes := int(float(found[1]) * _UNITS[found[2]])) < _TOO_LARGE:
        raise InvalidMessage(f"{text!r} is not a size", fix="Write a number and B, KiB, MiB, GiB or TiB: 2GiB, 512MiB.")
    return size_bytes


def size_text(size_bytes: int) -> str:
    """Returns a size in the largest unit that gives at least 1, in the format of `parse_size`: `2GiB`, `1.5GiB`."""
    unit = next((u for u in reversed(_UNITS) if size_bytes >= _UNITS[u]), "B")
    return f"{size_bytes / _UNITS[unit]:.4g}{unit}"
