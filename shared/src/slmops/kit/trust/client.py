"""What one client trusts, on disk: verified metadata, accepted as a whole or not at all.

Rules it keeps
1. The pinned root is where trust begins; newer roots follow one by one, each signed by the threshold of the one before.
2. A refresh works on a copy. Only a state that was verified to its end takes the place of the one before, in one
   rename; whatever is refused leaves every byte as it was.
3. No file is read further than it may be long, however long it says it is.
4. What was trusted stays readable without a network, also when it is past its date: for what runs, not for what is new.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from tuf.api.exceptions import DownloadError, RepositoryError
from tuf.api.metadata import Metadata, Root, Snapshot, TargetFile, Timestamp
from tuf.ngclient import FetcherInterface, Updater, UpdaterConfig

from slmops.contracts.descriptor import Digest
from slmops.contracts.errors import DiskFull, InvalidMessage, SlmopsError, TrustRefused
from slmops.contracts.trust import METADATA_LIMIT_BYTES, ROLLOUT_TARGET, Attack, RolloutKeys, refused
from slmops.kit.trust.attacks import Recording, check_algorithms, named

_CURRENT: Final = "current"
_ROLLOUT: Final = "rollout.json"
_URL: Final = "tuf://repository/"
_OTHER_KEYS: Final = (Attack.WRONG_KEY, Attack.TOO_FEW_KEYS)


def limits() -> UpdaterConfig:
    """How long each kind of metadata may be, in bytes, and how many roots may follow one another."""
    return UpdaterConfig(
        max_root_rotations=256,
        max_delegations=8,
        root_max_length=METADATA_LIMIT_BYTES,
        timestamp_max_length=16 * 1024,
        snapshot_max_length=METADATA_LIMIT_BYTES,
        targets_max_length=METADATA_LIMIT_BYTES,
    )


class Target(BaseModel):
    """A file that the repository vouches for."""

    model_config = ConfigDict(frozen=True)

    digest: Digest
    size: int = Field(ge=0)


class TrustedState:
    """One process owns `folder`. `pinned` is the root that this client was given out of band."""

    def __init__(self, folder: Path, pinned: Path) -> None:
        self._folder = folder
        self._pinned = pinned
        # Callers wait in coroutines and may be cancelled, which stops no thread.
        self._one_at_a_time = threading.Lock()

    @property
    def folder(self) -> Path:
        """Where the trusted metadata lies."""
        return self._folder / _CURRENT

    def rollout_keys(self) -> RolloutKeys | None:
        """Who may sign plans, as of the last refresh; None before the first."""
        try:
            return RolloutKeys.model_validate_json((self.folder / _ROLLOUT).read_bytes())
        except FileNotFoundError:
            return None

    def refresh(
        self, fetcher: FetcherInterface, path: str | None = None, grace: timedelta = timedelta()
    ) -> Target | None:
        """Bring the state up to date and look up a target; None: the repository does not list `path`.

        Timestamp and snapshot may be past their date by `grace`; what says who may sign what may not.

        Blocks. Raises `TrustRefused` with the attack's name, `InvalidMessage` for a pinned root that is none,
        `DiskFull`, and what the fetcher raises.
        """
        with self._one_at_a_time:
            try:
                return self._refreshed(fetcher, path, grace)
            except TrustRefused as error:
                if error.attack not in _OTHER_KEYS:
                    raise
            # Keys may have been rotated after we asked for the root: then it is there now. An attack is one again.
            return self._refreshed(fetcher, path, grace)

    def _refreshed(self, fetcher: FetcherInterface, path: str | None, grace: timedelta) -> Target | None:
        with self._staged() as staging:
            recording = Recording(fetcher)
            updater = self._updater(staging, recording)
            updater._trusted_set.reference_time -= grace  # the library has no other place for it
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
                fix="Give the root.json of the ceremony (metadata/1.root.json), whole.",
            ) from error

    @contextmanager
    def _staged(self) -> Iterator[Path]:
        """A copy of the state to work on, which becomes the state when the block ends well."""
        with _room(self._folder):
            self._clear()
            new = self._folder / f"state-{secrets.token_hex(6)}"
            if self.folder.exists():
                shutil.copytree(self.folder, new, symlinks=True)
            else:
                new.mkdir(parents=True)
            try:
                yield new
                self._accept(new)
            except BaseException:
                shutil.rmtree(new, ignore_errors=True)
                raise

    def _accept(self, new: Path) -> None:
        for path in [*new.rglob("*"), new]:
            if not path.is_symlink():
                _sync(path)
        link = self._folder / f"{_CURRENT}.new"
        link.unlink(missing_ok=True)
        link.symlink_to(new.name)
        link.replace(self.folder)
        _sync(self._folder)
        self._clear()

    def _clear(self) -> None:
        """Remove what a killed process left: every state but the one that counts."""
        current = os.readlink(self.folder) if self.folder.is_symlink() else ""
        for path in self._folder.glob("state-*"):
            if path.name != current:
                shutil.rmtree(path, ignore_errors=True)


@contextmanager
def naming(recording: Recording, folder: Path) -> Iterator[None]:
    """Within the block the library's refusals become ours, which name the attack."""
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
    except Exception:  # it is only asked to find the better word
        return False


def _check_in_time(updater: Updater) -> None:
    """What the library let pass for the grace, and has none."""
    for signed in updater._trusted_set:  # a mapping whose iteration gives the values
        if not isinstance(signed, Timestamp | Snapshot) and signed.is_expired():
            fix = "Have it signed anew, and bring what is exported afterwards."
            raise refused(Attack.EXPIRED, f"metadata of type {signed.type} is past its date", fix=fix)


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
        raise refused(Attack.CORRUPT, "a target's digest is none", where=found.path) from error


def _keys_in(rollout: TargetFile | None) -> RolloutKeys:
    if rollout is None:
        raise refused(Attack.WRONG_KEY, "the repository names no key of the rollout service", where=ROLLOUT_TARGET)
    try:
        return RolloutKeys.model_validate(rollout.custom)
    except ValidationError as error:
        raise refused(Attack.CORRUPT, "the rollout service's keys cannot be read", where=ROLLOUT_TARGET) from error


@contextmanager
def _room(where: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DiskFull("no room for trusted metadata", where=str(where), fix="Free disk space.") from error


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
