"""Pages of long lists: opaque cursors, and how many items fit into an answer.

A cursor holds the position after which the next page begins, so a page costs the same wherever it is in the list, and
an item that is added or removed in between moves no other item to another page.
"""

from __future__ import annotations

import json
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Iterable
from typing import Final, TypeVar

from pydantic import BaseModel

from slmops.contracts.errors import InvalidCursor

PAGE_BYTES: Final = 1 << 19
"""Where a page is cut: half of NATS' default limit of a message. A single item may be larger."""
_CURSOR_BYTES: Final = 400
_LARGEST: Final = 1 << 53
M = TypeVar("M", bound=BaseModel)


def cursor(kind: str, *position: str | float) -> str:
    """Returns the cursor of a list of this kind, after an item at `position`."""
    return urlsafe_b64encode(json.dumps([kind, *position]).encode()).decode().rstrip("=")


def position(kind: str, text: str, *types: type[str] | type[float]) -> tuple[str | float, ...]:
    """Returns the position in a cursor. Raises `InvalidCursor` for a text that `cursor` did not make for this kind."""
    try:
        if len(text) > _CURSOR_BYTES:
            raise ValueError
        found = json.loads(urlsafe_b64decode(text.encode("ascii") + b"=" * (-len(text) % 4)))
        if not isinstance(found, list) or [type(item) for item in found] != [str, *types] or found[0] != kind:
            raise ValueError
        # PostgreSQL takes no NUL, and no text may be compared with half a character.
        if any("\0" in item for item in found if isinstance(item, str) and item.encode()):
            raise ValueError
        if not all(abs(item) <= _LARGEST for item in found if isinstance(item, float)):  # false for NaN
            raise ValueError
    except (ValueError, RecursionError) as error:
        raise InvalidCursor(
            "the cursor is not one of this list", where=kind, fix="Use the cursor of an answer, or ask without one."
        ) from error
    return tuple(found[1:])


def fitting(items: Iterable[M], limit_bytes: int = PAGE_BYTES) -> list[M]:
    """Returns the leading items that fit into an answer, at least one if there is one. Reads no item beyond those and
    the next one."""
    taken: list[M] = []
    used = 0
    for item in items:
        used += len(item.model_dump_json(by_alias=True).encode())
        if taken and used > limit_bytes:
            break
        taken.append(item)
    return taken
