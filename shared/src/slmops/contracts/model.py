"""The files of a model version or a variant. Each file is a blob with a path."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from slmops.contracts.descriptor import Digest, digest_of


def _relative(value: str) -> str:
    path = PurePosixPath(value)
    if path.is_absolute() or not path.parts or ".." in path.parts or "\\" in value or "\0" in value:
        raise ValueError("a file path must be relative, inside its folder, with '/' between its parts")
    return str(path)


FilePath = Annotated[str, AfterValidator(_relative)]
"""A relative POSIX path that cannot leave its folder."""


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
