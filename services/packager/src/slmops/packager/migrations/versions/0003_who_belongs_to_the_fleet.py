"""Who belongs to the fleet."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "packager_0003"
down_revision = "packager_0002"


def upgrade() -> None:
    op.create_table(
        "revoked",
        sa.Column("gateway_id", sa.String(length=63), nullable=False),
        sa.Column("public_key", sa.String(length=56), nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("gateway_id"),
    )
    with op.batch_alter_table("gateways", schema=None) as batch_op:
        batch_op.add_column(sa.Column("public_key", sa.String(length=56), server_default="", nullable=False))

    with op.batch_alter_table("running", schema=None) as batch_op:
        batch_op.add_column(sa.Column("enrolment", sa.Integer(), server_default="0", nullable=False))
