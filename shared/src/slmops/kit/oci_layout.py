"""A package as an OCI image layout: what skopeo copies and a registry takes.

    oci-layout  index.json  blobs/sha256/<hex>

`index.json` names the package by its version, and beside it what refers to it: a manifest whose subject is the
package's and whose only layer is the OMS bundle. It has a name too (`sha256-<hex>.oms`), so that the command that
copies the package copies the signature, also to a registry without the referrers API.
Formats: OCI image-spec v1.1 (image-layout.md; manifest.md, "subject").
"""

from __future__ import annotations

import json
from collections.abc import Mapping
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
VERSION = "org.opencontainers.image.version"
_EMPTY = b"{}"
_EMPTY_CONFIG = Descriptor.of(_EMPTY, "application/vnd.oci.empty.v1+json")
_MARKERS = (b'{"imageLayoutVersion":"1.0.0"}', b'{"imageLayoutVersion": "1.0.0"}')  # ours, and what skopeo writes
M = TypeVar("M", bound=BaseModel)


class Index(BaseModel):
    model_config = ConfigDict(frozen=True, populate_by_name=True, serialize_by_alias=True, extra="forbid")

    schema_version: Literal[2] = Field(default=2, alias="schemaVersion")
    media_type: Literal["application/vnd.oci.image.index.v1+json"] | None = Field(
        default=None, alias="mediaType", exclude_if=lambda v: v is None
    )
    manifests: tuple[Descriptor, ...]


class Attachment(BaseModel):
    """The manifest of what refers to a package: of its signature."""

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
    """The name of a package's signature in a layout or a registry."""
    return manifest.replace(":", "-", 1) + ".oms"


def layout_files(manifest: Descriptor, version: str, signature: Descriptor) -> dict[str, bytes]:
    """What a layout has besides the package's own blobs, by path; `index.json` is last: with it the layout is one."""
    subject = Descriptor(media_type=OCI_MANIFEST, digest=manifest.digest, size=manifest.size)
    bundle = Descriptor(media_type=SIGNATURE, digest=signature.digest, size=signature.size)
    attached = _dump(Attachment(layers=(bundle,), subject=subject))
    named = subject.model_copy(update={"annotations": {REF_NAME: version}})
    beside = Descriptor.of(attached, OCI_MANIFEST, **{REF_NAME: signature_tag(manifest.digest)})
    return {
        **{blob_key(digest_of(data)): data for data in (_EMPTY, attached)},
        LAYOUT_PATH: _MARKERS[0],
        INDEX_PATH: _dump(Index(media_type=OCI_INDEX, manifests=(named, beside))),
    }


def is_layout(directory: Path) -> bool:
    """Whether it means to be one."""
    return (directory / LAYOUT_PATH).exists() or (directory / INDEX_PATH).exists()


def manifest_digest_of(directory: Path) -> Digest:
    """Which package the layout says that it holds. Raises `InvalidMessage`, `SignatureInvalid`."""
    return _entries(directory).package.digest


def verify_layout(directory: Path, public_key: Path, manifest_digest: Digest | None = None) -> Manifest:
    """The manifest of a layout that holds one package and its signature, and nothing else.

    Every file is read once, what is parsed is bounded. Raises `DigestMismatch` or `SignatureInvalid`, naming the file,
    and `InvalidMessage` for what is no layout of a package.
    """
    files = set(files_below(directory))
    check_same_files({LAYOUT_PATH, INDEX_PATH} & files, {LAYOUT_PATH, INDEX_PATH})
    if _read(directory, LAYOUT_PATH).rstrip(b"\n") not in _MARKERS:
        raise InvalidMessage("this is no OCI image layout 1.0.0", where=LAYOUT_PATH)
    package, attached = _entries(directory)
    if manifest_digest not in (None, package.digest):
        raise DigestMismatch(f"the layout holds {package.digest}, not {manifest_digest}", where=INDEX_PATH)
    manifest = Manifest.decode(_blob(directory, package))
    _check_name(package, manifest)
    signature = _parsed(Attachment, _blob(directory, attached), blob_key(attached.digest)).layers[0]
    blobs = [manifest.config, *manifest.layers, signature]
    named = {blob_key(blob.digest): blob for blob in blobs}
    written = layout_files(package, manifest.annotations[VERSION], signature)
    check_same_files(files, {*named, *written, blob_key(package.digest)})
    _check_written(directory, written)
    for path, blob in named.items():
        check_content(directory / path, path, blob)
    signed = signed_files(directory / blob_key(signature.digest), public_key)
    signed_manifest(signed)
    check_signed(package.digest, layers_by_path(manifest), signed)
    return manifest


class _Entries(NamedTuple):
    package: Descriptor
    attached: Descriptor


def _entries(directory: Path) -> _Entries:
    """Of `index.json`, which nothing signs: there is no bit in it that may be another."""
    index = _parsed(Index, _read(directory, INDEX_PATH), INDEX_PATH)
    for entry in index.manifests:
        if (entry.media_type, entry.artifact_type, {*entry.annotations}) != (OCI_MANIFEST, None, {REF_NAME}):
            raise InvalidMessage(f"the index has unexpected fields for {entry.digest}", where=INDEX_PATH)
    by_name = {entry.annotations[REF_NAME]: entry for entry in index.manifests}
    packages = [entry for name, entry in by_name.items() if not name.startswith("sha256-")]
    if len(packages) != 1 or len(index.manifests) > 2:
        raise InvalidMessage("the layout does not hold one package", where=INDEX_PATH, fix="Copy each to its own.")
    tag = signature_tag(packages[0].digest)
    if tag not in by_name:
        fix = f"Copy it too: skopeo copy oci:LAYOUT:{tag} oci:{directory}:{tag}"
        raise SignatureInvalid("the layout has no signature of this package", where=INDEX_PATH, fix=fix)
    return _Entries(packages[0], by_name[tag])


def _check_name(package: Descriptor, manifest: Manifest) -> None:
    version = manifest.annotations.get(VERSION)
    if version is None or package.annotations[REF_NAME] != version:
        named = package.annotations[REF_NAME]
        raise InvalidMessage(
            f"the layout calls version {version} {named!r}", where=INDEX_PATH, fix="Copy it under its version."
        )


def _check_written(directory: Path, written: Mapping[str, bytes]) -> None:
    """Besides `index.json`, which a tool that copies writes anew, all bytes follow from package and signature."""
    for path, data in written.items():
        if path not in (INDEX_PATH, LAYOUT_PATH) and _read(directory, path) != data:
            raise DigestMismatch(f"{path} is not what belongs to this package", where=path)


def _blob(directory: Path, descriptor: Descriptor) -> bytes:
    """A small one, verified."""
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
    """JSON without a byte that says nothing: no space, no field that is unknown, none twice."""
    try:
        found = kind.model_validate_json(data)
        raw = json.loads(data)
    except (ValidationError, ValueError, RecursionError) as error:
        raise InvalidMessage(f"{where} is no {kind.__name__.lower()} of a package", where=where) from error
    if json.loads(_dump(found)) != raw or _compact(raw) != data.rstrip(b"\n"):
        raise InvalidMessage(f"{where} says more than it should", where=where)
    return found


def _dump(model: BaseModel) -> bytes:
    return _compact(model.model_dump(mode="json"))


def _compact(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "surrogatepass")
