"""Lists the files of a model's folder. Nothing is left out silently: what cannot be read as a file is an error."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

from slmops.kit.modelfile.facts import damaged


def files_below(folder: Path) -> list[str]:
    """Returns the sorted relative paths of all files. A link to a file counts as that file.

    Raises `InvalidModel` for a link to a file that does not exist, a linked folder or a special file; `OSError` for a
    folder that cannot be read.
    """

    def fail(error: OSError) -> None:
        raise error

    found = []
    for parent, folders, files in os.walk(folder, onerror=fail):
        for name in (*folders, *files):
            path = Path(parent) / name
            if path.is_symlink() or name in files:
                check_file(path)
                found.append(path.relative_to(folder).as_posix())
    return sorted(found)


def check_links(folder: Path, wanted: Callable[[Path], bool]) -> None:
    """Checks the wanted entries of a folder. Raises `InvalidModel` for a link to a file that does not exist."""
    for path in folder.iterdir():
        if path.is_symlink() and wanted(path):
            check_file(path)


def check_file(path: Path) -> None:
    """Raises `InvalidModel` if a path, or what it links to, is not a regular file."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise damaged(
            f"{path.name} is a link to a file that does not exist",
            path,
            f"It points to {path.readlink()}. Complete the download, or remove the link.",
        ) from None
    except OSError as error:
        raise damaged(f"{path.name} cannot be followed: {error.strerror}", path, "Remove the link.") from error
    if not stat.S_ISREG(mode):
        what = "a link to a folder" if stat.S_ISDIR(mode) else "neither a file nor a folder"
        raise damaged(f"{path.name} is {what}", path, "Replace it by a copy, or remove it.")
