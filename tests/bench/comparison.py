"""Compares a figure of slmops with the same figure of the bare tool, measured alternately under the same load."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Literal

from slmops.local.demo.story import Step

Unit = Literal["tokens/s", "MB/s", "per s", "s"]
Measure = Callable[[], Awaitable[float]]


@dataclass(frozen=True)
class Comparison:
    """One figure per round of each side. Larger rates (`per s` and similar) are better, and fewer seconds."""

    what: str
    bare_is: str
    unit: Unit
    bare: Sequence[float]
    ours: Sequence[float]

    @property
    def ratios(self) -> list[float]:
        """Returns per round our speed divided by that of the bare tool: 1 is as fast, 0.5 half as fast."""
        pairs = zip(self.bare, self.ours, strict=True)
        return [bare / ours if self.unit == "s" else ours / bare for bare, ours in pairs]

    @property
    def ratio(self) -> float:
        return median(self.ratios)

    def as_json(self) -> dict[str, Any]:
        return {
            "what": self.what,
            "bare_is": self.bare_is,
            "unit": self.unit,
            "bare": [round(value, 4) for value in self.bare],
            "ours": [round(value, 4) for value in self.ours],
            "ratios": [round(value, 3) for value in self.ratios],
            "ratio": round(self.ratio, 3),
        }


@dataclass(frozen=True)
class Measured:
    """The result of a benchmark. `details` breaks down the time."""

    comparisons: Sequence[Comparison]
    details: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Place:
    """The environment of a benchmark: an empty `scratch` folder, a `cache` kept between runs, and a progress `step`."""

    scratch: Path
    cache: Path
    step: Step

    async def side_by_side(
        self, what: str, unit: Unit, bare_is: str, bare: Measure, ours: Measure, rounds: int = 3
    ) -> Comparison:
        """Measures bare and ours alternately, so that other load on the machine affects both."""
        found: tuple[list[float], list[float]] = ([], [])
        for number in range(1, rounds + 1):
            for figures, measure, side in ((found[0], bare, "bare"), (found[1], ours, "ours")):
                self.step.progress(f"{what}, round {number} of {rounds}, {side}")
                figures.append(await measure())
        return Comparison(what, bare_is, unit, *found)
