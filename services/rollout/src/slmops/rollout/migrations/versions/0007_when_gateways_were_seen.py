"""When gateways were seen."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "rollout_0007"
down_revision = "rollout_0004"


def upgrade() -> None:
    with op.batch_alter_table("sightings", schema=None) as batch_op:
        batch_op.add_column(sa.Column("last_sequence", sa.BigInteger(), nullable=True))
        batch_op.create_index(batch_op.f("ix_sightings_at"), ["at"], unique=False)
        batch_op.create_index(batch_op.f("ix_sightings_clock_ahead_s"), ["clock_ahead_s"], unique=False)
