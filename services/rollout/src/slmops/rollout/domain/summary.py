"""The fleet in numbers, from the numbers of gateways that agree in everything that is counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Final, NamedTuple

from slmops.contracts.commands import Attention, FleetSummary, Standing, Tally

NOTHING: Final = "none"
"""The version of a gateway that runs nothing yet, and the profile of a blueprint that was not applied yet."""
MOST_VALUES: Final = 50
"""How many values a tally lists. Gateways report their versions themselves, so there may be any number."""


class Cell(NamedTuple):
    """A number of gateways that agree in these values. `version` None: they run nothing."""

    blueprint: str
    standing: Standing
    phase: str
    version: str | None
    failed: bool
    dropped: bool
    gateways: int


class Counted(NamedTuple):
    """Numbers of gateways that are not revoked: offline, with a wrong clock, with a credential that is due."""

    offline: int
    clock: int
    credential: int


def summarize(cells: Sequence[Cell], profiles: Mapping[str, str], counted: Counted, now: datetime) -> FleetSummary:
    """Returns the summary. `profiles`: blueprint → profile. `cells` are those of every standing."""
    counting = [cell for cell in cells if cell.standing is not Standing.REVOKED]
    gateways = _sum(counting)
    return FleetSummary(
        gateways=gateways,
        online=max(0, gateways - counted.offline),
        offline=counted.offline,
        standing=_tally(cells, lambda cell: cell.standing.value),
        phase=_tally(counting, lambda cell: cell.phase),
        version=_tally(counting, lambda cell: cell.version or NOTHING),
        blueprint=_tally(counting, lambda cell: cell.blueprint),
        profile=_tally(counting, lambda cell: profiles.get(cell.blueprint, NOTHING)),
        attention=Tally(
            counts={
                Attention.REVOKED: _sum(cells) - gateways,
                Attention.FAILED: _sum([cell for cell in counting if cell.failed]),
                Attention.OFFLINE: counted.offline,
                Attention.CLOCK: counted.clock,
                Attention.DROPPED: _sum([cell for cell in counting if cell.dropped]),
                Attention.CREDENTIAL: counted.credential,
            }
        ),
        at=now,
    )


def _sum(cells: Sequence[Cell]) -> int:
    return sum(cell.gateways for cell in cells)


def _tally(cells: Sequence[Cell], value: Callable[[Cell], str]) -> Tally:
    found: Counter[str] = Counter()
    for cell in cells:
        found[value(cell)] += cell.gateways
    listed = dict(sorted(found.items(), key=lambda pair: (-pair[1], pair[0]))[:MOST_VALUES])
    return Tally(counts=listed, others=found.total() - sum(listed.values()))
