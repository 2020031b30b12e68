"""The bundle that crosses an air gap: one file with a blueprint's plan, its packages or deltas, and the trust metadata.

Nothing is trusted because it is in a bundle. A bundle only replaces the bus and the object store as a transport; its
readers rely on the same signatures as with a network.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Final, Literal, Self

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from slmops.contracts.descriptor import Descriptor, Digest
from slmops.contracts.errors import InvalidBundle
from slmops.contracts.names import Name
from slmops.contracts.tuf_names import METADATA_NAME_PATTERN

BUNDLE_SUFFIX: Final = ".slmops"
INDEX_NAME: Final = "bundle.json"
PLAN_NAME: Final = "plan.json"
INDEX_LIMIT_BYTES: Final = 1 << 20
MAX_MEMBERS: Final = 4096
_BLOBS, _METADATA = "blobs/sha256/", "metadata/"
_NAME = rf"^(plan\.json|blobs/sha256/[0-9a-f]{{64}}|metadata/{METADATA_NAME_PATTERN.strip('^')[:-1]})$"


def blob_name(digest: Digest) -> str:
    return _BLOBS + digest.removeprefix("sha256:")


def metadata_name(file: str) -> str:
    return _METADATA + file


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Member(_Strict):
    """A file of the bundle. The grammar of names allows no path that leaves the bundle's folder."""

    name: Annotated[str, StringConstraints(pattern=_NAME, max_length=100)]
    digest: Digest
    size: int = Field(ge=0, le=1 << 40)

    @model_validator(mode="after")
    def _named_by_digest(self) -> Self:
        if self.name.startswith(_BLOBS) and self.name != blob_name(self.digest):
            raise ValueError("a blob must be named by its digest")
        return self


class BundledDelta(_Strict):
    base: Digest
    target: Digest
    delta: Descriptor


class BundledPackage(_Strict):
    """A package of the bundle. If it has a route of deltas, its whole files may be missing; then only gateways with the
    route's first base can use it."""

    manifest: Descriptor
    signature: Descriptor
    route: tuple[BundledDelta, ...] = Field(default=(), max_length=8)


class BundleIndex(_Strict):
    """The bundle's first member. It lists the others in the order in which they follow: sorted by name, each once."""

    format: Literal[1] = 1
    blueprint: Name
    created_at: AwareDatetime
    packages: tuple[BundledPackage, ...] = Field(max_length=8)
    members: tuple[Member, ...] = Field(max_length=MAX_MEMBERS)

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if any(one.name >= other.name for one, other in pairwise(self.members)):
            raise ValueError("members must be sorted by name, each listed once")
        return self

    @classmethod
    def decode(cls, data: bytes) -> BundleIndex:
        """Parses an index. Raises `InvalidBundle`."""
        try:
            return cls.model_validate_json(data)
        except ValidationError as error:
            first = error.errors()[0]
            why = f"{'.'.join(map(str, first['loc'])) or 'document'}: {first['msg']}"
            raise InvalidBundle(f"the bundle's index is not valid: {why}", where=INDEX_NAME) from error
