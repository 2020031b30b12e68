"""The package: a ModelPack OCI image manifest over content-addressed layers, and a separate OMS signature.

Media types are those of the CNCF ModelPack specification (model-spec v0.0.7) and the OCI image-spec v1.1.
"""

from __future__ import annotations

from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from slmops.contracts.descriptor import Descriptor, Digest
from slmops.contracts.errors import InvalidMessage
from slmops.contracts.model import FilePath, collision

OCI_MANIFEST: Final = "application/vnd.oci.image.manifest.v1+json"
MODEL_MANIFEST: Final = "application/vnd.cncf.model.manifest.v1+json"
MODEL_CONFIG = "application/vnd.cncf.model.config.v1+json"
WEIGHT = "application/vnd.cncf.model.weight.v1.raw"
WEIGHT_CONFIG = "application/vnd.cncf.model.weight.config.v1.raw"
DOC = "application/vnd.cncf.model.doc.v1.raw"
DATASET = "application/vnd.cncf.model.dataset.v1.raw"
JOB_REPORT = "application/vnd.slmops.optimization.v1+json"
SIGNATURE: Final = "application/vnd.dev.sigstore.bundle.v0.3+json"
DELTA = "application/vnd.slmops.delta.v1"
FILE_PATH = "org.cncf.model.filepath"
TITLE = "org.opencontainers.image.title"
"""The name under which OCI tools such as oras write a layer to disk. It repeats `FILE_PATH`; only that one counts."""

MANIFEST_LIMIT_BYTES: Final = 4 << 20
"""The limit of OCI registries. It also applies to a signature."""

ADAPTER_PATH = "adapter.onnx_adapter"
"""A LoRA with which the package's graph is run. The package's other files are those of the base."""
GOLDEN_PATH = "golden.jsonl"
MANIFEST_PATH = "manifest.json"
SIGNATURE_PATH = "model.sig"
_PATH: TypeAdapter[str] = TypeAdapter(FilePath)


class Manifest(BaseModel):
    """An OCI image manifest whose layers are files. Its digest is the identity of the package."""

    model_config = ConfigDict(frozen=True, populate_by_name=True, serialize_by_alias=True, extra="ignore")

    schema_version: Literal[2] = Field(default=2, alias="schemaVersion")
    media_type: Literal["application/vnd.oci.image.manifest.v1+json"] = Field(default=OCI_MANIFEST, alias="mediaType")
    artifact_type: Literal["application/vnd.cncf.model.manifest.v1+json"] = Field(
        default=MODEL_MANIFEST, alias="artifactType"
    )
    config: Descriptor
    layers: tuple[Descriptor, ...] = Field(min_length=1)
    annotations: dict[str, str] = Field(default_factory=dict)

    def encode(self) -> bytes:
        """Returns canonical bytes: equal manifests have equal digests."""
        return self.model_dump_json(indent=None).encode()

    @classmethod
    def decode(cls, data: bytes) -> Manifest:
        """Parses a manifest. Raises `InvalidMessage`."""
        try:
            return cls.model_validate_json(data)
        except ValidationError as error:
            raise InvalidMessage(f"not a model package manifest: {error.error_count()} errors") from error


class DeltaStep(BaseModel):
    """A delta that a gateway fetches: from the files of package `base` to those of `target`, both named by manifest."""

    model_config = ConfigDict(frozen=True)

    base: Digest
    target: Digest
    delta: Descriptor
    url: str


class PackageFile(BaseModel):
    """One file of a package that a gateway fetches: its descriptor, its path in the package, and a short-lived URL."""

    model_config = ConfigDict(frozen=True)

    path: FilePath
    descriptor: Descriptor
    url: str


def layers_by_path(manifest: Manifest) -> dict[str, Descriptor]:
    """Returns the layers by path. Raises `InvalidMessage` for a path outside the package and for two that collide."""
    found: dict[str, Descriptor] = {}
    for layer in manifest.layers:
        try:
            path = _PATH.validate_python(layer.annotations.get(FILE_PATH))
        except ValidationError as error:
            raise InvalidMessage("a layer has no path inside its package", where=layer.digest) from error
        if path in (MANIFEST_PATH, SIGNATURE_PATH, *found):
            raise InvalidMessage(f"the manifest names {path} twice", where=path)
        found[path] = layer
    if both := collision((MANIFEST_PATH, SIGNATURE_PATH, *found)):
        raise InvalidMessage(f"the manifest names {both[0]} and {both[1]}, which collide", where=both[1])
    return found
