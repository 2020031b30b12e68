"""A gateway's identity, which determines the release that a plan gives it."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from slmops.contracts.names import Name


class Identity(BaseModel):
    """A gateway's id, blueprint and labels."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    gateway_id: Name
    blueprint: Name
    labels: dict[str, str] = Field(default_factory=dict)
