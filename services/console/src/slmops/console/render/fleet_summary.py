"""Renders the summary of the fleet, and texts about gateways that need attention. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from rich.console import Group, RenderableType

from slmops.console.render.stream_view import Item
from slmops.console.render.tables import Column, cell, or_else, pairs, state, table
from slmops.contracts.commands import Attention, FleetSummary, Tally

REASONS: Final[dict[str, str]] = {
    Attention.REVOKED: "revoked",
    Attention.FAILED: "with a failed update",
    Attention.OFFLINE: "offline",
    Attention.CLOCK: "with a wrong clock",
    Attention.DROPPED: "with dropped reports or measurements",
    Attention.CREDENTIAL: "with a credential that was not renewed in time",
}
_ACTED_ON: Final = {
    Attention.FAILED: "Read each one's problem",
    Attention.OFFLINE: "Check their power and network",
    Attention.CLOCK: "Set their clocks",
    Attention.CREDENTIAL: "Read the logs of these gateways, which will be refused when it expires",
}
"""Reasons for which somebody should act now. An admin wanted a gateway revoked, and what was dropped stays lost."""


def summary(found: FleetSummary) -> RenderableType:
    head = pairs(
        [
            ("gateways", f"{found.gateways:,}"),
            ("online", f"{found.online:,}"),
            ("offline", f"{found.offline:,}"),
        ]
    )
    rows = [
        *_rows("state", found.standing),
        *_rows("phase", found.phase),
        *_rows("version", found.version),
        *_rows("blueprint", found.blueprint),
        *_rows("profile", found.profile),
        *(("attention", reason, number) for reason, number in found.attention.counts.items() if number),
    ]
    columns: list[Column[tuple[str, str, int]]] = [
        Column("by", lambda row: cell(row[0], "bold")),
        Column("value", lambda row: state(row[1])),
        Column("gateways", lambda row: f"{row[2]:,}", right=True),
        Column("share", lambda row: _share(row[2], found.gateways), right=True),
    ]
    return Group(head, "", or_else(table(_once(rows), columns), "No gateways yet."))


def _rows(name: str, tally: Tally) -> Iterator[tuple[str, str, int]]:
    for value, number in tally.counts.items():
        yield name, value, number
    if tally.others:
        yield name, "others", tally.others


def _once(rows: Sequence[tuple[str, str, int]]) -> list[tuple[str, str, int]]:
    """Names each group once."""
    before = ["", *(name for name, _, _ in rows)]
    return [("" if name == last else name, *rest) for last, (name, *rest) in zip(before, rows, strict=False)]  # type: ignore[misc]


def _share(number: int, gateways: int) -> str:
    return f"{number / gateways:.1%}" if gateways else ""


def figures(found: FleetSummary) -> str:
    """Returns the fleet in one line, such as `1,200, 3 offline, 1 with a failed update`."""
    some = [f"{n:,} {REASONS.get(reason, reason)}" for reason, n in found.attention.counts.items() if n]
    return ", ".join([f"{found.gateways:,}", *some])


def items(counts: Mapping[str, int], named: Mapping[str, Sequence[str]]) -> list[Item]:
    """Returns an item for each reason for which somebody should act. `named`: some gateways of each reason."""
    found = []
    for reason, fix in _ACTED_ON.items():
        number = counts.get(reason, 0)
        if number:
            names = ", ".join(named.get(reason, ()))
            some = f", for example {names}" if names else ""
            what = f"{number:,} gateway{'s' * (number > 1)} {REASONS[reason]}{some}"
            fixed = f"{fix}: slmops gateway ls --attention {reason}"
            found.append(Item(kind=f"gateways_{reason}", what=what, where="fleet", fix=fixed))
    return found
