"""The registry's settings."""

from __future__ import annotations

from slmops.kit.settings import BusSettings, DatabaseSettings, ObjectSettings


class Settings(BusSettings, DatabaseSettings, ObjectSettings):
    """None of its own: bus, database and object store."""
