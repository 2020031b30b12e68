"""The access service's settings."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

from pydantic import Field

from slmops.contracts.identity import LONGEST_CREDENTIAL_LIFE
from slmops.kit.settings import BusSettings, DatabaseSettings


class Settings(BusSettings, DatabaseSettings):
    access_keys: Path = Field(description="File with the keys that sign accounts and people")
    system_creds: Path = Field(description="Credentials of the user that may change the server's accounts")
    first_admin: Path | None = Field(default=None, description="File that names the first admin and their key")
    credential_lifetime: timedelta = Field(
        default=timedelta(days=90),
        gt=timedelta(0),
        le=LONGEST_CREDENTIAL_LIFE,
        description="How long a person's credentials are valid",
    )
    compare_every: timedelta = Field(
        default=timedelta(minutes=10), gt=timedelta(0), description="How often the server's accounts are compared"
    )
