"""Makes a delta: encodes the target's parts in order, each with the smallest of the applicable codings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import zstandard

from slmops.contracts.descriptor import Digest, digest_of_chunks
from slmops.kit.atomic_write import atomic_write
from slmops.kit.delta import coding
from slmops.kit.delta.coding import Bytes
from slmops.kit.delta.format import (
    DICTIONARY_BYTES,
    PIECE_BYTES,
    Coding,
    DeltaFile,
    Header,
    Record,
    write_header,
    write_record,
)
from slmops.kit.delta.match import Matcher, Origin
from slmops.kit.delta.stat import Stat
from slmops.kit.delta.tensors import Part, parts
from slmops.kit.modelfile.listing import files_below

_LEVEL, _ALONE_LEVEL, _TEXT_LEVEL = 9, 12, 19
"""zstd levels: for differences from a base, which have no repetitions; for tensors without a base; for other data
without a base. Codes of tensors have no repetitions, only unequal frequencies: level 19 gives the same size as 12 in
fifty times the time."""
_CHUNK_BYTES = 1 << 20
_COPY_BYTES = 1 << 31

Progress = Callable[[int, int], None]
"""Called with the processed and the total bytes of the target."""


def make(base: Path, target: Path, out: Path, progress: Progress = lambda done, total: None) -> Stat:
    """Writes the delta from `base` to `target` (files or folders) to `out` atomically.

    There is a delta for all files; in the worst case it is a compressed copy. Raises `OSError`.
    """
    maker = _Maker(base, target)
    with atomic_write(out) as file:
        return maker.write(file, progress)


def files_of(path: Path) -> tuple[Path, list[str]]:
    """Returns a folder and the sorted relative paths of its files. For a file: its folder and only its name.

    Raises `InvalidModel` for a file that cannot be part of a model, such as a link to a file that does not exist.
    """
    if path.is_dir():
        return path, files_below(path)
    return path.parent, [path.name]


def by_digest(path: Path) -> dict[Digest, Path]:
    """Returns a model's files by digest, the form in which `apply` takes a base."""
    folder, paths = files_of(path)
    return {_described(folder, name).digest: folder / name for name in paths}


class _Maker:
    def __init__(self, base: Path, target: Path) -> None:
        (base_folder, base_paths), (target_folder, target_paths) = files_of(base), files_of(target)
        base_files = tuple(_described(base_folder, path) for path in base_paths)
        self._header = Header(base=base_files, target=tuple(_described(target_folder, path) for path in target_paths))
        self._numbers = {file.path: number for number, file in enumerate(base_files)}
        self._by_digest = {file.digest: number for number, file in enumerate(base_files)}
        self._base = {path: _mapped(base_folder / path) for path in base_paths}
        self._target = {path: _mapped(target_folder / path) for path in target_paths}
        self._alike = _alike(base_paths, target_paths)
        self._matcher = Matcher(parts(base_folder, base_paths), self._base)
        self._parts = parts(target_folder, target_paths)
        self._near = zstandard.ZstdCompressor(level=_LEVEL).compress
        self._alone = zstandard.ZstdCompressor(level=_ALONE_LEVEL).compress
        self._text = zstandard.ZstdCompressor(level=_TEXT_LEVEL).compress

    def write(self, out: BinaryIO, progress: Progress) -> Stat:
        write_header(out, self._header)
        stat = Stat.of(self._header, out.tell())
        done, total = 0, sum(file.size_bytes for file in self._header.target)
        for file in self._header.target:
            for record in _merged(self._file(file)):
                write_record(out, record)
                stat.add(record)
                done += record.target_bytes
                progress(done, total)
        return stat

    def _file(self, file: DeltaFile) -> Iterator[Record]:
        if (same := self._by_digest.get(file.digest)) is not None:
            for start in range(0, file.size_bytes, _COPY_BYTES):
                size = min(_COPY_BYTES, file.size_bytes - start)
                yield Record(Coding.COPY, size, file=same, base_offset=start, base_bytes=size)
            return
        for part in self._parts:
            if part.path == file.path:
                yield from self._tensor(part) if part.name else self._rest(part)

    def _tensor(self, part: Part) -> Iterator[Record]:
        data = self._target[part.path][part.offset : part.end]
        origin = self._matcher.origin(part, data) or Origin("", 0, 0)
        yield from self._without(data[: origin.start], part)
        yield from self._from(origin, data[origin.start : origin.end], part)
        yield from self._without(data[origin.end :], part)

    def _from(self, origin: Origin, data: Bytes, part: Part) -> Iterator[Record]:
        for start in range(0, data.size, PIECE_BYTES):
            target, offset = data[start : start + PIECE_BYTES], origin.offset + start
            found = self._smallest(self._base[origin.path][offset : offset + target.size], target, part)
            yield replace(found, file=self._numbers[origin.path], base_offset=offset) if found.base_bytes else found

    def _without(self, data: Bytes, part: Part) -> Iterator[Record]:
        for start in range(0, data.size, PIECE_BYTES):
            target = data[start : start + PIECE_BYTES]
            yield coding.full(target, _width(part, target), self._alone)

    def _smallest(self, base: Bytes, target: Bytes, part: Part) -> Record:
        changed = np.count_nonzero(base != target)
        if not changed:
            return Record(Coding.COPY, target.size, base_bytes=base.size)
        width = _width(part, target)
        few = [coding.sparse(base, target, w, self._near) for w in ((0, 1) if width == 1 else (min(width, 4),))]
        found = [record for record in few if record]
        if not found or changed * 50 > target.size:
            found.append(coding.difference(base, target, width, part.is_float and width > 1, self._near))
        if not few[-1]:
            found.append(coding.full(target, width, self._near))
        return min(found, key=lambda record: record.size_bytes)

    def _rest(self, part: Part) -> Iterator[Record]:
        """Encodes graphs, headers, padding and text against the similar file of the base at about the same offset."""
        data = self._target[part.path][part.offset : part.end]
        path = self._alike.get(part.path)
        for start in range(0, data.size, PIECE_BYTES):
            yield self._stretch(data[start : start + PIECE_BYTES], path, part.offset + start)

    def _stretch(self, target: Bytes, path: str | None, offset: int) -> Record:
        size = target.size
        if path is not None and np.array_equal(target, self._base[path][offset : offset + size]):
            return Record(Coding.COPY, size, file=self._numbers[path], base_offset=offset, base_bytes=size)
        full = Record(Coding.FULL, size, streams=(self._text(target.tobytes()),))
        if path is None or not self._base[path].size:
            return full
        patch = self._patch(target.tobytes(), self._dictionary(path, offset), self._numbers[path])
        return min(full, patch, key=lambda record: record.size_bytes)

    def _dictionary(self, path: str, near: int) -> tuple[int, Bytes]:
        """Returns an offset and the base file's bytes around `near`, as many as a record may read."""
        base = self._base[path]
        start = max(0, min(near - DICTIONARY_BYTES // 2, base.size - DICTIONARY_BYTES))
        return start, base[start : start + DICTIONARY_BYTES]

    def _patch(self, target: bytes, known: tuple[int, Bytes], file: int) -> Record:
        start, base = known
        dictionary = zstandard.ZstdCompressionDict(base.tobytes(), dict_type=zstandard.DICT_TYPE_RAWCONTENT)
        settings = zstandard.ZstdCompressionParameters.from_level(
            _TEXT_LEVEL if base.size < PIECE_BYTES else _LEVEL, window_log=24, enable_ldm=True
        )
        stream = zstandard.ZstdCompressor(dict_data=dictionary, compression_params=settings).compress(target)
        return Record(
            Coding.PATCH, len(target), file=file, base_offset=start, base_bytes=int(base.size), streams=(stream,)
        )


def _width(part: Part, piece: Bytes) -> int:
    return part.width if piece.size % part.width == 0 else 1


def _merged(records: Iterator[Record]) -> Iterator[Record]:
    """Merges copies of adjacent bytes."""
    waiting: Record | None = None
    for record in records:
        if waiting and _continues(waiting, record):
            size = waiting.target_bytes + record.target_bytes
            waiting = replace(waiting, target_bytes=size, base_bytes=size)
            continue
        if waiting:
            yield waiting
        waiting = record
    if waiting:
        yield waiting


def _continues(first: Record, second: Record) -> bool:
    return (
        first.coding is second.coding is Coding.COPY
        and first.file == second.file
        and first.base_offset + first.base_bytes == second.base_offset
        and first.target_bytes + second.target_bytes <= _COPY_BYTES
    )


def _alike(base: list[str], target: list[str]) -> Mapping[str, str]:
    """Returns the base file for each target file: the one with the same path, or the only one with its suffix."""
    found = {}
    for path in target:
        suffix = Path(path).suffix
        same_kind = [other for other in base if Path(other).suffix == suffix]
        if path in base:
            found[path] = path
        elif len(same_kind) == 1:
            found[path] = same_kind[0]
    return found


def _described(folder: Path, path: str) -> DeltaFile:
    with (folder / path).open("rb") as source:
        digest, size = digest_of_chunks(iter(lambda: source.read(_CHUNK_BYTES), b""))
    return DeltaFile(path=path, digest=digest, size_bytes=size)


def _mapped(path: Path) -> Bytes:
    return np.memmap(path, np.uint8, "r") if path.stat().st_size else np.zeros(0, np.uint8)
