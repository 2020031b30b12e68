"""Two slots on disk, A and B: one serves, the other receives the next release. Every step survives kill -9.

    slots.json     which slot serves, the release in each slot, the failed releases; authoritative, replaced atomically
    slots/A, B     the files of a release
    slots/staging  a release that is being installed; not valid until it is renamed

A slot that slots.json does not name counts as empty. `Slots(root)` deletes its files.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path, PurePosixPath

from pydantic import BaseModel, ConfigDict, Field

from slmops.contracts.descriptor import Digest
from slmops.contracts.errors import DiskFull, IllegalTransition, InvalidMessage
from slmops.gateway.disk_full import raise_disk_full
from slmops.kit.atomic_write import sync
from slmops.kit.threads import Threads

log = logging.getLogger(__name__)
_MAX_FAILED = 32  # failures that are kept; the oldest is dropped


class SlotName(StrEnum):
    A = "A"
    B = "B"

    @property
    def other(self) -> SlotName:
        return SlotName.B if self is SlotName.A else SlotName.A


@dataclass(frozen=True, slots=True)
class Slot:
    name: SlotName
    digest: Digest
    path: Path


class SlotsState(BaseModel):
    """The content of slots.json."""

    model_config = ConfigDict(frozen=True)

    active: SlotName | None = None
    on_trial: bool = False
    """Whether the active slot is neither committed nor reverted yet. The other slot is then the one to revert to."""
    releases: dict[SlotName, Digest] = Field(default_factory=dict)
    failed: tuple[Digest, ...] = ()
    attempts: dict[Digest, int] = Field(default_factory=dict)
    """How often a release was activated and not committed."""


class Slots:
    """The two slots. One process owns the folder. A step that is not allowed now raises `IllegalTransition`.

    Every step waits for the disk. Run steps with `disk.complete`, which runs one after the other; reading the state
    does not wait.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self.disk = Threads("slots", 1)
        """The thread in which steps, and all that must be in order with them, wait for the disk."""
        self._file = root / "slots.json"
        (root / "slots").mkdir(parents=True, exist_ok=True)
        self.state = SlotsState.model_validate_json(self._file.read_bytes()) if self._file.exists() else SlotsState()
        gone = {name for name in self.state.releases if name != self.state.active and not self._path(name).exists()}
        if gone:  # it was rejected on a full disk
            left = {name: digest for name, digest in self.state.releases.items() if name not in gone}
            self.state = self._changed({"releases": left})
        self._try_clear()

    @property
    def active(self) -> Slot | None:
        """The slot that serves, also after a restart."""
        return self._slot(self.state.active)

    @property
    def candidate(self) -> Slot | None:
        """The other slot if it holds a release: one to activate, or while `on_trial` the one to revert to."""
        return self._slot(self._inactive)

    @property
    def installed(self) -> list[Slot]:
        """All slots that hold a release, the active one first."""
        return [slot for slot in (self.active, self.candidate) if slot]

    @property
    def on_trial(self) -> bool:
        return self.state.on_trial

    @property
    def failed(self) -> tuple[Digest, ...]:
        return self.state.failed

    def attempts(self, digest: Digest) -> int:
        return self.state.attempts.get(digest, 0)

    def install(self, manifest_digest: Digest, files: Iterable[tuple[Path, str]]) -> Slot:
        """Places the files, `(blob, path in the package)`, in the inactive slot, by hard link if the disk supports it.

        Idempotent for an installed release. Raises `InvalidMessage` for a path that leaves the slot or repeats and for
        a blob that is a symlink, and `DiskFull`. After an error the slot is empty and the active slot is unchanged.
        """
        self._require_no_trial()
        if self.candidate and self.candidate.digest == manifest_digest:
            return self.candidate
        name = self._inactive
        laid_out = _checked(files)
        self._write(releases=self._without(name))
        self._clear()
        staging = self._root / "slots" / "staging"
        try:
            with raise_disk_full("to install a release", self._root):
                for blob, path in laid_out:
                    _place(blob, staging / path)
                _sync_tree(staging)
                os.rename(staging, self._path(name))
                sync(self._root / "slots")
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        self._write(releases={**self.state.releases, name: manifest_digest})
        return Slot(name, manifest_digest, self._path(name))

    def activate(self) -> Slot:
        """Makes the candidate the active slot, on trial. The previous slot is kept for a revert."""
        candidate = self._require_candidate()
        attempts = {**self.state.attempts, candidate.digest: self.attempts(candidate.digest) + 1}
        self._write(active=candidate.name, on_trial=True, attempts=attempts)
        return candidate

    def commit(self) -> Slot:
        """Ends the trial and keeps the release."""
        active = self._require_trial()
        attempts = {digest: count for digest, count in self.state.attempts.items() if digest != active.digest}
        self._write(on_trial=False, attempts=attempts)
        return active

    def revert(self, *, failed: bool = True, counts: bool = True) -> Slot | None:
        """Ends the trial and returns to the previous slot, None if there was none.

        `failed`: record the release as failed, so that it is not tried again. `counts`: the attempt stays counted;
        False if the release was not at fault.
        """
        active = self._require_trial()
        attempts = dict(self.state.attempts)
        if not counts:
            attempts[active.digest] = max(0, self.attempts(active.digest) - 1)
        previous = self.candidate.name if self.candidate else None
        marked = self._with_failed(active.digest) if failed else self.state.failed
        self._undo(active=previous, on_trial=False, failed=marked, attempts=attempts)
        return self.active

    def reject(self) -> None:
        """Records a candidate that failed before it was activated, and empties its slot. It is not tried again."""
        candidate = self._require_candidate()
        changes = {"releases": self._without(candidate.name), "failed": self._with_failed(candidate.digest)}
        try:
            self._write(**changes)
        except (DiskFull, OSError):
            shutil.rmtree(candidate.path, ignore_errors=True)  # its files are the space that is missing
            self._undo(**changes)
        self._try_clear()

    def fail(self, digest: Digest) -> None:
        """Records a release that failed before it was installed."""
        self._undo(failed=self._with_failed(digest))

    def clear_failure(self, digest: Digest) -> None:
        """Allows the release to be tried again and resets its attempts. Does nothing for one that did not fail."""
        failed = tuple(other for other in self.state.failed if other != digest)
        attempts = {other: count for other, count in self.state.attempts.items() if other != digest}
        self._write(failed=failed, attempts=attempts)

    @property
    def _inactive(self) -> SlotName:
        return self.state.active.other if self.state.active else SlotName.A

    def _slot(self, name: SlotName | None) -> Slot | None:
        digest = self.state.releases.get(name) if name else None
        return Slot(name, digest, self._path(name)) if name and digest else None

    def _path(self, name: SlotName) -> Path:
        return self._root / "slots" / name

    def _without(self, name: SlotName) -> dict[SlotName, Digest]:
        return {other: digest for other, digest in self.state.releases.items() if other != name}

    def _with_failed(self, digest: Digest) -> tuple[Digest, ...]:
        return (*(other for other in self.state.failed if other != digest), digest)[-_MAX_FAILED:]

    def _require_no_trial(self) -> None:
        if self.state.on_trial:
            raise IllegalTransition("a release is on trial", fix="Commit or revert it first.")

    def _require_candidate(self) -> Slot:
        self._require_no_trial()
        if self.candidate is None:
            raise IllegalTransition("there is no candidate", fix="Install a release first.")
        return self.candidate

    def _require_trial(self) -> Slot:
        if self.active is None or not self.state.on_trial:
            raise IllegalTransition("no release is on trial", fix="Activate one first.")
        return self.active

    def _clear(self) -> None:
        """Deletes everything in `slots/` that slots.json does not name."""
        named = {str(name) for name in self.state.releases}
        for path in (self._root / "slots").iterdir():
            if path.name not in named:
                shutil.rmtree(path)

    def _try_clear(self) -> None:
        """Like `_clear`, but a disk that fails stops nothing: what is left is deleted before the next release comes."""
        try:
            self._clear()
        except OSError as error:
            log.warning("cannot delete files of other releases in %s: %s", self._root / "slots", error)

    def _undo(self, **changes: object) -> None:
        """Changes the state like `_write`, but only in memory if the disk is full or damaged.

        The next change writes both. After a restart before that, the disk has the state of a gateway that went down
        before it could undo: a release on trial is reverted then, and a failed one may be tried again.
        """
        try:
            self._write(**changes)
        except (DiskFull, OSError) as error:
            log.warning("a failed update is undone in memory only: %s", error)
            self.state = self._changed(changes)

    def _changed(self, changes: dict[str, object]) -> SlotsState:
        return SlotsState.model_validate({**self.state.model_dump(), **changes})

    def _write(self, **changes: object) -> None:
        """Changes the state: on disk first, then in memory."""
        state = self._changed(changes)
        new = self._file.with_suffix(".new")
        with raise_disk_full("to install a release", self._root):
            with new.open("wb") as out:
                out.write(state.model_dump_json(indent=2).encode())
                out.flush()
                os.fsync(out.fileno())
            os.rename(new, self._file)
            sync(self._root)
        self.state = state


def _checked(files: Iterable[tuple[Path, str]]) -> list[tuple[Path, PurePosixPath]]:
    """Returns the files to install. Raises `InvalidMessage` for a path outside the slot or on another file."""
    laid_out: dict[PurePosixPath, Path] = {}
    for blob, text in files:
        path = PurePosixPath(text)
        climbs = path.is_absolute() or ".." in path.parts or not path.parts or "\\" in text or "\0" in text
        if climbs or path in laid_out:
            raise InvalidMessage(f"a package may not contain a file at {text!r}", fix="Rebuild the package.")
        if blob.is_symlink() or not blob.is_file():
            raise InvalidMessage(f"the blob for {text!r} is not a regular file", where=blob.name)
        laid_out[path] = blob
    folders = {parent for path in laid_out for parent in path.parents}
    if both := folders & laid_out.keys():
        raise InvalidMessage(f"a package names {min(map(str, both))!r} as a file and as a folder")
    if not laid_out:
        raise InvalidMessage("a package without files cannot be installed")
    return [(blob, path) for path, blob in laid_out.items()]


def _place(blob: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(blob, target)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP):
            raise
        shutil.copyfile(blob, target)  # a different file system, or one without hard links
        sync(target)


def _sync_tree(folder: Path) -> None:
    """Fsyncs the folders only. Files are fsynced when they are written."""
    for path in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        sync(path)
