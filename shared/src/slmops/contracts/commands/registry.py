"""Commands and queries that the registry answers."""

from __future__ import annotations

from datetime import timedelta
from typing import ClassVar

from pydantic import AwareDatetime, Field

from slmops.contracts.commands.base import Command, Result
from slmops.contracts.descriptor import Descriptor, Digest
from slmops.contracts.evaluation import Evaluation
from slmops.contracts.model import ModelFile
from slmops.contracts.names import Name, Version
from slmops.contracts.prompts.evaluation_data import EvaluationData


class UploadTicket(Result):
    """Where to upload the missing files: digest → presigned PUT. A digest without a URL is already in the store."""

    upload: str
    urls: dict[Digest, str]


class BeginUpload(Command[UploadTicket]):
    """Request URLs for uploading files. Until `RegisterVersion` nothing is registered and no list shows anything."""

    service: ClassVar[str] = "registry"
    name: ClassVar[str] = "begin_upload"
    model: Name
    version: Version
    files: tuple[ModelFile, ...] = Field(min_length=1)
    md5: dict[Digest, str] = Field(
        default_factory=dict,
        description="MD5 of files, in hex: the store's own checksum, which shows whether a stored blob was changed",
    )


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
    """A package with its model and version."""

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
    data: EvaluationData | None = Field(default=None, description="Own texts and tasks for its optimizations")
    state: str = Field(description="registered or retired")
    stage: str = Field(default="registered", description="Progress: registered, optimizing, packaged, refused")
    progress: str = ""
    at: AwareDatetime
    aliases: tuple[Name, ...] = ()
    variants: tuple[VariantView, ...] = ()
    packages: tuple[PackageView, ...] = ()


class RegisterVersion(Command[VersionView]):
    """Register uploaded files as an immutable version. Repeating it with the same files gives the same reply; other
    files are rejected."""

    service: ClassVar[str] = "registry"
    name: ClassVar[str] = "register_version"
    model: Name
    version: Version
    upload: str
    format: str
    architecture: str
    files: tuple[ModelFile, ...] = Field(min_length=1)
    golden: ModelFile | None = Field(
        default=None, description="One of the uploaded files; by default the golden prompts of the newest version"
    )
    data: EvaluationData | None = Field(
        default=None, description="Own texts and tasks for the version's optimizations, among the uploaded files"
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
    cursor: str | None = Field(default=None, description="Ask with it for older ones; None: these are the oldest")


class ListVersions(Command[VersionList]):
    """List the newest versions of one model or of all, the newest last. The cursor asks for the page before."""

    service: ClassVar[str] = "registry"
    name: ClassVar[str] = "list_versions"
    model: Name | None = None
    version: Version | None = None
    limit: int = Field(default=200, ge=1, le=500)
    cursor: str | None = None


class Share(Result):
    """A number of objects in the object store and their total size."""

    objects: int = 0
    size_bytes: int = 0


class GarbageReport(Result):
    """The result of a collection. `garbage` may be removed, `removed` is the part that was; absent after a dry run."""

    live: Share = Field(description="Blobs that a version, variant or package names")
    young: Share = Field(description="Unnamed blobs that were written or claimed within the grace period")
    garbage: Share = Field(description="Unnamed blobs that were neither written nor claimed within the grace period")
    uploads: Share = Field(description="Uploads that nobody registered within the grace period")
    removed: Share | None = Field(default=None, description="Blobs of the garbage that were removed")
    missing: int = Field(default=0, description="Blobs that are named but not in the store: should be 0")


class CollectGarbage(Command[GarbageReport]):
    """Remove blobs that nothing names, and leftovers of failed uploads. Repeat it until all garbage is removed.

    It takes a second for a few hundred blobs: use a long timeout. It may be killed, and two may run at once.
    """

    service: ClassVar[str] = "registry"
    name: ClassVar[str] = "collect_garbage"
    dry_run: bool = False
    grace: timedelta = Field(
        default=timedelta(days=7),
        ge=timedelta(0),
        description="Time since the last write or claim of a blob; it must exceed the time from an upload to its event",
    )
    at_most: int = Field(default=10_000, ge=1, description="Highest number of blobs to remove")
