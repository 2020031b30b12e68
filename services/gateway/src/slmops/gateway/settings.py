"""The gateway's settings: who it is, what it trusts, where it listens."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

from pydantic import Field

from slmops.contracts import freshness
from slmops.contracts.names import Name
from slmops.kit.settings import BusSettings


class Settings(BusSettings):
    gateway_id: Name = Field(description="Its name in the fleet; cannot change after enrolment")
    blueprint: Name = Field(description="The class of gateways that it belongs to")
    labels: dict[str, str] = Field(default_factory=dict, description="What rollout stages select on")
    enrol_creds: Path = Field(description="Credentials of the bootstrap user: may ask to be enrolled, nothing else")
    enrolment_token: Path = Field(description="File with the site's enrolment secret")
    trusted_key: Path = Field(description="Public key (PEM) that packages must be signed with")
    trusted_root: Path = Field(
        description="Root of trust (TUF root.json of the ceremony) in which packages and the plan's key are named"
    )
    factory: Path | None = Field(
        default=None, description="Folder with the release that came with the device; None: it came with none"
    )
    bundles: Path | None = Field(
        default=None,
        description="Folder into which bundles are put where there is no network; None: none are looked for",
    )
    bundles_every: timedelta = Field(default=timedelta(seconds=5), description="How often that folder is looked into")
    results_every: timedelta = Field(
        default=timedelta(minutes=1), description="How often what waits for a network is written there to be carried"
    )
    disconnected_grace: timedelta = Field(
        default=timedelta(),
        ge=timedelta(),
        le=freshness.MAX_GRACE,
        description="So long past their dates timestamp, snapshot and plan of a bundle may be; over the bus never",
    )
    api_host: str = Field(default="127.0.0.1", description="Where the OpenAI-compatible API listens")
    api_port: int = Field(default=8080, ge=0, le=65535)
    report_every: timedelta = Field(default=timedelta(seconds=30), description="A sign of life at least this often")
    refresh_every: timedelta = Field(
        default=timedelta(seconds=60),
        description="The twin is read again about this often, in case a change was missed",
    )
    retry_every: timedelta = Field(default=timedelta(seconds=5), description="Pause after a failure that may pass")
