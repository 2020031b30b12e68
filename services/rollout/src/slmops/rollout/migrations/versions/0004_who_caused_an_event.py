"""Who caused an event."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "rollout_0004"
down_revision = "rollout_0003"


def upgrade() -> None:
    with op.batch_alter_table("journal", schema=None) as batch_op:
        batch_op.add_column(sa.Column("actor", sa.String(length=140), nullable=True))
