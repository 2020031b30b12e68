"""What packager and gateways must agree on to trust the same things: names of TUF's files, roles and targets.

A target is the manifest of a package. Its path holds its digest, because a version may have several packages (one per
profile and recipe): the repository says which packages exist, and the plan says which of them is wanted.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from slmops.contracts.descriptor import Digest
from slmops.contracts.errors import TrustRefused

METADATA_LIMIT_BYTES: Final = 512 * 1024
"""Of one metadata file: in base64 it still fits into a message of the bus, which holds 1 MiB."""

PACKAGES_ROLE: Final = "packages"
REVOKED_ROLE: Final = "revoked"
"""Delegated to before `packages`, without a target and terminating: what its paths match is nobody's to allow."""
ROLLOUT_TARGET: Final = "trust/rollout.json"
"""The public keys of the rollout service, signed by the offline targets role."""
ALL_PACKAGES: Final = "*/*/*/manifest.json"

_ROLE = r"(root|targets|snapshot|packages|revoked|model-[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)"
METADATA_NAME_PATTERN: Final = rf"^(timestamp|[1-9][0-9]{{0,9}}\.{_ROLE})\.json$"

MetadataName = Annotated[str, StringConstraints(pattern=METADATA_NAME_PATTERN, max_length=90)]
"""A metadata file as a consistent snapshot names it: `timestamp.json`, `3.snapshot.json`, `7.model-smollm2.json`."""


class Attack(StrEnum):
    """What a refusal says that it saw. `what` of the `TrustRefused` begins with it."""

    ROLLBACK = "rollback"
    """An older state than the one that is trusted already."""
    FREEZE = "freeze"
    """What should be renewed all the time is out of date: somebody keeps the news from us, or the packager is down."""
    EXPIRED = "expired"
    """Keys' own statements (root, targets, a delegated role) are out of date: a ceremony is overdue."""
    MIX_AND_MATCH = "mix-and-match"
    """Files, each of them signed, that do not belong to one state, or one in the place of another."""
    ARBITRARY_PACKAGE = "arbitrary package"
    """The plan wants a package that nobody who may has vouched for."""
    ENDLESS_DATA = "endless data"
    """More bytes than such a file may have, or than it was said to have."""
    WRONG_KEY = "wrong key"
    TOO_FEW_KEYS = "too few keys"
    OTHER_ALGORITHM = "other digest algorithm"
    CORRUPT = "corrupt metadata"


def refused(attack: Attack, what: str, *, where: str | None = None, fix: str | None = None) -> TrustRefused:
    return TrustRefused(f"{attack}: {what}", where=where, fix=fix)


def model_role(model: str) -> str:
    return f"model-{model}"


def model_paths(model: str) -> str:
    """The pattern of all targets of a model."""
    return f"{model}/*/*/manifest.json"


def version_paths(model: str, version: str) -> str:
    """The pattern of all targets of one version: it has one per profile and recipe."""
    return f"{model}/{version}/*/manifest.json"


def package_target(model: str, version: str, manifest: Digest) -> str:
    return f"{model}/{version}/{manifest.removeprefix('sha256:')}/manifest.json"


class KeyValue(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    public: str


class TrustedKey(BaseModel):
    """A public key in TUF's form."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    keyid: str = Field(min_length=1, max_length=128)
    keytype: str
    scheme: str
    keyval: KeyValue


class RolloutKeys(BaseModel):
    """The content of `trust/rollout.json`: each of the keys may sign plans, alone. The newest is the last."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    keys: tuple[TrustedKey, ...] = Field(min_length=1, max_length=16)
