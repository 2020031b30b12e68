"""The packager's settings."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

from pydantic import Field

from slmops.kit.settings import BusSettings, DatabaseSettings, ObjectSettings


class Settings(BusSettings, DatabaseSettings, ObjectSettings):
    signing_key: Path = Field(description="Private key that signs packages: EC P-256, PEM, without a passphrase")
    trust_keys: Path = Field(description="Folder with the online keys of the TUF repository, as the ceremony made them")
    trust_metadata: Path = Field(description="Folder with root and targets as the keyholders signed them")
    delta_bases: int = Field(
        default=3, ge=0, le=32, description="Maximum number of deltas to a new package; 0 makes none"
    )
    delta_saves: float = Field(
        default=0.3, ge=0, lt=1, description="Share of the replaced bytes that a delta must save to be kept"
    )
    delta_space_bytes: int = Field(
        default=20_000_000_000, ge=0, description="Size of all deltas above which the oldest are withdrawn, bytes"
    )
    trust_renew_every: timedelta = Field(
        default=timedelta(seconds=30), description="How often to check for expiring or new offline metadata"
    )
