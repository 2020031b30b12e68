"""The OCI descriptor, by which services refer to blobs, and the digest that it contains."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, WithJsonSchema

_DIGEST = re.compile(r"^sha256:[0-9a-f]{64}$")


def _digest(value: str) -> str:
    if not _DIGEST.fullmatch(value):
        raise ValueError("a digest must be 'sha256:' and 64 lowercase hexadecimal digits")
    return value


Digest = Annotated[str, AfterValidator(_digest), WithJsonSchema({"type": "string", "pattern": _DIGEST.pattern})]
"""`sha256:<64 hex>`. Other algorithms are rejected; there is no negotiation."""


def digest_of(data: bytes) -> Digest:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def digest_of_chunks(chunks: Iterable[bytes]) -> tuple[Digest, int]:
    """Returns the digest and the total size in bytes of a stream, in constant memory."""
    state, size = hashlib.sha256(), 0
    for chunk in chunks:
        state.update(chunk)
        size += len(chunk)
    return "sha256:" + state.hexdigest(), size


class Descriptor(BaseModel):
    """OCI content descriptor (image-spec v1.1): media type, digest, size in bytes."""

    model_config = ConfigDict(frozen=True, populate_by_name=True, serialize_by_alias=True)

    media_type: str = Field(alias="mediaType")
    digest: Digest
    size: int = Field(ge=0)
    artifact_type: str | None = Field(default=None, alias="artifactType", exclude_if=lambda v: v is None)
    annotations: dict[str, str] = Field(default_factory=dict, exclude_if=lambda v: not v)

    @classmethod
    def of(cls, data: bytes, media_type: str, **annotations: str) -> Descriptor:
        return cls(media_type=media_type, digest=digest_of(data), size=len(data), annotations=annotations)
