"""Remembers which numbers of a sequence were seen, in little space: the highest, and the ranges that are missing below.

Numbers come out of order when several processes share the work or a message is redelivered, and some never come. So the
highest number alone would lose batches.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

MOST_GAPS: Final = 64
"""With more missing ranges than this, the lowest is forgotten: its numbers count as seen."""


@dataclass(frozen=True, slots=True)
class Seen:
    """The numbers from 1 to `highest`, except those in `gaps`: ranges (first, last), ascending and apart."""

    highest: int = 0
    gaps: tuple[tuple[int, int], ...] = ()

    def __contains__(self, number: int) -> bool:
        return number <= self.highest and not any(first <= number <= last for first, last in self.gaps)

    def also(self, number: int) -> Seen:
        """Returns these numbers and one more, which is at least 1. O(gaps)."""
        if number > self.highest:
            gaps = [*self.gaps, *_range(self.highest + 1, number - 1)]
            return Seen(number, tuple(gaps[-MOST_GAPS:]))
        return Seen(self.highest, tuple(list(_without(number, self.gaps))[-MOST_GAPS:]))


def _without(number: int, gaps: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    for first, last in gaps:
        if first <= number <= last:
            yield from _range(first, number - 1)
            yield from _range(number + 1, last)
        else:
            yield first, last


def _range(first: int, last: int) -> list[tuple[int, int]]:
    return [(first, last)] if first <= last else []
