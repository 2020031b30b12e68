"""The optimizer's settings."""

from __future__ import annotations

from datetime import timedelta

from pydantic import Field

from slmops.contracts.profile import EDGE_SMALL
from slmops.kit.settings import BusSettings, ObjectSettings


class Settings(BusSettings, ObjectSettings):
    profiles: tuple[str, ...] = Field(
        default=(EDGE_SMALL.name,), description="Device profiles for which each version is optimized"
    )
    recipes: tuple[str, ...] = Field(default=("int8", "int4"), description="Recipes to try, in this order")
    anchor: bool = Field(
        default=True,
        description="Also quantize a new version on the grids of its predecessor, which makes the update small",
    )
    job_timeout: timedelta = Field(
        default=timedelta(hours=2),
        description="A job that takes longer is killed and fails; for a search, its budget is added",
    )
    job_memory_bytes: int | None = Field(
        default=None, gt=0, description="A job that uses more memory is killed and fails; None: the host's memory"
    )
    cache_kept: timedelta = Field(
        default=timedelta(days=90), description="A cached result that nobody used for this long is removed"
    )
    work_kept: timedelta = Field(
        default=timedelta(days=7),
        description="A work folder that no worker used for this long is removed",
    )
