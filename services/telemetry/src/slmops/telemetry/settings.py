"""The telemetry service's settings."""

from __future__ import annotations

from pydantic import Field

from slmops.kit.settings import BusSettings, DatabaseSettings


class Settings(BusSettings, DatabaseSettings):
    window_s: float = Field(default=5, gt=0, allow_inf_nan=False, description="Length of a window, in seconds")
    grace_s: float = Field(
        default=1,
        ge=0,
        allow_inf_nan=False,
        description="How long after its end a window waits for late batches, in seconds",
    )
