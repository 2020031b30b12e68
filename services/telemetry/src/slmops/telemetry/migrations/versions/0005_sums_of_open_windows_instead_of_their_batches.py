"""Sums of open windows instead of their batches."""

from __future__ import annotations

import json
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "telemetry_0005"
down_revision = "telemetry_0004"

_KEY = ("blueprint", "release", "version", "gateway_id")
_FIGURES = (
    "requests",
    "failed_requests",
    "golden_passed",
    "golden_failed",
    "completion_tokens",
    "decode_seconds",
    "ttft_seconds",
)


def upgrade() -> None:
    op.create_table(
        "window_sums",
        sa.Column("started_us", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("blueprint", sa.String(length=63), nullable=False),
        sa.Column("release", sa.String(length=80), nullable=False),
        sa.Column("version", sa.String(length=64), nullable=False),
        sa.Column("gateway_id", sa.String(length=63), nullable=False),
        sa.Column("requests", sa.BigInteger(), nullable=False),
        sa.Column("failed_requests", sa.BigInteger(), nullable=False),
        sa.Column("golden_passed", sa.BigInteger(), nullable=False),
        sa.Column("golden_failed", sa.BigInteger(), nullable=False),
        sa.Column("completion_tokens", sa.BigInteger(), nullable=False),
        sa.Column("decode_seconds", sa.Double(), nullable=False),
        sa.Column("ttft_seconds", sa.Double(), nullable=False),
        sa.Column("traceparent", sa.String(length=64), nullable=True),
        sa.PrimaryKeyConstraint("started_us", "blueprint", "release", "version", "gateway_id"),
    )
    with op.batch_alter_table("window_sums", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_window_sums_gateway_id"), ["gateway_id"], unique=False)

    op.create_table(
        "sequences",
        sa.Column("id", sa.String(length=130), nullable=False),
        sa.Column("highest", sa.BigInteger(), nullable=False),
        sa.Column("gaps", sa.Text(), nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    _move_batches()
    with op.batch_alter_table("pending_batches", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_pending_batches_ended_at"))

    op.drop_table("pending_batches")


def _move_batches() -> None:
    """Keeps the batches that are in no published window yet, each with its end instead of the start of its window: the
    length of windows is a setting, which a revision does not know."""
    connection = op.get_bind()
    columns = ("started_us", *_KEY, *_FIGURES, "traceparent")
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for ended_at, data, traceparent in connection.execute(
        sa.text("SELECT ended_at, data, traceparent FROM pending_batches ORDER BY ended_at")
    ):
        batch, started = json.loads(data), round(ended_at * 1_000_000)
        key = (started, *(batch[name] for name in _KEY))
        row = rows.setdefault(key, {"started_us": started, "traceparent": traceparent})
        row |= {name: batch[name] for name in _KEY}
        row |= {name: row.get(name, 0) + batch.get(name, 0) for name in _FIGURES}
    if rows:
        table = sa.table("window_sums", *map(sa.column, columns))
        connection.execute(sa.insert(table), list(rows.values()))
