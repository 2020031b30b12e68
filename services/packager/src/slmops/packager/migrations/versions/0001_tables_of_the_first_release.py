"""Tables of the first release."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "packager_0001"
down_revision = None


def upgrade() -> None:
    op.create_table("consumed", sa.Column("id", sa.String(length=200), nullable=False), sa.PrimaryKeyConstraint("id"))
    op.create_table(
        "deltas",
        sa.Column("target", sa.String(length=80), nullable=False),
        sa.Column("base", sa.String(length=80), nullable=False),
        sa.Column("model", sa.String(length=63), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
        sa.Column("data", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("target", "base"),
    )
    with op.batch_alter_table("deltas", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_deltas_model"), ["model"], unique=False)

    op.create_table(
        "gateways",
        sa.Column("gateway_id", sa.String(length=63), nullable=False),
        sa.Column("blueprint", sa.String(length=63), nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("gateway_id"),
    )
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
        sa.Column("manifest", sa.String(length=80), nullable=False),
        sa.Column("data", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("manifest"),
    )
    op.create_table(
        "running",
        sa.Column("gateway_id", sa.String(length=63), nullable=False),
        sa.Column("manifest", sa.String(length=80), nullable=True),
        sa.Column("at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("gateway_id"),
    )
    with op.batch_alter_table("running", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_running_manifest"), ["manifest"], unique=False)

    op.create_table(
        "trust_metadata",
        sa.Column("role", sa.String(length=80), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
        sa.Column("data", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("role", "version"),
    )
    op.create_table(
        "trust_model_keys",
        sa.Column("model", sa.String(length=63), nullable=False),
        sa.Column("pem", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("model"),
    )
    op.create_table(
        "withdrawn",
        sa.Column("manifest", sa.String(length=80), nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("manifest"),
    )
