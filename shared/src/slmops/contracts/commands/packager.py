"""Asked of the packager."""

from __future__ import annotations

from typing import ClassVar, Generic

from pydantic import Field

from slmops.contracts.commands.base import Command, R, Result
from slmops.contracts.commands.registry import PackageOfVersion
from slmops.contracts.descriptor import Digest
from slmops.contracts.manifest import DeltaStep, PackageFile
from slmops.contracts.names import Name, Version
from slmops.contracts.trust import METADATA_LIMIT_BYTES, MetadataName


class PackageFiles(Result):
    manifest: PackageFile
    signature: PackageFile
    files: tuple[PackageFile, ...]
    route: tuple[DeltaStep, ...] = Field(
        default=(), description="Deltas that lead here from a package the gateway has, in order, where that is cheaper"
    )


class FetchPackage(Command[PackageFiles]):
    """A gateway asks for the files of the package that its plan names. Refused for any other package."""

    service: ClassVar[str] = "packager"
    name: ClassVar[str] = "fetch"
    per_gateway: ClassVar[bool] = True
    gateway_id: Name
    manifest: Digest
    have: tuple[Digest, ...] = Field(default=(), max_length=8, description="Manifests of packages in its slots")


class MetadataFile(Result):
    file: MetadataName
    content: str = Field(max_length=METADATA_LIMIT_BYTES * 4 // 3 + 4, description="Base64")


class FetchMetadata(Command[MetadataFile]):
    """A gateway asks for a file of the TUF repository. Public, and worth nothing until it was verified."""

    service: ClassVar[str] = "packager"
    name: ClassVar[str] = "fetch_metadata"
    per_gateway: ClassVar[bool] = True
    gateway_id: Name
    file: MetadataName


class BundleContents(Result):
    """What crosses an air gap. The other metadata files are fetched by name: a version never changes."""

    blueprint: Name
    plan: str = Field(description="The signed envelope, base64")
    timestamp: str = Field(max_length=METADATA_LIMIT_BYTES * 4 // 3 + 4, description="timestamp.json, base64")
    metadata: tuple[MetadataName, ...] = Field(description="Every root, and what the timestamp leads to")
    packages: tuple[PackageFiles, ...] = Field(description="Of the stable release and of the candidate")


class PrepareBundle(Command[BundleContents]):
    """The operator asks for everything that gateways of a blueprint need when they have no network."""

    service: ClassVar[str] = "packager"
    name: ClassVar[str] = "prepare_bundle"
    blueprint: Name
    have: tuple[Digest, ...] = Field(default=(), max_length=8, description="Manifests from which deltas may start")


class PackageExport(PackageOfVersion):
    """Every blob of a package. Addresses expire; `config` is a blob that no file of a laid out package holds."""

    manifest_file: PackageFile
    config_file: PackageFile
    signature_file: PackageFile
    files: tuple[PackageFile, ...]


class PackageCommand(Command[R], Generic[R]):
    """About a package that is named by its manifest, or by its version."""

    service: ClassVar[str] = "packager"
    manifest: Digest | None = None
    model: Name | None = None
    version: Version | None = None
    profile: Name | None = Field(default=None, description="Needed where a version has packages for several")


class ExportPackage(PackageCommand[PackageExport]):
    """The operator asks for a package: by its manifest, or the newest of a version. Raises `NotFound` for none."""

    name: ClassVar[str] = "export"


class Withdrawal(PackageOfVersion):
    """What is vouched for no more, or would be. `deltas` lead to the package or start from it."""

    deltas: int = Field(ge=0)
    deltas_bytes: int = Field(ge=0)
    running: int = Field(ge=0, description="Gateways that said last that they run it")
    dry_run: bool


class WithdrawPackage(PackageCommand[Withdrawal]):
    """The operator withdraws a package that nobody needs: it is no longer trusted and becomes garbage.

    Raises `NotFound`, `InvalidMessage` when several are meant, `IllegalTransition` while a plan names it or, but for
    `even_if_running`, while gateways run it. Of one that was withdrawn nothing happens.
    """

    name: ClassVar[str] = "withdraw"
    reason: str = Field(default="", max_length=500)
    even_if_running: bool = Field(default=False, description="Gateways that are lost say for ever that they run it")
    dry_run: bool = False
