"""The registry's settings."""

from __future__ import annotations

from datetime import timedelta

from pydantic import Field

from slmops.kit.settings import BusSettings, DatabaseSettings, ObjectSettings


class Settings(BusSettings, DatabaseSettings, ObjectSettings):
    """Bus, database and object store, and a limit for whoever is impatient."""

    shortest_grace: timedelta = Field(
        default=timedelta(hours=1), description="A collection of garbage with a shorter grace period is refused"
    )
