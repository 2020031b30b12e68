"""When ids were consumed, and order by sequence."""

from __future__ import annotations

import time

import sqlalchemy as sa
from alembic import op

revision = "registry_0002"
down_revision = "registry_0001"


def upgrade() -> None:
    with op.batch_alter_table("consumed", schema=None) as batch_op:
        batch_op.add_column(sa.Column("at", sa.Double(), server_default="0", nullable=False))
        batch_op.create_index(batch_op.f("ix_consumed_at"), ["at"], unique=False)

    # When the ids of the release before were consumed is not known. Those that count as old would be removed at once.
    op.get_bind().execute(sa.text("UPDATE consumed SET at = :now"), {"now": time.time()})
