"""Renders the status of a system as tables. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime

from rich.console import Group, RenderableType

from slmops.console.render.status_view import CredentialsView, LocalStatus, ProcessView, Status
from slmops.console.render.tables import Column, cell, duration, pairs, problem_text, size, state, table


def status(view: Status, now: datetime) -> RenderableType:
    return Group(*_parts(view, now))


def _parts(view: Status, now: datetime) -> Iterator[RenderableType]:
    if view.local:
        yield from (_processes(view.local, now), "")
    waiting = sum(backlog.pending for backlog in view.backlog)
    most = max(view.backlog, key=lambda backlog: backlog.pending, default=None)
    behind = f"{waiting:,} messages" + (f", most for {most.consumer}" if most and most.pending else "")
    known = view.problem is None
    yield pairs(
        [
            ("slmops", view.version),
            ("NATS", view.nats_version),
            ("user", _user(view.credentials, now) if view.credentials else None),
            *(_local(view.local, now) if view.local else ()),
            ("backlog", behind if known else None),
            ("dead letters", str(view.dead_letters) if known else None),
        ]
    )
    if view.problem:
        yield from ("", problem_text(view.problem))


def _user(credentials: CredentialsView, now: datetime) -> str:
    until = credentials.expires_at
    left = f", until {until:%Y-%m-%d} ({duration(until - now) if until > now else 'expired'})" if until else ""
    return f"{credentials.user}, {credentials.role or 'a service'}{left}"


def _local(local: LocalStatus, now: datetime) -> Iterator[tuple[str, str]]:
    yield "data", local.data
    yield "disk", f"{size(local.disk.free_bytes)} free of {size(local.disk.size_bytes)}"
    for expiry in local.expiry:
        left = duration(expiry.expires - now) if expiry.expires > now else "expired"
        yield f"trust {expiry.role}", f"until {expiry.expires:%Y-%m-%d} ({left})"


def _processes(local: LocalStatus, now: datetime) -> RenderableType:
    columns: list[Column[ProcessView]] = [
        Column("process", lambda p: p.name),
        Column("status", lambda p: state(p.status)),
        Column("pid", lambda p: str(p.pid or ""), right=True),
        Column("restarts", lambda p: str(p.restarts), right=True),
        Column("for", lambda p: duration(now - p.since), right=True),
        Column("last error", lambda p: cell(p.last_error or ""), fold=True),
    ]
    return table(local.processes, columns)
