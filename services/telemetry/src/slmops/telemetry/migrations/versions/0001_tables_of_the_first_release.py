"""Tables of the first release."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "telemetry_0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "caught_up",
        sa.Column("stream", sa.String(length=63), nullable=False),
        sa.Column("sequence", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("stream"),
    )
    op.create_table("consumed", sa.Column("id", sa.String(length=200), nullable=False), sa.PrimaryKeyConstraint("id"))
    op.create_table(
        "journal",
        sa.Column("position", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("stream", sa.String(length=200), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("type", sa.String(length=120), nullable=False),
        sa.Column("data", sa.Text(), nullable=False),
        sa.Column("time", sa.String(length=40), nullable=False),
        sa.Column("traceparent", sa.String(length=64), nullable=True),
        sa.Column("published", sa.Boolean(), nullable=False),
        sa.PrimaryKeyConstraint("position"),
        sa.UniqueConstraint("id"),
        sa.UniqueConstraint("stream", "version"),
    )
    with op.batch_alter_table("journal", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_journal_published"), ["published"], unique=False)

    op.create_table(
        "members",
        sa.Column("gateway_id", sa.String(length=63), nullable=False),
        sa.Column("blueprint", sa.String(length=63), nullable=False),
        sa.Column("labels", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("gateway_id"),
    )
    op.create_table(
        "offers",
        sa.Column("rollout", sa.String(length=80), nullable=False),
        sa.Column("release", sa.String(length=80), nullable=False),
        sa.Column("blueprint", sa.String(length=63), nullable=False),
        sa.Column("version", sa.String(length=64), nullable=False),
        sa.Column("since", sa.Double(), nullable=False),
        sa.Column("stages", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("rollout", "release"),
    )
    with op.batch_alter_table("offers", schema=None) as batch_op:
        batch_op.create_index("offers_by_release", ["blueprint", "release"], unique=False)

    op.create_table(
        "opened",
        sa.Column("rollout", sa.String(length=80), nullable=False),
        sa.Column("stage", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("rollout"),
    )
    op.create_table(
        "pending_batches",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("ended_at", sa.Double(), nullable=False),
        sa.Column("data", sa.Text(), nullable=False),
        sa.Column("traceparent", sa.String(length=64), nullable=True),
        sa.PrimaryKeyConstraint("id"),
    )
    with op.batch_alter_table("pending_batches", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_pending_batches_ended_at"), ["ended_at"], unique=False)
