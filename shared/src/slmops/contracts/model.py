"""What a model version or a variant is made of: named files, each a blob."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from slmops.contracts.descriptor import Digest, digest_of


def _relative(value: str) -> str:
    path = PurePosixPath(value)
    if path.is_absolute() or not path.parts or ".." in path.parts or "\\" in value or "\0" in value:
        raise ValueError("a file path is relative, inside its folder, with '/' between its parts")
    return str(path)


FilePath = Annotated[str, AfterValidator(_relative)]
"""A relative POSIX path that cannot climb out of its folder."""


class ModelFile(BaseModel):
    """One file of a version or variant."""

    model_config = ConfigDict(frozen=True)

    path: FilePath
    digest: Digest
    size_bytes: int = Field(ge=0)


def files_digest(files: Iterable[ModelFile]) -> Digest:
    """The identity of a set of files: SHA-256 of its `<hex>  <path>` lines, sorted by path (as sha256sum prints)."""
    lines = sorted((f.path, f.digest.removeprefix("sha256:")) for f in files)
    return digest_of("".join(f"{hexa}  {path}\n" for path, hexa in lines).encode())
