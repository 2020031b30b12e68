"""The optimizer's settings."""

from __future__ import annotations

from datetime import timedelta

from pydantic import Field

from slmops.contracts.profile import EDGE_SMALL
from slmops.kit.settings import BusSettings, ObjectSettings


class Settings(BusSettings, ObjectSettings):
    profiles: tuple[str, ...] = Field(
        default=(EDGE_SMALL.name,), description="Device profiles that each version is made for"
    )
    recipes: tuple[str, ...] = Field(default=("int8", "int4"), description="Recipes that are tried, in this order")
    anchor: bool = Field(
        default=True,
        description="Try a new version on the grids of the one before, too, which makes its update small",
    )
    job_timeout: timedelta = Field(
        default=timedelta(hours=2),
        description="A job that takes longer is killed and refused; a search has its budget more",
    )
    job_memory_bytes: int | None = Field(
        default=None, gt=0, description="A job that has more is killed and refused; None: what the host has"
    )
