"""Renders people and their credentials. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from rich.console import RenderableType

from slmops.console.render.tables import Column, cell, duration, moment, or_else, pairs, state, table
from slmops.contracts.commands import UserView
from slmops.kit.bus.nats_auth import Credentials


def state_of(view: UserView, now: datetime) -> str:
    if view.revoked_at is not None:
        return "revoked"
    return "active" if view.expires_at > now else "expired"


def users(views: Sequence[UserView], now: datetime, width: int = 0) -> RenderableType:
    columns: list[Column[UserView]] = [
        Column("user", lambda v: cell(v.user)),
        Column("role", lambda v: cell(v.role)),
        Column("state", lambda v: state(state_of(v, now))),
        Column("expires", lambda v: f"{v.expires_at:%Y-%m-%d}"),
        Column("added by", lambda v: cell(v.added_by), wide=True),
        Column("revoked by", lambda v: cell(v.revoked_by), wide=True),
        Column("reason", lambda v: cell(v.reason), fold=True),
    ]
    return or_else(table(views, columns, width), "Nobody was added.")


def user(view: UserView, now: datetime) -> RenderableType:
    return pairs(
        [
            ("user", view.user),
            ("role", view.role),
            ("state", state_of(view, now)),
            ("expires", f"{view.expires_at:%Y-%m-%d}"),
            ("added", moment(view.added_at, now)),
            ("added by", view.added_by),
            ("revoked", moment(view.revoked_at, now) if view.revoked_at else None),
            ("revoked by", view.revoked_by),
            ("reason", view.reason),
        ]
    )


def identity(own: Credentials, file: str, now: datetime) -> RenderableType:
    until = own.until
    return pairs(
        [
            ("user", own.who.name),
            ("role", own.who.role or "none: these are credentials of a service"),
            ("expires", f"{until:%Y-%m-%d} ({duration(until - now)})" if until else None),
            ("key", own.public_key),
            ("file", file),
        ]
    )
