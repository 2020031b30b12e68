"""Who somebody is: a gateway, and a process of a service."""

from __future__ import annotations

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from slmops.contracts.names import Name


class Identity(BaseModel):
    """A gateway's id, blueprint and labels. They determine the release that a plan gives it."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    gateway_id: Name
    blueprint: Name
    labels: dict[str, str] = Field(default_factory=dict)


class ServiceProcess(BaseModel):
    """A running process of a service, and its code."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    service: Name
    version: str = Field(description="Version of its distribution")
    revision: str = Field(description="Digest of its own code and the shared code, 12 hexadecimal digits")
    shared_revision: str = Field(description="Digest of the shared code, which must be equal in all services")
    host: str
    pid: int
    started_at: AwareDatetime
