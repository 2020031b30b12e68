"""What a gateway knows of itself, and what its place in a plan depends on."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from slmops.contracts.names import Name


class Identity(BaseModel):
    """A gateway as its plan sees it."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    gateway_id: Name
    blueprint: Name
    labels: dict[str, str] = Field(default_factory=dict)
