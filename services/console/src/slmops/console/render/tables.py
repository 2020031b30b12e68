"""Building blocks of tables. Pure: current time and width are arguments.

Texts from the wire are shown literally, never as markup, and without control characters: a gateway must not be able to
control an operator's terminal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Generic, TypeVar

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from slmops.contracts.errors import Problem

NARROW = 80
"""The narrowest terminal in which a digest can be copied."""
WIDE = 110
"""From this width on, a table also shows its less important columns."""

_STYLES = {
    "packaged": "green", "passed": "green", "completed": "green", "committed": "green", "chosen": "bold green",
    "done": "green", "refused": "red", "failed": "red", "rolled_back": "red", "aborted": "red", "retired": "dim",
    "optimizing": "yellow", "downloading": "yellow", "soaking": "yellow", "held": "yellow", "paused": "yellow",
    "running": "yellow", "cancelling": "yellow", "cancelled": "dim",
}  # fmt: skip
Cell = Text | str
V = TypeVar("V")


@dataclass(frozen=True)
class Column(Generic[V]):
    """A column. `fold`: long text, which wraps in the remaining width. `wide`: only shown on a wide terminal."""

    heading: str
    cell: Callable[[V], Cell]
    right: bool = False
    fold: bool = False
    wide: bool = False


def printable(text: str) -> str:
    """Replaces control characters, which a terminal would interpret."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


def cell(value: object, style: str = "") -> Text:
    return Text("" if value is None else printable(str(value)), style=style)


def state(value: str) -> Text:
    return cell(value, _STYLES.get(value, ""))


def size(size_bytes: float | None) -> str:
    """Formats a size in decimal units: 512 B, 98.4 MB, 538 MB."""
    if size_bytes is None:
        return ""
    for unit in ("B", "kB", "MB"):
        if size_bytes < 999.5:
            return f"{size_bytes:.{0 if unit == 'B' or size_bytes >= 99.95 else 1}f} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:.1f} GB"


def duration(length: timedelta) -> str:
    """Formats a duration in one unit: 42 s, 3 min, 5 h, 2 d."""
    seconds = max(0, int(length.total_seconds()))
    for limit_s, unit_s, unit in ((120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit_s:
            return f"{seconds // unit_s} {unit}"
    return f"{seconds // 86400} d"


def short(digest: str | None) -> str:
    """Returns the first twelve hexadecimal digits of a digest."""
    return (digest or "").removeprefix("sha256:")[:12]


def moment(at: datetime, now: datetime) -> str:
    return f"{at.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC, {duration(now - at)} ago"


def figure(value: float | None, form: str, unit: str = "") -> str:
    return "" if value is None else format(value, form) + unit


def table(views: Sequence[V], columns: Sequence[Column[V]], width: int = 0) -> Table:
    made = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False, header_style="bold")
    shown = [column for column in columns if not column.wide or width >= WIDE]
    for column in shown:
        made.add_column(
            column.heading,
            justify="right" if column.right else "left",
            no_wrap=not column.fold,
            overflow="fold" if column.fold else "ellipsis",
            min_width=12 if column.fold else None,
        )
    for view in views:
        made.add_row(*(column.cell(view) for column in shown))
    return made


def pairs(rows: Iterable[tuple[str, Cell | None]]) -> RenderableType:
    """Makes a table of names and values without the empty values.

    A word that would not fit beside its name in a narrow terminal, such as a digest, is on a line of its own below the
    table, so that it can be copied in one piece.
    """
    shown = [(cell(name), value if isinstance(value, Text) else cell(value)) for name, value in rows if value]
    room = NARROW - 1 - max((len(name) for name, _ in shown), default=0)
    made = Table(box=None, pad_edge=False, show_header=False, padding=(0, 1, 0, 0))
    made.add_column(style="bold", no_wrap=True)
    made.add_column(overflow="fold")
    below: list[RenderableType] = []
    for name, value in shown:
        if len(value) > room and " " not in value.plain:
            below += [Text(name.plain, style="bold"), Text(value.plain, overflow="ignore", no_wrap=True)]
        else:
            made.add_row(name, value)
    return Group(made, *below) if below else made


def or_else(made: Table, nothing: str) -> RenderableType:
    return made if made.row_count else Text(nothing, style="dim")


def problem_text(problem: Problem) -> Text:
    """Renders what, where and fix, one line each."""
    lines = [Text.assemble(("error", "bold red"), f" [{problem.code}]: ", cell(problem.what))]
    if problem.where:
        lines.append(Text.assemble(("  where: ", "dim"), cell(problem.where)))
    if problem.fix:
        lines.append(Text.assemble(("  fix:   ", "dim"), cell(problem.fix)))
    return Text("\n").join(lines)
