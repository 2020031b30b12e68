"""The registry's settings."""

from __future__ import annotations

from datetime import timedelta
from typing import Self

from pydantic import Field, model_validator

from slmops.kit.settings import BusSettings, DatabaseSettings, ObjectSettings


class Settings(BusSettings, DatabaseSettings, ObjectSettings):
    """Settings of bus, database and object store, and of the scheduled work on the store."""

    shortest_grace: timedelta = Field(
        default=timedelta(hours=1), description="Garbage collections with a shorter grace period are rejected"
    )
    collect_every: timedelta = Field(
        default=timedelta(days=1), ge=timedelta(0), description="Scheduled garbage collection; 0: only by hand"
    )
    collect_grace: timedelta = Field(
        default=timedelta(days=7), description="Grace period of scheduled collections; at least `shortest_grace`"
    )
    verify_within: timedelta = Field(
        default=timedelta(days=30),
        ge=timedelta(0),
        description="Time in which every stored blob is read again and verified; 0: only by hand",
    )
    verify_bytes_per_hour: int = Field(
        default=36_000_000_000, ge=1 << 28, description="Highest rate of the scheduled verification (36 GB: 10 MB/s)"
    )

    @model_validator(mode="after")
    def _grace_is_long_enough(self) -> Self:
        if self.collect_every and self.collect_grace < self.shortest_grace:
            raise ValueError(f"collect_grace must be at least shortest_grace, {self.shortest_grace}")
        return self
