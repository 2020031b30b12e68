"""The Pareto front: the variants that no other one is at least as good as in everything.

Everything is bytes and KL, where less is better, and tokens/s, where more is. Limits play no part: what the front says
of recipes holds for every device.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict

from slmops.optimizer.domain.candidate import Candidate


class Front(BaseModel):
    """Candidates without finite measurements are in neither."""

    model_config = ConfigDict(frozen=True)

    recipes: tuple[str, ...] = ()
    """Those that nothing dominates, the smallest first."""
    dominated: dict[str, str] = {}
    """Each other recipe, and one of `recipes` that is no worse in anything and better in something."""


class Point(NamedTuple):
    """Of each, less is better."""

    bytes: float
    kl: float
    slowness: float

    def dominates(self, other: Point) -> bool:
        return self != other and all(mine <= theirs for mine, theirs in zip(self, other, strict=True))


def front(candidates: Iterable[Candidate]) -> Front:
    """Two that measure the same are both on the front, or neither."""
    points = {c.recipe: point for c in candidates if (point := _point(c))}
    best = [name for name in points if not any(other.dominates(points[name]) for other in points.values())]
    best.sort(key=lambda name: points[name])
    others = [name for name in points if name not in best]
    by = {name: next(one for one in best if points[one].dominates(points[name])) for name in others}
    return Front(recipes=tuple(best), dominated=by)


def on_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the `points` that no other dominates, where less is better in both, along the first coordinate."""
    order = sorted(range(len(points)), key=points.__getitem__)
    found: list[int] = []
    for index in order:
        if not found or points[index][1] < points[found[-1]][1]:
            found.append(index)
    return found


def _point(candidate: Candidate) -> Point | None:
    e = candidate.evaluation
    if e is None or e.kl is None or e.tokens_per_s is None:
        return None
    point = Point(e.bytes, e.kl, -e.tokens_per_s)
    return point if all(map(math.isfinite, point)) else None
