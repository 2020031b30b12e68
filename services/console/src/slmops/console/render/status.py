"""Renders the status of a system as tables. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import datetime

from rich.console import Group, RenderableType

from slmops.console.render.fleet_summary import figures
from slmops.console.render.status_view import CredentialsView, LocalStatus, ProcessView, Status
from slmops.console.render.tables import Column, cell, duration, pairs, problem_text, size, state, table
from slmops.contracts.identity import ServiceProcess


def status(view: Status, now: datetime) -> RenderableType:
    return Group(*_parts(view, now))


def _parts(view: Status, now: datetime) -> Iterator[RenderableType]:
    if view.local:
        yield from (_processes(view.local, now), "")
    if view.services:
        yield from (_services(view.services, now), "")
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
            ("gateways", figures(view.fleet) if view.fleet else None),
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
    for kind, expiries in (("trust", local.expiry), ("certificate", local.certificates)):
        for expiry in expiries:
            left = duration(expiry.expires - now) if expiry.expires > now else "expired"
            yield f"{kind} {expiry.role}", f"until {expiry.expires:%Y-%m-%d} ({left})"


def _services(processes: Sequence[ServiceProcess], now: datetime) -> RenderableType:
    """Renders every process of a service; the revision stands out if it is not that of most processes."""
    usual = Counter(process.shared_revision for process in processes).most_common(1)[0][0]
    columns: list[Column[ServiceProcess]] = [
        Column("service", lambda p: cell(p.service)),
        Column("version", lambda p: cell(p.version)),
        Column("revision", lambda p: cell(p.revision, "" if p.shared_revision == usual else "yellow")),
        Column("host", lambda p: cell(p.host)),
        Column("pid", lambda p: str(p.pid), right=True),
        Column("up", lambda p: duration(now - p.started_at), right=True),
    ]
    return table(processes, columns)


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
