"""The release that came with the device, from which it serves before it has ever seen a network.

It is a release like any other: verified with the trusted key, probed, soaked. Only its files need not be fetched, also
when the plan names it later. The folder is read and never written.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from slmops.contracts.errors import InvalidMessage
from slmops.contracts.factory import PACKAGE_PATH, RELEASE_PATH
from slmops.contracts.plan import Release


@dataclass(frozen=True)
class Factory:
    release: Release
    package: Path

    @classmethod
    def open(cls, folder: Path) -> Factory:
        """Raises `InvalidMessage` when the folder does not say which release it holds."""
        document = folder / RELEASE_PATH
        try:
            release = Release.model_validate_json(document.read_bytes())
        except OSError as error:
            raise InvalidMessage(
                f"the release that came with the device cannot be read: {error.strerror}",
                where=str(document),
                fix="Point SLMOPS_FACTORY to a folder that `slmops package image` made, or unset it.",
            ) from error
        except ValidationError as error:
            raise InvalidMessage(
                f"this is not a release: {error.error_count()} errors",
                where=str(document),
                fix="Build the image again.",
            ) from error
        return cls(release, folder / PACKAGE_PATH)

    def files(self) -> list[tuple[Path, str]]:
        """Every file and its path in the package. Nothing here is trusted yet: verification finds what is wrong."""
        found = [path for path in sorted(self.package.rglob("*")) if not path.is_dir() or path.is_symlink()]
        return [(path, path.relative_to(self.package).as_posix()) for path in found]
