"""Places of gateways in rollouts."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "rollout_0005"
down_revision = "rollout_0004"


def upgrade() -> None:
    op.create_table(
        "member_counts",
        sa.Column("rollout", sa.String(length=80), nullable=False),
        sa.Column("stage", sa.Integer(), nullable=False),
        sa.Column("progress", sa.String(length=16), nullable=False),
        sa.Column("blueprint", sa.String(length=63), nullable=False),
        sa.Column("gateways", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("rollout", "stage", "progress"),
    )
    with op.batch_alter_table("member_counts", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_member_counts_blueprint"), ["blueprint"], unique=False)

    op.create_table(
        "members",
        sa.Column("gateway_id", sa.String(length=63), nullable=False),
        sa.Column("blueprint", sa.String(length=63), nullable=False),
        sa.Column("rollout", sa.String(length=80), nullable=False),
        sa.Column("stage", sa.Integer(), nullable=False),
        sa.Column("progress", sa.String(length=16), nullable=False),
        sa.Column("problem", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("gateway_id"),
    )
    with op.batch_alter_table("members", schema=None) as batch_op:
        batch_op.create_index(
            "members_to_name",
            ["rollout", "progress", "stage", "gateway_id"],
            unique=False,
            sqlite_where=sa.text("progress <> 'committed'"),
            postgresql_where=sa.text("progress <> 'committed'"),
        )

    with op.batch_alter_table("blueprints", schema=None) as batch_op:
        batch_op.add_column(sa.Column("generation", sa.Integer(), nullable=True))
        batch_op.add_column(sa.Column("filled_to", sa.String(length=63), nullable=True))

    with op.batch_alter_table("gateways", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_gateways_blueprint"))
        batch_op.create_index("gateways_by_blueprint", ["blueprint", "gateway_id"], unique=False)
