"""The rollout service's settings."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

from pydantic import Field

from slmops.contracts.identity import LONGEST_CREDENTIAL_LIFE
from slmops.kit.settings import BusSettings, DatabaseSettings


class Settings(BusSettings, DatabaseSettings):
    enrolment_token: Path = Field(description="File with the secret that a gateway must send at enrolment")
    gateway_signing_seed: Path = Field(description="File with the scoped key that signs gateways' credentials")
    credential_life: timedelta = Field(
        default=timedelta(days=30),
        ge=timedelta(hours=1),
        le=LONGEST_CREDENTIAL_LIFE,
        description="How long a gateway's credential is valid. Gateways renew it after about two thirds",
    )
    plan_signing_key: Path = Field(
        description="Private key that signs plans, PEM; the trust repository names its public half"
    )
    tick_every: timedelta = Field(
        default=timedelta(seconds=1), description="How often gates and plans are checked without an event"
    )
