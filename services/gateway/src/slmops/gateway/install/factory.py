"""The factory release: the release in the device's image, which serves before the device ever had a network.

It is verified with the trusted key, probed and soaked like any other release. Its files are never downloaded, also when
a plan names it later. The folder is read-only.
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
        """Reads the folder's release document. Raises `InvalidMessage` if it is missing or invalid."""
        document = folder / RELEASE_PATH
        try:
            release = Release.model_validate_json(document.read_bytes())
        except OSError as error:
            raise InvalidMessage(
                f"cannot read the factory release: {error.strerror}",
                where=str(document),
                fix="Point SLMOPS_FACTORY to a folder that `slmops package image` made, or unset it.",
            ) from error
        except ValidationError as error:
            raise InvalidMessage(
                f"the factory release document is not valid: {error.error_count()} errors",
                where=str(document),
                fix="Build the image again.",
            ) from error
        return cls(release, folder / PACKAGE_PATH)

    def files(self) -> list[tuple[Path, str]]:
        """Returns every file with its path in the package. The files are not verified here."""
        found = [path for path in sorted(self.package.rglob("*")) if not path.is_dir() or path.is_symlink()]
        return [(path, path.relative_to(self.package).as_posix()) for path in found]
