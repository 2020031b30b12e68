"""Reads and writes bundle files: uncompressed tars with exactly one encoding for each content, which can hide nothing.

Each header is compared with the one that we would write. So links, devices, extended headers, owners and paths need no
checks, any tar program can still unpack a bundle, and the index alone determines where each member lies.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Final

from slmops.contracts.bundle import INDEX_LIMIT_BYTES, INDEX_NAME, BundleIndex, Member
from slmops.contracts.errors import InvalidBundle
from slmops.kit.atomic_write import atomic_write

_BLOCK: Final = 512
_END: Final = bytes(2 * _BLOCK)
_CHUNK_BYTES: Final = 1 << 18


def write_bundle(out: Path, index: BundleIndex, content: Mapping[str, bytes | Path]) -> None:
    """Writes a bundle atomically. `content` maps member names to bytes or files.

    Raises `InvalidBundle` if content does not match the index.
    """
    with atomic_write(out) as file:
        data = index.model_dump_json().encode()
        _put(file, INDEX_NAME, len(data), iter([data]))
        for member in index.members:
            _put(file, member.name, member.size, _checked(member, _chunks_of(content[member.name])))
        file.write(_END)


class BundleFile:
    """An open bundle. Opening checks the headers in one pass; content is checked when it is read."""

    def __init__(self, path: Path) -> None:
        """Raises `InvalidBundle`, and `OSError` for a file that cannot be read."""
        self.path = path
        self._offsets: dict[str, tuple[int, Member]] = {}
        with path.open("rb") as file:
            self.index = _index(file)
            self._locate(file)

    def __contains__(self, name: str) -> bool:
        return name in self._offsets

    def read(self, name: str, limit_bytes: int) -> bytes:
        """Returns a member. Raises `InvalidBundle` if it is missing, longer than `limit_bytes`, or not as indexed."""
        with self.chunks(name) as (member, chunks):
            if member.size > limit_bytes:
                raise InvalidBundle(f"a file of {member.size} bytes where {limit_bytes} are allowed", where=name)
            return b"".join(chunks)

    @contextmanager
    def chunks(self, name: str) -> Iterator[tuple[Member, Iterator[bytes]]]:
        """Yields a member and its content in chunks. After the last chunk raises `InvalidBundle` if the content does
        not match the index."""
        if name not in self._offsets:
            raise InvalidBundle("the bundle has no such file", where=name)
        offset, member = self._offsets[name]
        with self.path.open("rb") as file:
            file.seek(offset)
            yield member, _checked(member, _exactly(file, member.size))

    def check(self) -> None:
        """Reads everything. Raises `InvalidBundle` for the first member that does not match the index."""
        for name in self._offsets:
            with self.chunks(name) as (_, chunks):
                for _chunk in chunks:
                    pass

    def _locate(self, file: BinaryIO) -> None:
        length = os.fstat(file.fileno()).st_size
        for member in self.index.members:
            if file.read(_BLOCK) != _header(member.name, member.size):
                raise InvalidBundle("the tar and its index disagree", where=member.name)
            self._offsets[member.name] = file.tell(), member
            if file.tell() + _padded(member.size) > length:
                raise InvalidBundle("the bundle is cut off", where=member.name, fix="Copy the whole file again.")
            file.seek(member.size, os.SEEK_CUR)
            if file.read(_padded(member.size) - member.size).strip(b"\0"):
                raise InvalidBundle("the bundle has unexpected bytes between two members", where=member.name)
        if file.read(len(_END) + 1) != _END:
            raise InvalidBundle("the bundle does not end where its index says", where=INDEX_NAME)


def _index(file: BinaryIO) -> BundleIndex:
    header = file.read(_BLOCK)
    try:
        size = int(header[124:135], 8)  # eleven octal digits
    except ValueError:
        size = -1
    if not 0 <= size <= INDEX_LIMIT_BYTES or header != _header(INDEX_NAME, size):
        raise InvalidBundle("the file is not a bundle", where=INDEX_NAME, fix="Create one: slmops bundle export.")
    data = file.read(_padded(size))
    if len(data) < _padded(size):
        raise InvalidBundle("the bundle is cut off", where=INDEX_NAME, fix="Copy the whole file again.")
    if data[size:].strip(b"\0"):
        raise InvalidBundle("the bundle has unexpected bytes between two members", where=INDEX_NAME)
    return BundleIndex.decode(data[:size])


def _header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT, "ascii", "strict")  # the only GNU extension used: sizes over 8 GiB


def _put(file: BinaryIO, name: str, size: int, chunks: Iterator[bytes]) -> None:
    file.write(_header(name, size))
    for chunk in chunks:
        file.write(chunk)
    file.write(bytes(_padded(size) - size))


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _chunks_of(content: bytes | Path) -> Iterator[bytes]:
    if isinstance(content, bytes):
        yield content
        return
    with content.open("rb") as file:
        yield from iter(lambda: file.read(_CHUNK_BYTES), b"")


def _exactly(file: BinaryIO, size: int) -> Iterator[bytes]:
    while size:
        chunk = file.read(min(size, _CHUNK_BYTES))
        if not chunk:
            return  # `_checked` detects a short file by its digest
        size -= len(chunk)
        yield chunk


def _checked(member: Member, chunks: Iterator[bytes]) -> Iterator[bytes]:
    found, size = hashlib.sha256(), 0
    for chunk in chunks:
        found.update(chunk)
        size += len(chunk)
        yield chunk
    if (f"sha256:{found.hexdigest()}", size) != (member.digest, member.size):
        raise InvalidBundle("the file does not match its digest in the index", where=member.name)
