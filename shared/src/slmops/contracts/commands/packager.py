"""Commands and queries that the packager answers."""

from __future__ import annotations

from typing import ClassVar, Generic

from pydantic import AwareDatetime, Field

from slmops.contracts.commands.base import Command, R, Result
from slmops.contracts.commands.registry import PackageOfVersion
from slmops.contracts.descriptor import Digest
from slmops.contracts.manifest import DeltaStep, PackageFile
from slmops.contracts.names import Name, Version
from slmops.contracts.tuf_names import METADATA_LIMIT_BYTES, MetadataName


class PackageFiles(Result):
    manifest: PackageFile
    signature: PackageFile
    files: tuple[PackageFile, ...]
    route: tuple[DeltaStep, ...] = Field(
        default=(), description="If cheaper: deltas, in order, from a package that the gateway has to this one"
    )


class FetchPackage(Command[PackageFiles]):
    """A gateway requests the files of the package that its plan names. Requests for other packages are rejected."""

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
    """A gateway requests a file of the TUF repository. The file is public; verify it before use."""

    service: ClassVar[str] = "packager"
    name: ClassVar[str] = "fetch_metadata"
    per_gateway: ClassVar[bool] = True
    gateway_id: Name
    file: MetadataName


class BundleContents(Result):
    """The contents of a bundle. The other metadata files are fetched by name, because a version never changes."""

    blueprint: Name
    plan: str = Field(description="The signed envelope, base64")
    timestamp: str = Field(max_length=METADATA_LIMIT_BYTES * 4 // 3 + 4, description="timestamp.json, base64")
    metadata: tuple[MetadataName, ...] = Field(description="Every root, and the files to which the timestamp refers")
    packages: tuple[PackageFiles, ...] = Field(description="Packages of the stable release and of the candidate")


class PrepareBundle(Command[BundleContents]):
    """The operator requests everything that gateways of a blueprint need without a network."""

    service: ClassVar[str] = "packager"
    name: ClassVar[str] = "prepare_bundle"
    blueprint: Name
    have: tuple[Digest, ...] = Field(
        default=(), max_length=8, description="Manifests of packages that deltas may use as a base"
    )


class PackageExport(PackageOfVersion):
    """Every blob of a package. The URLs expire. `config_file` is a blob that is not among the package's files."""

    manifest_file: PackageFile
    config_file: PackageFile
    signature_file: PackageFile
    files: tuple[PackageFile, ...]


class PackageCommand(Command[R], Generic[R]):
    """A command about a package, which is named by its manifest or by its version."""

    service: ClassVar[str] = "packager"
    manifest: Digest | None = None
    model: Name | None = None
    version: Version | None = None
    profile: Name | None = Field(default=None, description="Required if a version has packages for several profiles")


class ExportPackage(PackageCommand[PackageExport]):
    """The operator requests a package by its manifest, or the newest package of a version. Raises `NotFound`."""

    name: ClassVar[str] = "export"


class Withdrawal(PackageOfVersion):
    """The package that was withdrawn (or, in a dry run, would be). `deltas` counts the deltas to it and from it."""

    deltas: int = Field(ge=0)
    deltas_bytes: int = Field(ge=0)
    running: int = Field(ge=0, description="Gateways that last reported that they run it")
    dry_run: bool


class WithdrawPackage(PackageCommand[Withdrawal]):
    """The operator withdraws a package that nobody needs: it is no longer trusted and becomes garbage.

    Raises `NotFound`, `InvalidMessage` if several packages match, and `IllegalTransition` while a plan names the
    package or, without `even_if_running`, while gateways run it. Withdrawing a withdrawn package does nothing.
    """

    name: ClassVar[str] = "withdraw"
    reason: str = Field(default="", max_length=500)
    even_if_running: bool = Field(
        default=False, description="Ignore gateways that last reported running it, such as lost ones"
    )
    dry_run: bool = False


class TrustStatus(Result):
    """When the published trust metadata expires, by role."""

    expires: dict[str, AwareDatetime]


class DescribeTrust(Command[TrustStatus]):
    """The operator asks until when the published trust metadata is valid."""

    service: ClassVar[str] = "packager"
    name: ClassVar[str] = "describe_trust"
