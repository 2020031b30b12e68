"""Who belongs to the fleet."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "rollout_0003"
down_revision = "rollout_0002"


def upgrade() -> None:
    op.create_table(
        "forgotten_enrolments",
        sa.Column("gateway_id", sa.String(length=63), nullable=False),
        sa.PrimaryKeyConstraint("gateway_id"),
    )
    op.create_table(
        "overlay_writes",
        sa.Column("gateway_id", sa.String(length=63), nullable=False),
        sa.Column("blueprint", sa.String(length=63), nullable=True),
        sa.PrimaryKeyConstraint("gateway_id"),
    )
    with op.batch_alter_table("gateways", schema=None) as batch_op:
        batch_op.add_column(sa.Column("enrolment", sa.Integer(), server_default="1", nullable=False))
        batch_op.add_column(sa.Column("revoked_at", sa.Double(), nullable=True))
        batch_op.add_column(sa.Column("revoked_because", sa.Text(), nullable=True))
        batch_op.add_column(sa.Column("moving_to", sa.String(length=63), nullable=True))
        batch_op.add_column(sa.Column("reenrol_until", sa.Double(), nullable=True))
        batch_op.add_column(sa.Column("issued_at", sa.Double(), nullable=True))
        batch_op.add_column(sa.Column("expires_at", sa.Double(), nullable=True))
        batch_op.add_column(sa.Column("endless", sa.Boolean(), server_default=sa.true(), nullable=False))
        batch_op.create_index(batch_op.f("ix_gateways_revoked_at"), ["revoked_at"], unique=False)
