"""Renders streams and attention items as tables. Pure: current time and width are arguments."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from rich.console import Group, RenderableType

from slmops.console.render.stream_view import AcceptedGap, ConsumerView, Item, StreamView
from slmops.console.render.tables import Cell, Column, cell, duration, or_else, table
from slmops.kit.bus.gaps import Gap
from slmops.kit.bus.stream_watch import LEVELS
from slmops.kit.sizes import size_text


def streams(views: Sequence[StreamView], width: int) -> RenderableType:
    columns: list[Column[StreamView]] = [
        Column("stream", lambda s: s.name),
        Column("messages", lambda s: str(s.messages), right=True),
        Column("used", _used, right=True),
        Column("limit", lambda s: size_text(s.limit_bytes) if s.limit_bytes else "none", right=True),
        Column("kept for", lambda s: duration(s.max_age) if s.max_age else "ever"),
        Column("when full", lambda s: "refuses new" if s.refuses else "drops oldest"),
        Column("subjects", lambda s: cell(" ".join(s.subjects)), fold=True),
    ]
    rows = [(view.name, consumer) for view in views for consumer in view.consumers]
    return Group(table(views, columns, width), "", _consumers(rows, width)) if rows else table(views, columns, width)


def _used(view: StreamView) -> Cell:
    style = "red" if view.refuses and view.share >= LEVELS[-1] else "yellow" if _filling(view) else ""
    return cell(f"{size_text(view.size_bytes)} {view.share:.0%}", style)


def _filling(view: StreamView) -> bool:
    return view.refuses and view.share >= LEVELS[0]


def _consumers(rows: Sequence[tuple[str, ConsumerView]], width: int) -> RenderableType:
    columns: list[Column[tuple[str, ConsumerView]]] = [
        Column("stream", lambda r: r[0]),
        Column("consumer", lambda r: cell(r[1].name)),
        Column("pending", lambda r: str(r[1].pending), right=True),
        Column("missing", lambda r: cell(_gap(r[1].gap), "red"), fold=True),
    ]
    return table(rows, columns, width)


def _gap(gap: Gap | None) -> str:
    return f"{gap.first} to {gap.last}: {gap.why}" if gap else ""


def accepted(rows: Sequence[AcceptedGap], now: datetime) -> RenderableType:
    columns: list[Column[AcceptedGap]] = [
        Column("stream", lambda g: g.stream),
        Column("consumer", lambda g: cell(g.consumer)),
        Column("found", lambda g: f"{duration(now - g.found_at)} ago"),
        Column("accepted", lambda g: cell(_gap(g)), fold=True),
    ]
    return or_else(table(rows, columns), "There are no gaps to accept.")


def attention(items: Sequence[Item]) -> RenderableType:
    columns: list[Column[Item]] = [
        Column("kind", lambda i: cell(i.kind, "bold")),
        Column("where", lambda i: cell(i.where), fold=True),
        Column("what", lambda i: cell(i.what), fold=True),
        Column("fix", lambda i: cell(i.fix), fold=True),
    ]
    return or_else(table(items, columns), "Nothing needs attention.")
