"""Boots of gateways."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "packager_0005"
down_revision = "packager_0004"


def upgrade() -> None:
    with op.batch_alter_table("running", schema=None) as batch_op:
        batch_op.add_column(sa.Column("boot", sa.String(length=32), server_default="", nullable=False))
        batch_op.add_column(sa.Column("made_at", sa.Double(), server_default="0", nullable=False))
