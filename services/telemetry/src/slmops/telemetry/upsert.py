"""Statements that insert a row or change the one with the same key, on both kinds of database."""

from __future__ import annotations

from sqlalchemy import Table
from sqlalchemy.dialects import postgresql, sqlite

Upsert = postgresql.Insert | sqlite.Insert


def inserting(dialect: str, table: Table) -> Upsert:
    """Returns an INSERT, to which the caller adds `on_conflict_do_update`."""
    return postgresql.insert(table) if dialect == "postgresql" else sqlite.insert(table)
