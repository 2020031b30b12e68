"""When gateways were seen."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "rollout_0007"
down_revision = "rollout_0006"


def upgrade() -> None:
    with op.batch_alter_table("sightings", schema=None) as batch_op:
        batch_op.add_column(sa.Column("last_sequence", sa.BigInteger(), nullable=True))
    for column in ("at", "clock_ahead_s"):
        op.create_index(f"ix_sightings_{column}", "sightings", [column], unique=False, if_not_exists=True)
