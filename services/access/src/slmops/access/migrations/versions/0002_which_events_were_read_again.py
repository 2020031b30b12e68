"""Which events were read again."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "access_0002"
down_revision = "access_0001"


def upgrade() -> None:
    op.create_table(
        "read_again", sa.Column("events", sa.String(length=120), nullable=False), sa.PrimaryKeyConstraint("events")
    )
