"""Applies a delta record by record in bounded memory. A file gets its final name only if it has the target's digest."""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from slmops.contracts.descriptor import Digest, digest_of_chunks
from slmops.contracts.errors import DigestMismatch, DiskFull, InvalidDelta, NotFound
from slmops.kit.atomic_write import atomic_write
from slmops.kit.delta.coding import Bytes, decode
from slmops.kit.delta.format import (
    DICTIONARY_BYTES,
    Coding,
    DeltaFile,
    Header,
    Record,
    read_header,
    read_record,
)

_CHUNK_BYTES = 1 << 20

Place = Callable[[DeltaFile], Path | None]
"""Returns the path of a target file, or None to skip the file."""
Progress = Callable[[int, int], None]


def apply(
    delta: Path,
    bases: Mapping[Digest, Path],
    place: Place,
    progress: Progress = lambda done, total: None,
    *,
    limit_bytes: int,
    durable: bool = True,
) -> list[Path]:
    """Writes and verifies the wanted target files, each atomically, and returns their paths.

    A file that exists is kept if it has the target's digest, and replaced otherwise. A file of the base stays.

    `bases` has the base files by digest. A delta of kilobytes may declare a target of gigabytes, so the caller limits
    the bytes of the wanted files: `limit_bytes` is checked before the first one is written. `durable` flushes a file to
    the disk before it gets its name. Raises `InvalidDelta`, `DigestMismatch` if the base or the result does not match
    the delta, `NotFound` for a missing base, `DiskFull`.
    """
    try:
        with delta.open("rb") as source, ExitStack() as stack:
            header = read_header(source)
            opened = _Bases(header, bases, stack)
            places = [(file, place(file)) for file in header.target]
            _check_places(places, bases)
            _check_limit(sum({where: file.size_bytes for file, where in places if where}.values()), limit_bytes)
            total, done, made = sum(file.size_bytes for file in header.target), 0, []
            for file, where in places:
                _file(source, header, opened, file, where, durable)
                done += file.size_bytes
                progress(done, total)
                made += [where] if where else []
            if source.read(1):
                raise InvalidDelta("the delta has bytes after its last record")
            return made
    except InvalidDelta as error:
        raise InvalidDelta(error.what, where=str(delta), fix=error.fix) from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DiskFull("no space for the delta's result", where=str(delta), fix="Free disk space.") from error


def _check_limit(declared_bytes: int, limit_bytes: int) -> None:
    if declared_bytes > limit_bytes:
        raise InvalidDelta(
            f"the delta makes {declared_bytes:,} bytes, more than the allowed {limit_bytes:,}",
            fix="Check where the delta comes from. To allow more: slmops delta apply --max-bytes.",
        )


def _check_places(places: list[tuple[DeltaFile, Path | None]], bases: Mapping[Digest, Path]) -> None:
    """Raises `InvalidDelta` if a target would replace a folder, or a file of the base, which later files may need."""
    originals = {path.resolve() for path in bases.values()}
    for file, place in places:
        if place and (place.is_dir() or (place.resolve() in originals and not _holds(place, file))):
            raise InvalidDelta(
                f"{place} belongs to the base or is a folder", fix="Choose another folder for the target."
            )


class _Bases:
    """The base files. Each is opened when a record first reads it."""

    def __init__(self, header: Header, paths: Mapping[Digest, Path], stack: ExitStack) -> None:
        self._header, self._paths, self._stack = header, paths, stack
        self._files: dict[int, BinaryIO] = {}
        self._buffer = np.empty(DICTIONARY_BYTES, np.uint8)

    def read(self, number: int, offset: int, size: int) -> Bytes:
        """Returns bytes of a base file in a buffer that the next call overwrites."""
        if not size:
            return self._buffer[:0]
        file = self._files.get(number) or self._open(number)
        file.seek(offset)
        found = self._buffer[:size]
        if file.readinto(found) < size:  # type: ignore[attr-defined]
            raise DigestMismatch(f"the base {self._header.base[number].path} shrank while it was read")
        return found

    def check(self) -> None:
        """Raises `DigestMismatch` for the first used base file that is not the one from which the delta was made."""
        for number in self._files:
            wanted = self._header.base[number]
            with self._paths[wanted.digest].open("rb") as source:
                actual, _ = digest_of_chunks(iter(lambda source=source: source.read(_CHUNK_BYTES), b""))  # type: ignore[misc]
            if actual != wanted.digest:
                raise DigestMismatch(
                    f"the base {wanted.path} is {actual}, not {wanted.digest}",
                    where=str(self._paths[wanted.digest]),
                    fix="Apply the delta to its original base, or fetch the whole target.",
                )

    def _open(self, number: int) -> BinaryIO:
        wanted = self._header.base[number]
        path = self._paths.get(wanted.digest)
        if path is None or not path.is_file():
            raise NotFound(f"the base {wanted.path} is missing", where=wanted.digest, fix="Fetch the whole target.")
        if (size := path.stat().st_size) != wanted.size_bytes:
            raise DigestMismatch(f"the base {wanted.path} has {size} bytes, not {wanted.size_bytes}", where=str(path))
        self._files[number] = self._stack.enter_context(path.open("rb", buffering=0))
        return self._files[number]


def _file(source: BinaryIO, header: Header, bases: _Bases, file: DeltaFile, where: Path | None, durable: bool) -> None:
    if where is None or _holds(where, file):
        left = file.size_bytes
        while left:
            left -= read_record(source, header, left).target_bytes
        return
    where.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(where, durable=durable) as out:
        actual = _fill(source, header, bases, file.size_bytes, out)
        if actual != file.digest:
            bases.check()
            raise DigestMismatch(f"the delta gives {file.path} the digest {actual}, not {file.digest}", where=file.path)


def _holds(path: Path, file: DeltaFile) -> bool:
    """Returns whether the file exists with this content."""
    if not path.is_file() or path.stat().st_size != file.size_bytes:
        return False
    with path.open("rb") as source:
        return digest_of_chunks(iter(lambda: source.read(_CHUNK_BYTES), b"")) == (file.digest, file.size_bytes)


def _fill(source: BinaryIO, header: Header, bases: _Bases, size: int, out: BinaryIO) -> Digest:
    state, left = hashlib.sha256(), size
    while left:
        record = read_record(source, header, left)
        left -= record.target_bytes
        for piece in _pieces(record):
            made = memoryview(decode(piece, bases.read(piece.file, piece.base_offset, piece.base_bytes)))  # type: ignore[arg-type]
            state.update(made)
            out.write(made)
    return "sha256:" + state.hexdigest()


def _pieces(record: Record) -> list[Record]:
    """Splits a long copy into steps; returns other records unchanged."""
    if record.coding is not Coding.COPY:
        return [record]
    return [
        replace(record, base_offset=record.base_offset + start, base_bytes=size, target_bytes=size)
        for start in range(0, record.target_bytes, _CHUNK_BYTES)
        for size in (min(_CHUNK_BYTES, record.target_bytes - start),)
    ]
