"""Writes and verifies a package as an OCI image layout, which skopeo copies and registries accept.

    oci-layout  index.json  blobs/sha256/<hex>

`index.json` names the package by its version, and the attachment: a manifest whose subject is the package's manifest
and whose only layer is the OMS bundle. The attachment has a name, too (`sha256-<hex>.oms`), so the command that copies
the package copies the signature, also to a registry without the referrers API.
Names are not signed, and copying tools change them. So a layout is accepted under any names or none: what a manifest is
follows from its content, and the version of a package is the signed one.
Formats: OCI image-spec v1.1 (image-layout.md; manifest.md, "subject").
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from slmops.contracts.addresses import blob_key
from slmops.contracts.descriptor import Descriptor, Digest, digest_of
from slmops.contracts.errors import DigestMismatch, InvalidMessage, SignatureInvalid
from slmops.contracts.manifest import MANIFEST_LIMIT_BYTES, OCI_MANIFEST, SIGNATURE, Manifest, layers_by_path
from slmops.kit.package import (
    check_content,
    check_same_files,
    check_signed,
    files_below,
    signed_manifest,
)
from slmops.kit.signature import signed_files

OCI_INDEX: Final = "application/vnd.oci.image.index.v1+json"
LAYOUT_PATH, INDEX_PATH = "oci-layout", "index.json"
REF_NAME = "org.opencontainers.image.ref.name"
_EMPTY = b"{}"
_EMPTY_CONFIG = Descriptor.of(_EMPTY, "application/vnd.oci.empty.v1+json")
_MARKERS = (b'{"imageLayoutVersion":"1.0.0"}', b'{"imageLayoutVersion": "1.0.0"}')  # our form, and skopeo's
M = TypeVar("M", bound=BaseModel)


class Index(BaseModel):
    model_config = ConfigDict(frozen=True, populate_by_name=True, serialize_by_alias=True, extra="forbid")

    schema_version: Literal[2] = Field(default=2, alias="schemaVersion")
    media_type: Literal["application/vnd.oci.image.index.v1+json"] | None = Field(
        default=None, alias="mediaType", exclude_if=lambda v: v is None
    )
    manifests: tuple[Descriptor, ...]


class Attachment(BaseModel):
    """The manifest of a package's signature, which refers to the package as its subject."""

    model_config = ConfigDict(frozen=True, populate_by_name=True, serialize_by_alias=True, extra="forbid")

    schema_version: Literal[2] = Field(default=2, alias="schemaVersion")
    media_type: Literal["application/vnd.oci.image.manifest.v1+json"] = Field(default=OCI_MANIFEST, alias="mediaType")
    artifact_type: Literal["application/vnd.dev.sigstore.bundle.v0.3+json"] = Field(
        default=SIGNATURE, alias="artifactType"
    )
    config: Descriptor = _EMPTY_CONFIG
    layers: tuple[Descriptor]
    subject: Descriptor


def signature_tag(manifest: Digest) -> str:
    """Returns the name of a package's signature in a layout or a registry."""
    return manifest.replace(":", "-", 1) + ".oms"


def layout_files(manifest: Descriptor, version: str, signature: Descriptor) -> dict[str, bytes]:
    """Returns the files of a layout except the package's own blobs, by path. `index.json` is last and completes it."""
    attached = _attachment(manifest, signature)
    named = Descriptor(
        media_type=OCI_MANIFEST, digest=manifest.digest, size=manifest.size, annotations={REF_NAME: version}
    )
    beside = Descriptor.of(attached, OCI_MANIFEST, **{REF_NAME: signature_tag(manifest.digest)})
    return {
        **{blob_key(digest_of(data)): data for data in (_EMPTY, attached)},
        LAYOUT_PATH: _MARKERS[0],
        INDEX_PATH: _dump(Index(media_type=OCI_INDEX, manifests=(named, beside))),
    }


def _attachment(package: Descriptor, signature: Descriptor) -> bytes:
    subject = Descriptor(media_type=OCI_MANIFEST, digest=package.digest, size=package.size)
    bundle = Descriptor(media_type=SIGNATURE, digest=signature.digest, size=signature.size)
    return _dump(Attachment(layers=(bundle,), subject=subject))


def is_layout(directory: Path) -> bool:
    """Returns whether a directory looks like a layout."""
    return (directory / LAYOUT_PATH).exists() or (directory / INDEX_PATH).exists()


def manifest_digest_of(directory: Path) -> Digest:
    """Returns the manifest digest of the package that the layout names. Raises `InvalidMessage`, `SignatureInvalid`."""
    return _entries(directory).package.digest


def verify_layout(directory: Path, public_key: Path, manifest_digest: Digest | None = None) -> Manifest:
    """Verifies that a layout contains exactly one package and its signature, and returns the package's manifest.

    Reads every file once and limits the size of parsed files. Raises `DigestMismatch` or `SignatureInvalid` with the
    file's name, and `InvalidMessage` if the directory is not a layout of a package.
    """
    files = set(files_below(directory))
    check_same_files({LAYOUT_PATH, INDEX_PATH} & files, {LAYOUT_PATH, INDEX_PATH})
    if _read(directory, LAYOUT_PATH).rstrip(b"\n") not in _MARKERS:
        raise InvalidMessage("the directory is not an OCI image layout 1.0.0", where=LAYOUT_PATH)
    package, attached = _entries(directory)
    if manifest_digest not in (None, package.digest):
        raise DigestMismatch(f"the layout holds {package.digest}, not {manifest_digest}", where=INDEX_PATH)
    manifest = Manifest.decode(_blob(directory, package))
    signature = parse_attachment(_blob(directory, attached), blob_key(attached.digest)).layers[0]
    blobs = [manifest.config, *manifest.layers, signature]
    named = {blob_key(blob.digest): blob for blob in blobs}
    written = {blob_key(digest_of(data)): data for data in (_EMPTY, _attachment(package, signature))}
    check_same_files(files, {*named, *written, blob_key(package.digest), LAYOUT_PATH, INDEX_PATH})
    for path, data in written.items():
        if _read(directory, path) != data:
            raise DigestMismatch(f"{path} does not match this package", where=path)
    for path, blob in named.items():
        check_content(directory / path, path, blob)
    signed = signed_files(directory / blob_key(signature.digest), public_key)
    signed_manifest(signed)
    check_signed(package.digest, layers_by_path(manifest), signed)
    return manifest


def parse_attachment(data: bytes, where: str) -> Attachment:
    """Parses the manifest of a signature. Raises `InvalidMessage`."""
    return _parsed(Attachment, data, where)


class _Entries(NamedTuple):
    package: Descriptor
    attached: Descriptor


def _entries(directory: Path) -> _Entries:
    """Returns the package and its signature that `index.json` names, each under any number of names or none.

    The file is not signed, so any other deviation from our form is rejected.
    """
    found: dict[Digest, Descriptor] = {}
    for entry in _parsed(Index, _read(directory, INDEX_PATH), INDEX_PATH).manifests:
        if (entry.media_type, entry.artifact_type) != (OCI_MANIFEST, None) or {*entry.annotations} - {REF_NAME}:
            raise InvalidMessage(f"the index has unexpected fields for {entry.digest}", where=INDEX_PATH)
        if found.setdefault(entry.digest, entry).size != entry.size:
            raise InvalidMessage(f"the index names two sizes of {entry.digest}", where=INDEX_PATH)
    attached = [entry for entry in found.values() if _is_attachment(_blob(directory, entry))]
    packages = [entry for entry in found.values() if entry not in attached]
    if len(packages) != 1:
        raise InvalidMessage(
            "the layout does not contain exactly one package",
            where=INDEX_PATH,
            fix="Copy each package to a separate layout.",
        )
    if len(attached) != 1:
        tag, count = signature_tag(packages[0].digest), len(attached) or "no"
        fix = f"Copy its signature, and nothing else: skopeo copy oci:LAYOUT:{tag} oci:{directory}:{tag}"
        raise SignatureInvalid(f"the layout has {count} signatures of this package", where=INDEX_PATH, fix=fix)
    return _Entries(packages[0], attached[0])


def _is_attachment(manifest: bytes) -> bool:
    try:
        found = json.loads(manifest)
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and found.get("artifactType") == SIGNATURE


def _blob(directory: Path, descriptor: Descriptor) -> bytes:
    """Returns a small blob after verifying it."""
    path = blob_key(descriptor.digest)
    if not (directory / path).is_file():
        raise SignatureInvalid(f"{path} of the package is missing", where=path)
    if descriptor.size > MANIFEST_LIMIT_BYTES:
        raise DigestMismatch(f"{path} has more than {MANIFEST_LIMIT_BYTES} bytes", where=path)
    check_content(directory / path, path, descriptor)
    return (directory / path).read_bytes()


def _read(directory: Path, path: str) -> bytes:
    with (directory / path).open("rb") as source:
        data = source.read(MANIFEST_LIMIT_BYTES + 1)
    if len(data) > MANIFEST_LIMIT_BYTES:
        raise DigestMismatch(f"{path} has more than {MANIFEST_LIMIT_BYTES} bytes", where=path)
    return data


def _parsed(kind: type[M], data: bytes, where: str) -> M:
    """Parses JSON in its only accepted form: no spaces, no unknown fields, no duplicate fields."""
    try:
        found = kind.model_validate_json(data)
        raw = json.loads(data)
    except (ValidationError, ValueError, RecursionError) as error:
        raise InvalidMessage(f"{where} is not a valid {kind.__name__.lower()} of a package", where=where) from error
    if json.loads(_dump(found)) != raw or _compact(raw) != data.rstrip(b"\n"):
        raise InvalidMessage(f"{where} has unexpected bytes", where=where)
    return found


def _dump(model: BaseModel) -> bytes:
    return _compact(model.model_dump(mode="json"))


def _compact(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "surrogatepass")
