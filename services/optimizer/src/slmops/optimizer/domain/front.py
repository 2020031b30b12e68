"""Computes the Pareto front: the variants that no other variant dominates.

The criteria are bytes and KL (less is better) and tokens/s (more is better). Limits are ignored, so the front is the
same for every device.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict

from slmops.optimizer.domain.candidate import Candidate


class Front(BaseModel):
    """The front and the dominated recipes. Candidates without finite measurements are in neither."""

    model_config = ConfigDict(frozen=True)

    recipes: tuple[str, ...] = ()
    """The recipes that no other dominates, the smallest first."""
    dominated: dict[str, str] = {}
    """Each other recipe, with one of `recipes` that dominates it: no criterion is worse, at least one is better."""


class Point(NamedTuple):
    """The criteria of one variant; for each, less is better."""

    bytes: float
    kl: float
    slowness: float

    def dominates(self, other: Point) -> bool:
        return self != other and all(mine <= theirs for mine, theirs in zip(self, other, strict=True))


def front(candidates: Iterable[Candidate]) -> Front:
    """Computes the front. Of two candidates with equal measurements, both are on the front or neither is."""
    points = {c.recipe: point for c in candidates if (point := _point(c))}
    best = [name for name in points if not any(other.dominates(points[name]) for other in points.values())]
    best.sort(key=lambda name: points[name])
    others = [name for name in points if name not in best]
    dominated = {name: next(one for one in best if points[one].dominates(points[name])) for name in others}
    return Front(recipes=tuple(best), dominated=dominated)


def on_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Returns the indices of the points that no other dominates, sorted by the first coordinate. Less is better."""
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
