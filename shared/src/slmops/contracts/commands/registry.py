"""Asked of the registry."""

from __future__ import annotations

from datetime import timedelta
from typing import ClassVar

from pydantic import AwareDatetime, Field

from slmops.contracts.commands.base import Command, Result
from slmops.contracts.descriptor import Descriptor, Digest
from slmops.contracts.evaluation import Evaluation
from slmops.contracts.model import ModelFile
from slmops.contracts.names import Name, Version


class UploadTicket(Result):
    """Where to put the missing files: digest → presigned PUT. A digest without a URL is in the store already."""

    upload: str
    urls: dict[Digest, str]


class BeginUpload(Command[UploadTicket]):
    """Ask for a place to put files. Nothing is registered and nothing shows in a list until `RegisterVersion`."""

    service: ClassVar[str] = "registry"
    name: ClassVar[str] = "begin_upload"
    model: Name
    version: Version
    files: tuple[ModelFile, ...] = Field(min_length=1)


class VariantView(Result):
    model: Name
    version: Version
    profile: Name
    recipe: Name
    digest: Digest | None = None
    gate: str = Field(description="passed or refused")
    chosen: bool = False
    reason: str = ""
    evaluation: Evaluation | None = None
    report: Descriptor | None = None


class PackageView(Result):
    profile: Name
    recipe: Name
    manifest: Descriptor
    signature: Descriptor
    size_bytes: int
    at: AwareDatetime


class PackageOfVersion(PackageView):
    """A package with the version that it is of."""

    model: Name
    version: Version


class VersionView(Result):
    model: Name
    version: Version
    digest: Digest
    format: str
    architecture: str
    size_bytes: int
    files: tuple[ModelFile, ...] = ()
    golden: Descriptor | None = None
    state: str = Field(description="registered or retired")
    stage: str = Field(default="registered", description="How far it came: registered, optimizing, packaged, refused")
    progress: str = ""
    at: AwareDatetime
    aliases: tuple[Name, ...] = ()
    variants: tuple[VariantView, ...] = ()
    packages: tuple[PackageView, ...] = ()


class RegisterVersion(Command[VersionView]):
    """Register uploaded files as an immutable version. The same files again answer the same; others are refused."""

    service: ClassVar[str] = "registry"
    name: ClassVar[str] = "register_version"
    model: Name
    version: Version
    upload: str
    format: str
    architecture: str
    files: tuple[ModelFile, ...] = Field(min_length=1)
    golden: ModelFile | None = Field(
        default=None, description="Among the uploaded; absent: the newest version's are kept"
    )


class SetAlias(Command[VersionView]):
    service: ClassVar[str] = "registry"
    name: ClassVar[str] = "set_alias"
    model: Name
    alias: Name
    version: Version


class RetireVersion(Command[VersionView]):
    service: ClassVar[str] = "registry"
    name: ClassVar[str] = "retire_version"
    model: Name
    version: Version
    reason: str = ""


class VersionList(Result):
    versions: tuple[VersionView, ...]


class ListVersions(Command[VersionList]):
    """Versions of one model, or of all; newest last."""

    service: ClassVar[str] = "registry"
    name: ClassVar[str] = "list_versions"
    model: Name | None = None
    version: Version | None = None


class Share(Result):
    """Of the object store."""

    objects: int = 0
    size_bytes: int = 0


class GarbageReport(Result):
    """`garbage` is what may be removed, `removed` the part of it that was. Without the latter it is a dry run."""

    live: Share = Field(description="Blobs that a version, variant or package names")
    young: Share = Field(description="Blobs that nothing names and that were wanted within the grace period")
    garbage: Share = Field(description="Blobs that nothing names, and nobody wanted within the grace period")
    uploads: Share = Field(description="Uploads that nobody registered within the grace period")
    removed: Share | None = Field(default=None, description="Blobs of the garbage")
    missing: int = Field(default=0, description="Blobs that something names and the store has not: should be none")


class CollectGarbage(Command[GarbageReport]):
    """Remove blobs that nothing names, and what failed uploads left. Repeat it while less is removed than there is.

    Takes a second for some hundred blobs: ask with a long timeout. It may be killed, and run twice at a time.
    """

    service: ClassVar[str] = "registry"
    name: ClassVar[str] = "collect_garbage"
    dry_run: bool = False
    grace: timedelta = Field(
        default=timedelta(days=7),
        ge=timedelta(0),
        description="How long nobody may have wanted a blob: longer than anything takes from its files to its event",
    )
    at_most: int = Field(default=10_000, ge=1, description="Blobs to remove now")
