"""Streams a build context as a tar whose bytes depend only on the content of its files.

Paths are sorted, and times, owners and modes are fixed instead of taken from the disk. So the engine's build cache
works, and a layer made of the context has the same digest wherever it is built.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath

from slmops.contracts.errors import Denied, DigestMismatch, NotFound

Content = Path | bytes
_CHUNK_BYTES = 1 << 20
_EPOCH = datetime.fromtimestamp(0, UTC)
_NOT_SOURCE = frozenset({"__pycache__"})


def stream(files: Mapping[str, Content], at: datetime = _EPOCH) -> Iterator[bytes]:
    """Yields the tar of `files`, path → content. `at` is the modification time of every entry.

    Raises `Denied` for a file that cannot be read, `DigestMismatch` for one that changes while it is read.
    """
    seconds = int(at.timestamp())
    folders = {str(parent) for path in files for parent in PurePosixPath(path).parents} - {"."}
    for path in sorted(folders | files.keys()):
        if path in folders:
            yield _header(path, seconds, tarfile.DIRTYPE, 0)
        else:
            yield from _file(path, files[path], seconds)
    yield bytes(2 * tarfile.BLOCKSIZE)


def source_files(checkout: Path) -> dict[str, Content]:
    """Returns only those files of a checkout from which deploy/docker/Dockerfile builds a gateway's image.

    Raises `NotFound` if `checkout` is not a checkout.
    """
    single = ("constraints.txt", "deploy/docker/Dockerfile", "deploy/docker/healthy.py")
    found: dict[str, Content] = {path: checkout / path for path in single}
    for distribution in ("shared", "services/gateway"):
        found |= {f"{distribution}/{name}": checkout / distribution / name for name in ("pyproject.toml",)}
        found |= _below(checkout, checkout / distribution / "src")
        if (readme := checkout / distribution / "README.md").exists():
            found[f"{distribution}/README.md"] = readme
    missing = [path for path, source in found.items() if isinstance(source, Path) and not source.is_file()]
    if missing:
        raise NotFound(
            f"there is no {missing[0]} in this folder",
            where=str(checkout),
            fix="Name a checkout of slmops with --source, or an existing gateway image with --gateway.",
        )
    return found


def wheels(folder: Path) -> dict[str, Content]:
    """Returns the wheels in a folder. Raises `NotFound` if there are none."""
    found: dict[str, Content] = {f"build/wheels/{path.name}": path for path in sorted(folder.glob("*.whl"))}
    if not found:
        raise NotFound("there are no wheels in this folder", where=str(folder), fix="See deploy/docker/README.md.")
    return found


def _below(root: Path, folder: Path) -> dict[str, Content]:
    paths: Iterable[Path] = (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_symlink())
    kept = [path.relative_to(root) for path in paths if not _NOT_SOURCE & set(path.parts)]
    return {path.as_posix(): root / path for path in kept}


def _header(path: str, seconds: int, kind: bytes, size: int) -> bytes:
    info = tarfile.TarInfo(path)
    info.type, info.size, info.mtime = kind, size, seconds
    info.mode = 0o755 if kind == tarfile.DIRTYPE else 0o644
    return info.tobuf(tarfile.PAX_FORMAT)


def _file(path: str, content: Content, seconds: int) -> Iterator[bytes]:
    size = len(content) if isinstance(content, bytes) else _size(content)
    yield _header(path, seconds, tarfile.REGTYPE, size)
    sent = 0
    for chunk in [content] if isinstance(content, bytes) else _chunks(content):
        sent += len(chunk)
        yield chunk
    if sent != size:
        raise DigestMismatch(
            f"{path} changed during the build from {size} to {sent} bytes",
            where=str(content),
            fix="Build again, and do not change the file meanwhile.",
        )
    yield bytes(-size % tarfile.BLOCKSIZE)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise Denied(f"cannot read the file: {error.strerror}", where=str(path)) from error


def _chunks(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as source:
            while chunk := source.read(_CHUNK_BYTES):
                yield chunk
    except OSError as error:  # convert it here: the sender would mistake an OSError for a connection error
        raise Denied(f"cannot read the file: {error.strerror}", where=str(path)) from error
