"""The documents of releases on disk: what the plan said about a release, and in which rollout it was tried last."""

from __future__ import annotations

import logging
from pathlib import Path

from pydantic import ValidationError

from slmops.contracts.descriptor import Digest
from slmops.contracts.plan import Release
from slmops.gateway.disk_full import raise_disk_full
from slmops.kit.atomic_write import atomic_write

log = logging.getLogger(__name__)


class ReleaseDocuments:
    """The documents of one gateway, two small files per release. What was read or written once is kept in memory."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._releases: dict[Digest, Release] = {}
        self._rollouts = {f"sha256:{file.stem}": file.read_text() for file in folder.glob("*.rollout")}

    def release(self, digest: Digest) -> Release | None:
        """Returns the document of a release that was desired here before; None if there is none, or a damaged one.

        Waits for the disk the first time.
        """
        path = self._path(digest)
        if digest in self._releases or not path.exists():
            return self._releases.get(digest)
        try:
            self._releases[digest] = Release.model_validate_json(path.read_bytes())
        except ValidationError:
            log.error("cannot read the release document %s", path)
        return self._releases.get(digest)

    def remember(self, release: Release) -> None:
        """Stores a release's document, so that the release can be served after a restart without a network.

        Raises `DiskFull`.
        """
        digest = release.manifest.digest
        self._write(self._path(digest), release.model_dump_json(), "to store a release's document")
        self._releases[digest] = release

    def rollout(self, digest: Digest) -> str | None:
        """Returns the rollout of the last attempt to install a release; None if there was none."""
        return self._rollouts.get(digest)

    def remember_attempt(self, digest: Digest, rollout: str) -> None:
        """Stores the rollout in which a release is tried. Raises `DiskFull`."""
        self._write(self._path(digest).with_suffix(".rollout"), rollout, "to store the id of a rollout")
        self._rollouts[digest] = rollout

    def _write(self, path: Path, text: str, purpose: str) -> None:
        with raise_disk_full(purpose, self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as out:
                out.write(text.encode())

    def _path(self, digest: Digest) -> Path:
        return self._folder / f"{digest.removeprefix('sha256:')}.json"
