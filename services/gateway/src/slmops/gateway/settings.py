"""The gateway's settings: its identity, its trusted keys, its folders and its ports."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

from pydantic import Field

from slmops.contracts import freshness
from slmops.contracts.identity import Labels
from slmops.contracts.names import Name
from slmops.kit.settings import BusSettings


class Settings(BusSettings):
    gateway_id: Name = Field(description="Name of the gateway in the fleet; cannot change after enrolment")
    blueprint: Name = Field(
        description="Blueprint (class of gateways) under which the gateway enrols; later its credential decides"
    )
    labels: Labels = Field(default_factory=dict, description="Labels by which rollout stages select gateways")
    enrol_creds: Path = Field(description="Credentials of the bootstrap user, who may only request enrolment")
    enrolment_token: Path = Field(description="File with the site's enrolment secret")
    trusted_key: Path = Field(description="Public key (PEM) that packages must be signed with")
    trusted_root: Path = Field(
        description="Root of trust (TUF root.json of the key ceremony) for packages and for the plan's key"
    )
    factory: Path | None = Field(default=None, description="Folder with the factory release; None: the device has none")
    bundles: Path | None = Field(
        default=None,
        description="Folder that is watched for bundles, for sites without a network; None: no bundles",
    )
    bundles_every: timedelta = Field(
        default=timedelta(seconds=5), description="How often the gateway looks for new bundles"
    )
    results_every: timedelta = Field(
        default=timedelta(minutes=1),
        description="How often unsent reports and measurements are exported to the bundle folder",
    )
    disconnected_grace: timedelta = Field(
        default=timedelta(),
        ge=timedelta(),
        le=freshness.MAX_GRACE,
        description="How long after their expiry the timestamp, snapshot and plan of a bundle are still accepted. "
        "Does not apply to what comes over the bus",
    )
    api_host: str = Field(default="127.0.0.1", description="Address on which the OpenAI-compatible API listens")
    api_port: int = Field(default=8080, ge=0, le=65535)
    api_hosts: tuple[str, ...] = Field(
        default=(),
        description="Host names under which clients reach the API, beside IP addresses, localhost, the gateway's id "
        "and the device's host name; * for any name",
    )
    api_origins: tuple[str, ...] = Field(
        default=(),
        description="Origins of web pages that may use the API, such as https://app.example; * for any. Default: none",
    )
    api_keys: Path | None = Field(
        default=None,
        description="File with the API's keys, one per line, read at start; None: the API requires no key",
    )
    api_tls_cert: Path | None = Field(
        default=None,
        description="Certificate (PEM, with its chain) of the API, read again when it changes; None: no TLS",
    )
    api_tls_key: Path | None = Field(default=None, description="Its private key; None: it is in the same file")
    report_every: timedelta = Field(
        default=freshness.FULL_REPORT,
        gt=timedelta(),
        description="Longest time between two reports. A change is always reported; this is for when nothing changes",
    )
    presence_every: timedelta = Field(
        default=freshness.PRESENCE,
        gt=timedelta(),
        le=freshness.PRESENCE,
        description="Longest time between two presence messages, which say that the gateway is connected. On average "
        "three quarters of it. After three times the default without any, the gateway is shown as offline",
    )
    refresh_every: timedelta = Field(
        default=timedelta(minutes=15),
        gt=timedelta(),
        description="About how often the plan and the overlay are read again, in case a change was missed. Changes "
        "arrive at once; after a reconnection both are read, too",
    )
    retry_every: timedelta = Field(default=timedelta(seconds=5), description="Pause after a temporary failure")
