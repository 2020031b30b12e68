"""The files of a model version or a variant. Each file is a blob with a path.

Paths have one spelling: no control characters, which could make two sets of files look alike, and no two paths that a
file system without case or with other Unicode forms would take for one.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from slmops.contracts.descriptor import Digest, digest_of


def _relative(value: str) -> str:
    path = PurePosixPath(value)
    if path.is_absolute() or not path.parts or ".." in path.parts or "\\" in value or "\0" in value:
        raise ValueError("a file path must be relative, inside its folder, with '/' between its parts")
    if any(unicodedata.category(character) in _UNSEEN for character in value):
        raise ValueError(f"the file path {value!a} has control characters")
    return str(path)


_UNSEEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
"""Unicode categories: control and format characters, single surrogates, separators of lines and paragraphs."""


FilePath = Annotated[str, AfterValidator(_relative)]
"""A relative POSIX path without control characters that cannot leave its folder."""


def collision(paths: Iterable[str]) -> tuple[str, str] | None:
    """Returns two paths that cannot both be files of one folder on every file system; None if there are none.

    They are equal except for case and Unicode form, or one is a file and for the other a folder.
    """
    taken: dict[str, str] = {}
    for path in paths:
        folded = _folded(path)
        if folded in taken:
            return taken[folded], path
        taken[folded] = path
    for folded, path in taken.items():
        for parent in PurePosixPath(folded).parents:
            if (file := taken.get(str(parent))) is not None:
                return file, path
    return None


def _folded(path: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", path).casefold())


class ModelFile(BaseModel):
    """One file of a version or variant."""

    model_config = ConfigDict(frozen=True)

    path: FilePath
    digest: Digest
    size_bytes: int = Field(ge=0)


def files_digest(files: Iterable[ModelFile]) -> Digest:
    """Returns the identity of a set of files: SHA-256 of its `<hex>  <path>` lines (as sha256sum prints them), sorted
    by path."""
    lines = sorted((f.path, f.digest.removeprefix("sha256:")) for f in files)
    return digest_of("".join(f"{hexa}  {path}\n" for path, hexa in lines).encode())
