"""Names of TUF files, roles and targets, on which packager and gateways must agree.

A target is the manifest of a package. Its path contains its digest, because a version may have several packages (one
per profile and recipe): the repository lists the existing packages, and the plan names the desired one.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from slmops.contracts.descriptor import Digest
from slmops.contracts.errors import TrustRefused

METADATA_LIMIT_BYTES: Final = 512 * 1024
"""Limit of one metadata file: in base64 it fits into a message of the bus, which may have 1 MiB."""

PACKAGES_ROLE: Final = "packages"
REVOKED_ROLE: Final = "revoked"
"""A terminating delegation before `packages` without targets: no other role can allow what its paths match."""
ROLLOUT_TARGET: Final = "trust/rollout.json"
"""The public keys of the rollout service, signed by the offline targets role."""
ALL_PACKAGES: Final = "*/*/*/manifest.json"

_ROLE = r"(root|targets|snapshot|packages|revoked|model-[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)"
METADATA_NAME_PATTERN: Final = rf"^(timestamp|[1-9][0-9]{{0,9}}\.{_ROLE})\.json$"

MetadataName = Annotated[str, StringConstraints(pattern=METADATA_NAME_PATTERN, max_length=90)]
"""A metadata file as a consistent snapshot names it: `timestamp.json`, `3.snapshot.json`, `7.model-smollm2.json`."""


class Attack(StrEnum):
    """The attack that a refusal reports. The `what` of a `TrustRefused` begins with it."""

    ROLLBACK = "rollback"
    """The state is older than the one that is already trusted."""
    FREEZE = "freeze"
    """Regularly renewed metadata has expired: somebody withholds newer metadata, or the packager is down."""
    EXPIRED = "expired"
    """Metadata of root, targets or a delegated role has expired: a ceremony is overdue."""
    MIX_AND_MATCH = "mix-and-match"
    """Signed files that do not belong to the same state, or a file in the place of another."""
    ARBITRARY_PACKAGE = "arbitrary package"
    """The plan names a package that no authorized role has listed."""
    ENDLESS_DATA = "endless data"
    """A file has more bytes than allowed or than announced."""
    WRONG_KEY = "wrong key"
    TOO_FEW_KEYS = "too few keys"
    OTHER_ALGORITHM = "other digest algorithm"
    CORRUPT = "corrupt metadata"


def refused(attack: Attack, what: str, *, where: str | None = None, fix: str | None = None) -> TrustRefused:
    return TrustRefused(f"{attack}: {what}", where=where, fix=fix)


def model_role(model: str) -> str:
    return f"model-{model}"


def model_paths(model: str) -> str:
    """Returns the pattern of all targets of a model."""
    return f"{model}/*/*/manifest.json"


def version_paths(model: str, version: str) -> str:
    """Returns the pattern of all targets of one version, which has one per profile and recipe."""
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
    """The content of `trust/rollout.json`: the keys of which any one may sign plans. The newest is last."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    keys: tuple[TrustedKey, ...] = Field(min_length=1, max_length=16)
