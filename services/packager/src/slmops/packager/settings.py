"""The packager's settings."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from slmops.kit.settings import BusSettings, DatabaseSettings, ObjectSettings


class Settings(BusSettings, DatabaseSettings, ObjectSettings):
    signing_key: Path = Field(description="Private key that signs packages: EC P-256, PEM, without a passphrase")
