"""Tables of the first release."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "rollout_0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "blueprints",
        sa.Column("name", sa.String(length=63), nullable=False),
        sa.Column("plan", sa.Text(), nullable=False),
        sa.Column("judged", sa.Boolean(), nullable=False),
        sa.PrimaryKeyConstraint("name"),
    )
    op.create_table("consumed", sa.Column("id", sa.String(length=200), nullable=False), sa.PrimaryKeyConstraint("id"))
    op.create_table(
        "ended_rollouts",
        sa.Column("rollout", sa.String(length=80), nullable=False),
        sa.Column("view", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("rollout"),
    )
    op.create_table(
        "gateways",
        sa.Column("gateway_id", sa.String(length=63), nullable=False),
        sa.Column("blueprint", sa.String(length=63), nullable=False),
        sa.Column("enrolled", sa.Text(), nullable=True),
        sa.Column("sequence", sa.BigInteger(), nullable=False),
        sa.Column("report", sa.Text(), nullable=True),
        sa.Column("failure", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("gateway_id"),
    )
    with op.batch_alter_table("gateways", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_gateways_blueprint"), ["blueprint"], unique=False)

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
        "packages",
        sa.Column("model", sa.String(length=63), nullable=False),
        sa.Column("version", sa.String(length=64), nullable=False),
        sa.Column("profile", sa.String(length=63), nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
        sa.Column("data", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("model", "version", "profile"),
    )
    op.create_table(
        "windows",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("blueprint", sa.String(length=63), nullable=False),
        sa.Column("ended_at", sa.Double(), nullable=False),
        sa.Column("data", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    with op.batch_alter_table("windows", schema=None) as batch_op:
        batch_op.create_index("windows_by_time", ["blueprint", "ended_at"], unique=False)

    op.create_table(
        "withdrawn",
        sa.Column("manifest", sa.String(length=80), nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("manifest"),
    )
