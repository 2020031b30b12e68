"""Finds the base tensor from which a target tensor came, by its name or by its values.

A pruned model's layers have other numbers, and a converted model's tensors have other names. So a sample of a tensor's
values is compared with all base tensors of the same size. If none is similar, a part of the tensor may match: packed
matrices change size with the precision of their parts, and a vocabulary grows. So the tensor is aligned at the start
and at the end with its siblings, whose names differ from its name only in digits.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from slmops.kit.delta.coding import Bytes
from slmops.kit.delta.tensors import Part

_SAMPLES = 2048
_ALIKE = 0.5  # share of equal samples from which the tensor of the same name is taken without comparing others
_RELATED = 0.1  # lowest share of equal samples of a related tensor; independent codes agree in about one of 50
_CANDIDATES = 256
_DIGITS = re.compile(r"\d+(?=[^.]*$)")  # in the last part of a name: `weight_q0_codes`


@dataclass(frozen=True)
class Origin:
    """The origin of `size_bytes` of a tensor from `start` on: the base's file `path` at `offset`."""

    path: str
    offset: int
    size_bytes: int
    start: int = 0

    @property
    def end(self) -> int:
        return self.start + self.size_bytes


class Matcher:
    """Finds origins among the parts of a base. `mapped` has the bytes of every base file by path."""

    def __init__(self, base: Iterable[Part], mapped: Mapping[str, Bytes]) -> None:
        self._mapped = mapped
        self._named: dict[tuple[str, int], Part] = {}
        self._sized: dict[tuple[int, int], list[Part]] = defaultdict(list)
        self._samples: dict[Part, Bytes] = {}
        self._siblings: dict[tuple[str, int], list[Part]] = defaultdict(list)
        for part in base:
            if part.name:
                self._named.setdefault((part.name, part.width), part)
                self._sized[part.size_bytes, part.width].append(part)
                self._siblings[_DIGITS.sub("#", part.name), part.width].append(part)

    def origin(self, part: Part, data: Bytes) -> Origin | None:
        """Returns the origin of a tensor whose bytes are `data`."""
        namesake = self._named.get((part.name, part.width))
        if namesake and namesake.size_bytes != part.size_bytes:
            namesake = None
        sample = _sample(data, part.width)
        if namesake and self._likeness(namesake, sample) >= _ALIKE:
            return _whole(namesake)
        others = self._sized[part.size_bytes, part.width][:_CANDIDATES]
        best = max(others, key=lambda other: self._likeness(other, sample), default=None)
        if best and self._likeness(best, sample) >= _RELATED:
            return _whole(best)
        laid = max(self._laid(part, data), key=lambda found: found[0] * found[1].size_bytes, default=None)
        if laid:
            return laid[1]
        return _whole(namesake) if namesake else None

    def _laid(self, part: Part, data: Bytes) -> Iterator[tuple[float, Origin]]:
        """Yields the related alignments with siblings of another size, each with its share of equal samples."""
        for other in self._siblings[_DIGITS.sub("#", part.name), part.width][:_CANDIDATES]:
            longer, size = part.size_bytes - other.size_bytes, min(part.size_bytes, other.size_bytes)
            if not longer or longer % part.width:
                continue
            at_end = Origin(other.path, other.offset + max(0, -longer), size, max(0, longer))
            for found in (Origin(other.path, other.offset, size), at_end):
                before = self._mapped[other.path][found.offset : found.offset + size]
                alike = np.mean(_sample(before, part.width) == _sample(data[found.start : found.end], part.width))
                if alike >= _RELATED:
                    yield float(alike), found

    def _likeness(self, part: Part, sample: Bytes) -> float:
        if part not in self._samples:
            data = self._mapped[part.path][part.offset : part.end]
            self._samples[part] = _sample(data, part.width)
        return float(np.mean(self._samples[part] == sample))


def _whole(part: Part) -> Origin:
    return Origin(part.path, part.offset, part.size_bytes)


def _sample(data: Bytes, width: int) -> Bytes:
    """Returns the two highest bytes (or the only byte) of some values. The other bytes of a float are noise."""
    count = data.size // width
    places = np.linspace(0, count - 1, min(count, _SAMPLES)).astype(np.int64) * width + width - 1
    if width == 1:
        return data[places]
    return np.concatenate([data[places], data[places - 1]])
