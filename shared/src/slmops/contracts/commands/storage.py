"""Commands and queries about the object store's blobs, which the registry answers: verification and restoration."""

from __future__ import annotations

from enum import StrEnum
from typing import ClassVar

from pydantic import AwareDatetime, Field

from slmops.contracts.commands.base import Command, Result
from slmops.contracts.commands.registry import Share, UploadTicket
from slmops.contracts.descriptor import Descriptor, Digest


class Damage(StrEnum):
    CORRUPT = "corrupt"
    """The stored bytes are not the digest."""
    UNREADABLE = "unreadable"
    """The store has the blob and cannot return its bytes, every time that it is asked."""
    MISSING = "missing"
    """An event names the blob, and the store does not have it."""


class DamagedBlob(Result):
    digest: Digest
    damage: Damage
    size_bytes: int = Field(default=0, description="Of the stored copy")
    needed_by: tuple[str, ...] = Field(default=(), description="What names it, at most 20; empty: it is garbage")
    quarantined: bool = Field(default=False, description="The next put of the right bytes replaces it")
    restored: bool = Field(default=False, description="The right bytes were found in the store and are back")
    fix: str = ""


class StorageReport(Result):
    """A part of a verification."""

    checked: Share = Field(description="Blobs that were read")
    damaged: tuple[DamagedBlob, ...] = ()
    after: Digest | None = Field(default=None, description="Continue after this blob; None: that was the last part")


class VerifyStorage(Command[StorageReport]):
    """Read blobs in the order of their digests and compare them. Repeat it with the answer's `after` until it is None.

    Without `repair` it changes nothing. With it, corrupt blobs go into quarantine, and a blob is restored from an
    upload that has the same bytes.
    """

    service: ClassVar[str] = "registry"
    name: ClassVar[str] = "verify_storage"
    after: Digest | None = Field(default=None, description="The last blob of the part before")
    at_most: int = Field(default=1000, ge=1, le=10_000, description="Number of blobs")
    at_most_bytes: int = Field(default=1 << 30, ge=1, description="The part ends with the blob that reaches this")
    bytes_per_s: int | None = Field(default=None, ge=1 << 16, description="Highest rate of reading; None: no limit")
    repair: bool = False


class BeginRestore(Command[UploadTicket]):
    """Request URLs for uploading blobs that are missing or in quarantine and that something names. Others get none."""

    service: ClassVar[str] = "registry"
    name: ClassVar[str] = "begin_restore"
    digests: tuple[Digest, ...] = Field(min_length=1, max_length=1000)


class RestoredBlobs(Result):
    restored: tuple[Digest, ...]


class RestoreBlobs(Command[RestoredBlobs]):
    """Verify uploaded blobs and put them in their place. Raises `DigestMismatch`, `NotFound`."""

    service: ClassVar[str] = "registry"
    name: ClassVar[str] = "restore_blobs"
    upload: str
    blobs: tuple[Descriptor, ...] = Field(min_length=1, max_length=1000)


class StorageStatus(Result):
    """What the registry's scheduled work on the object store found. Times are None before the first run."""

    corrupt: int = Field(default=0, description="Blobs in quarantine")
    missing: int = Field(default=0, description="As of the last two verifications; at most 200")
    damaged: tuple[Digest, ...] = Field(default=(), description="Some of both, at most 100")
    verified: Share = Field(default=Share(), description="In the current verification")
    verification_began: AwareDatetime | None = None
    verification_ended: AwareDatetime | None = Field(default=None, description="When the last complete one ended")
    collected_at: AwareDatetime | None = None
    collected: Share = Field(default=Share(), description="What the last scheduled collection removed")
    problems: dict[str, str] = Field(default_factory=dict, description="Scheduled work that failed last time → why")


class DescribeStorage(Command[StorageStatus]):
    """Ask what the scheduled verification and collection found."""

    service: ClassVar[str] = "registry"
    name: ClassVar[str] = "describe_storage"
