"""A client's trusted state on disk: verified metadata, accepted completely or not at all.

Invariants
1. Trust starts with the pinned root. Newer roots follow one at a time, each signed by the previous one's threshold.
2. A refresh works on a copy. Only a completely verified state replaces the previous one, in one rename. A refusal
   changes no byte.
3. No more of a file is read than its size limit, whatever size it claims.
4. Trusted metadata stays readable without a network, also after it has expired, for the running release but not for new
   ones.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from tuf.api.exceptions import DownloadError, RepositoryError
from tuf.api.metadata import Metadata, Root, Snapshot, TargetFile, Timestamp
from tuf.ngclient import FetcherInterface, Updater, UpdaterConfig

from slmops.contracts.descriptor import Digest
from slmops.contracts.errors import DiskFull, InvalidMessage, SlmopsError, TrustRefused
from slmops.contracts.tuf_names import METADATA_LIMIT_BYTES, ROLLOUT_TARGET, Attack, RolloutKeys, refused
from slmops.kit.atomic_write import sync
from slmops.kit.trust.attacks import Recording, by_this_clock, check_algorithms, named

_CURRENT: Final = "current"
_ROLLOUT: Final = "rollout.json"
_URL: Final = "tuf://repository/"
_OTHER_KEYS: Final = (Attack.WRONG_KEY, Attack.TOO_FEW_KEYS)


def limits() -> UpdaterConfig:
    """Returns the size limits of metadata in bytes, and the limit of consecutive roots."""
    return UpdaterConfig(
        max_root_rotations=256,
        max_delegations=8,
        root_max_length=METADATA_LIMIT_BYTES,
        timestamp_max_length=16 * 1024,
        snapshot_max_length=METADATA_LIMIT_BYTES,
        targets_max_length=METADATA_LIMIT_BYTES,
    )


class Target(BaseModel):
    """A file that the repository lists."""

    model_config = ConfigDict(frozen=True)

    digest: Digest
    size: int = Field(ge=0)


class TrustedState:
    """The trusted state in `folder`, which only one process may use. `pinned` is the root received out of band."""

    def __init__(self, folder: Path, pinned: Path) -> None:
        self._folder = folder
        self._pinned = pinned
        # Callers wait in coroutines. Cancelling them does not stop the thread.
        self._one_at_a_time = threading.Lock()

    @property
    def folder(self) -> Path:
        """The folder of the trusted metadata."""
        return self._folder / _CURRENT

    def rollout_keys(self) -> RolloutKeys | None:
        """Returns the keys that may sign plans as of the last refresh; None before the first."""
        try:
            return RolloutKeys.model_validate_json((self.folder / _ROLLOUT).read_bytes())
        except FileNotFoundError:
            return None

    def valid_until(self) -> datetime | None:
        """Returns when the stored timestamp expires; None before the first refresh."""
        file = self.folder / "timestamp.json"
        return Metadata[Timestamp].from_file(str(file)).signed.expires if file.exists() else None

    def refresh(
        self, fetcher: FetcherInterface, path: str | None = None, grace: timedelta = timedelta()
    ) -> Target | None:
        """Updates the state and looks up a target. Returns None if the repository does not list `path`.

        Timestamp and snapshot may have expired by up to `grace`; metadata that says who may sign what may not.

        Blocks. Raises `TrustRefused` with the attack's name, `InvalidMessage` for an invalid pinned root, `DiskFull`,
        and the fetcher's errors.
        """
        with self._one_at_a_time:
            try:
                return self._refreshed(fetcher, path, grace)
            except TrustRefused as error:
                if error.attack not in _OTHER_KEYS:
                    raise
            # Keys may have been rotated after we fetched the root, so try once more. A real attack fails again.
            return self._refreshed(fetcher, path, grace)

    def _refreshed(self, fetcher: FetcherInterface, path: str | None, grace: timedelta) -> Target | None:
        with self._staged() as staging:
            recording = Recording(fetcher)
            updater = self._updater(staging, recording)
            updater._trusted_set.reference_time -= grace  # the library has no option for it
            with naming(recording, staging):
                updater.refresh()
                rollout = updater.get_targetinfo(ROLLOUT_TARGET)
                found = updater.get_targetinfo(path) if path else None
            _check_digests(staging)
            _check_in_time(updater)
            (staging / _ROLLOUT).write_text(_keys_in(rollout).model_dump_json())
            return _target(found)

    def _updater(self, staging: Path, fetcher: FetcherInterface) -> Updater:
        try:
            return Updater(str(staging), _URL, fetcher=fetcher, config=limits(), bootstrap=self._pinned.read_bytes())
        except (OSError, RepositoryError, ValueError) as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise InvalidMessage(
                f"the trusted root cannot be used: {type(error).__name__}",
                where=str(self._pinned),
                fix="Copy metadata/1.root.json of the ceremony again.",
            ) from error

    @contextmanager
    def _staged(self) -> Iterator[Path]:
        """Yields a copy of the state, which becomes the state if the block ends without an error."""
        with _room(self._folder):
            self._clear()
            new = self._folder / f"state-{secrets.token_hex(6)}"
            try:
                _copy(self.folder, new)
                yield new
                self._accept(new)
            except BaseException:
                shutil.rmtree(new, ignore_errors=True)
                raise

    def _accept(self, new: Path) -> None:
        for path in [*new.rglob("*"), new]:
            if not path.is_symlink():
                sync(path)
        link = self._folder / f"{_CURRENT}.new"
        link.unlink(missing_ok=True)
        link.symlink_to(new.name)
        link.replace(self.folder)
        sync(self._folder)
        self._clear()

    def _clear(self) -> None:
        """Removes all states that killed processes left, except the current one."""
        current = os.readlink(self.folder) if self.folder.is_symlink() else ""
        for path in self._folder.glob("state-*"):
            if path.name != current:
                shutil.rmtree(path, ignore_errors=True)


@contextmanager
def naming(recording: Recording, folder: Path) -> Iterator[None]:
    """Translates the library's errors in the block to errors that name the attack."""
    try:
        yield
    except (OSError, SlmopsError):
        raise
    except Exception as error:
        expired = _root_expired(folder) if isinstance(error, (RepositoryError, DownloadError)) else False
        raise named(error, recording.last, root_expired=expired) from error


def _root_expired(folder: Path) -> bool:
    try:
        return Metadata[Root].from_file(str(folder / "root.json")).signed.is_expired()
    except Exception:  # it only affects the error text
        return False


def _check_in_time(updater: Updater) -> None:
    """Rejects expired metadata that has no grace, because the library applied the grace to all."""
    for signed in updater._trusted_set:  # a mapping whose iteration yields the values
        if not isinstance(signed, Timestamp | Snapshot) and signed.is_expired():
            fix = "Check the clock. If it is right, have the metadata signed again, then export a new bundle."
            what = f"metadata of type {signed.type} has expired{by_this_clock()}"
            raise refused(Attack.EXPIRED, what, fix=fix)


def _check_digests(folder: Path) -> None:
    timestamp = Metadata[Timestamp].from_file(str(folder / "timestamp.json")).signed
    snapshot = Metadata[Snapshot].from_file(str(folder / "snapshot.json")).signed
    check_algorithms(meta.hashes for meta in (timestamp.snapshot_meta, *snapshot.meta.values()))


def _target(found: TargetFile | None) -> Target | None:
    if found is None:
        return None
    check_algorithms(iter([found.hashes]))
    try:
        return Target(digest=f"sha256:{found.hashes['sha256']}", size=found.length)
    except ValidationError as error:
        raise refused(Attack.CORRUPT, "a target has no valid digest", where=found.path) from error


def _keys_in(rollout: TargetFile | None) -> RolloutKeys:
    if rollout is None:
        raise refused(Attack.WRONG_KEY, "the repository names no key of the rollout service", where=ROLLOUT_TARGET)
    try:
        return RolloutKeys.model_validate(rollout.custom)
    except ValidationError as error:
        raise refused(Attack.CORRUPT, "the rollout service's keys cannot be read", where=ROLLOUT_TARGET) from error


def _copy(folder: Path, new: Path) -> None:
    """Copies a folder, or makes an empty one. Not `shutil.copytree`, whose error hides that the disk is full."""
    new.mkdir(parents=True)
    for path in sorted(folder.rglob("*")):
        target = new / path.relative_to(folder)
        if path.is_dir() and not path.is_symlink():
            target.mkdir()
        else:
            shutil.copy2(path, target, follow_symlinks=False)


@contextmanager
def _room(where: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DiskFull("no space for trusted metadata", where=str(where), fix="Free disk space.") from error
