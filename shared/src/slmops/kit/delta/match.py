"""Which tensor of the base a tensor of the target came from: by its name, or by what is in it.

A pruned model's layers have other numbers, a converted one's other names. So a tensor is compared, by a sample of its
values, with all of the base's that have its size.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

import numpy as np

from slmops.kit.delta.coding import Bytes
from slmops.kit.delta.tensors import Part

_SAMPLES = 2048
_ALIKE = 0.5  # of the sampled values: the namesake is taken without a look at others
_RELATED = 0.1  # at least; independent codes agree in about one of 50
_CANDIDATES = 256


class Matcher:
    """`mapped` has the bytes of every base file by its path."""

    def __init__(self, base: Iterable[Part], mapped: Mapping[str, Bytes]) -> None:
        self._mapped = mapped
        self._named: dict[tuple[str, int], Part] = {}
        self._sized: dict[tuple[int, int], list[Part]] = defaultdict(list)
        self._samples: dict[Part, Bytes] = {}
        for part in base:
            if part.name:
                self._named.setdefault((part.name, part.width), part)
                self._sized[part.size_bytes, part.width].append(part)

    def origin(self, part: Part, data: Bytes) -> Part | None:
        """For a tensor with these bytes. One of another size is an origin by its name alone."""
        namesake = self._named.get((part.name, part.width))
        if namesake and namesake.size_bytes != part.size_bytes:
            return namesake
        sample = _sample(data, part.width)
        if namesake and self._likeness(namesake, sample) >= _ALIKE:
            return namesake
        others = self._sized[part.size_bytes, part.width][:_CANDIDATES]
        best = max(others, key=lambda other: self._likeness(other, sample), default=None)
        if best and self._likeness(best, sample) >= _RELATED:
            return best
        return namesake

    def _likeness(self, part: Part, sample: Bytes) -> float:
        if part not in self._samples:
            data = self._mapped[part.path][part.offset : part.end]
            self._samples[part] = _sample(data, part.width)
        return float(np.mean(self._samples[part] == sample))


def _sample(data: Bytes, width: int) -> Bytes:
    """Some values' highest byte and the one below it, where a value has two: the rest of a float is noise."""
    count = data.size // width
    places = np.linspace(0, count - 1, min(count, _SAMPLES)).astype(np.int64) * width + width - 1
    if width == 1:
        return data[places]
    return np.concatenate([data[places], data[places - 1]])
