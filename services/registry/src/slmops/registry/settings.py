"""The registry's settings."""

from __future__ import annotations

from datetime import timedelta

from pydantic import Field

from slmops.kit.settings import BusSettings, DatabaseSettings, ObjectSettings


class Settings(BusSettings, DatabaseSettings, ObjectSettings):
    """Settings of bus, database and object store, and the limit of the grace period."""

    shortest_grace: timedelta = Field(
        default=timedelta(hours=1), description="Garbage collections with a shorter grace period are rejected"
    )
