"""The delta file, version 1, little-endian.

    magic     8 bytes: SLMDELTA
    version   u16
    header    u32 length, then a zstd frame of JSON: `Header`
    records   for each target file in the header's order, until its size is filled

A record makes the next bytes of its target file:

    coding u8 · width u8 · shift u8 · streams u8 · file u32 · base offset u64 · base bytes u32 · target bytes u32
    streams × u32, the streams' lengths, then the streams: zstd frames that contain their size

`width` is the bytes of a value, 0 for half a byte; `file` is the number of a base file. The limits below bound the
memory and time of a record before it is read.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import BinaryIO, Final

import zstandard
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from slmops.contracts.descriptor import Digest
from slmops.contracts.errors import InvalidDelta
from slmops.contracts.model import FilePath, collision

MAGIC: Final = b"SLMDELTA"
VERSION: Final = 1
PIECE_BYTES: Final = 2 << 20
"""The largest result of a record, except for plain copies."""
SPARSEST: Final = 4
"""A sparse record may change at most one of `SPARSEST` values; for more changes another coding is smaller."""
DICTIONARY_BYTES: Final = 8 << 20
HEADER_BYTES: Final = 4 << 20
MAX_STREAMS: Final = 8
_PREFIX = struct.Struct("<8sHI")
_RECORD = struct.Struct("<BBBBIQII")


class Coding(IntEnum):
    """How a record's result is computed from the base's bytes and its streams."""

    COPY = 0
    """The base's bytes."""
    FULL = 1
    """No base: values as planes of bytes, one stream each."""
    SPARSE = 2
    """The base's values, some changed: gaps between changes (high part, low bits), then the differences."""
    INTEGERS = 3
    """Differences of integers, as planes of bytes."""
    FLOATS = 4
    """Differences of IEEE floats, read as integers in the order of their values, as planes of bytes."""
    PATCH = 5
    """A zstd frame whose dictionary is the base's bytes: for text and graphs."""


class DeltaFile(BaseModel):
    """A file of the base or the target."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    path: FilePath
    digest: Digest
    size_bytes: int = Field(ge=0)


class Header(BaseModel):
    """The base files to which records refer, and the target files that they produce."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    base: tuple[DeltaFile, ...] = Field(max_length=10_000)
    target: tuple[DeltaFile, ...] = Field(min_length=1, max_length=10_000)

    @field_validator("target")
    @classmethod
    def _distinct(cls, target: tuple[DeltaFile, ...]) -> tuple[DeltaFile, ...]:
        if both := collision(file.path for file in target):
            raise ValueError(f"{both[0]} and {both[1]} cannot be in one folder everywhere")
        return target


@dataclass(frozen=True)
class Record:
    """A record, see the module's docstring. `base_bytes` is 0 if the record uses no base."""

    coding: Coding
    target_bytes: int
    width: int = 1
    shift: int = 0
    file: int = 0
    base_offset: int = 0
    base_bytes: int = 0
    streams: tuple[bytes, ...] = ()

    @property
    def size_bytes(self) -> int:
        return _RECORD.size + sum(4 + len(stream) for stream in self.streams)


def write_header(out: BinaryIO, header: Header) -> None:
    data = zstandard.ZstdCompressor(level=19).compress(header.model_dump_json().encode())
    out.write(_PREFIX.pack(MAGIC, VERSION, len(data)) + data)


def read_header(source: BinaryIO) -> Header:
    """Raises `InvalidDelta`."""
    prefix = source.read(_PREFIX.size)
    if len(prefix) < _PREFIX.size or not prefix.startswith(MAGIC):
        raise InvalidDelta("the file is not a delta", fix="Create one: slmops delta make BASE TARGET.")
    _, version, length = _PREFIX.unpack(prefix)
    if version != VERSION:
        raise InvalidDelta(f"the delta has version {version}; this release reads {VERSION}", fix="Upgrade slmops.")
    if length > HEADER_BYTES:
        raise InvalidDelta(f"the delta's header claims {length:,} bytes")
    data = inflate(exactly(source, length), limit=HEADER_BYTES)
    try:
        return Header.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise InvalidDelta(f"the delta's header is damaged: {first['loc']}: {first['msg']}") from error


def write_record(out: BinaryIO, record: Record) -> None:
    fixed = (record.coding, record.width, record.shift, len(record.streams))
    out.write(_RECORD.pack(*fixed, record.file, record.base_offset, record.base_bytes, record.target_bytes))
    out.write(struct.pack(f"<{len(record.streams)}I", *map(len, record.streams)))
    for stream in record.streams:
        out.write(stream)


def read_record(source: BinaryIO, header: Header, left_bytes: int) -> Record:
    """Reads the next record of a target file of which `left_bytes` remain. Raises `InvalidDelta`."""
    kind, width, shift, count, file, offset, base_bytes, target_bytes = _RECORD.unpack(exactly(source, _RECORD.size))
    try:
        coding = Coding(kind)
    except ValueError:
        raise InvalidDelta(f"a record has the unknown coding {kind}") from None
    record = Record(coding, target_bytes, width, shift, file, offset, base_bytes)
    _check(record, count, header, left_bytes)
    lengths = struct.unpack(f"<{count}I", exactly(source, 4 * count))
    if sum(lengths) > 2 * PIECE_BYTES:
        raise InvalidDelta(f"a record claims {sum(lengths):,} bytes for {target_bytes:,}")
    streams = tuple(exactly(source, length) for length in lengths)
    return Record(coding, target_bytes, width, shift, file, offset, base_bytes, streams)


def records(source: BinaryIO, header: Header) -> Iterator[tuple[DeltaFile, Record]]:
    """Yields all records in order. Raises `InvalidDelta`, also for bytes after the last record."""
    for target in header.target:
        left = target.size_bytes
        while left:
            record = read_record(source, header, left)
            left -= record.target_bytes
            yield target, record
    if source.read(1):
        raise InvalidDelta("the delta has bytes after its last record")


def inflate(frame: bytes, *, limit: int, dictionary: bytes = b"") -> bytes:
    """Decompresses a zstd frame that contains its size, up to `limit` bytes. Raises `InvalidDelta`."""
    try:
        size = zstandard.get_frame_parameters(frame).content_size
        if size > limit:  # a frame without its size has the largest integer here
            raise InvalidDelta(f"a stream decompresses to more than the {limit:,} allowed bytes")
        known = zstandard.ZstdCompressionDict(dictionary, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
        found: bytes = zstandard.ZstdDecompressor(dict_data=known if dictionary else None).decompress(
            frame, allow_extra_data=False
        )
    except zstandard.ZstdError as error:
        raise InvalidDelta(f"a stream is damaged: {error}") from error
    return found


def exactly(source: BinaryIO, length: int) -> bytes:
    data = source.read(length)
    if len(data) < length:
        raise InvalidDelta("the delta is cut off", fix="Fetch it again.")
    return data


def _check(record: Record, streams: int, header: Header, left_bytes: int) -> None:
    problem = None
    if not 0 < record.target_bytes <= left_bytes:
        problem = f"a record produces {record.target_bytes:,} bytes where {left_bytes:,} are left"
    elif record.coding is not Coding.COPY and record.target_bytes > PIECE_BYTES:
        problem = f"a record produces {record.target_bytes:,} bytes, more than {PIECE_BYTES:,}"
    elif streams != _streams(record):
        problem = f"a record has {streams} streams, not {_streams(record)}"
    elif record.width not in _WIDTHS[record.coding] or record.target_bytes % max(record.width, 1):
        problem = f"a record has values of {record.width} bytes"
    elif record.shift > 16:
        problem = f"a record shifts by {record.shift}"
    elif record.coding is Coding.FULL:
        problem = "a record names a base that its coding does not use" if record.base_bytes else None
    else:
        problem = _base_problem(record, header)
    if problem:
        raise InvalidDelta(problem)


def _base_problem(record: Record, header: Header) -> str | None:
    if record.file >= len(header.base):
        return f"a record names base file {record.file} of {len(header.base)}"
    size = header.base[record.file].size_bytes
    if record.base_offset + record.base_bytes > size:
        return f"a record reads to byte {record.base_offset + record.base_bytes:,} of a base file of {size:,}"
    if record.coding is Coding.PATCH:
        return None if record.base_bytes <= DICTIONARY_BYTES else "a record reads too much of its base"
    return None if record.base_bytes == record.target_bytes else "a record produces more or fewer bytes than it reads"


def _streams(record: Record) -> int:
    fixed = {Coding.COPY: 0, Coding.SPARSE: 3, Coding.PATCH: 1}
    return fixed.get(record.coding, record.width)


_WIDTHS = {
    Coding.COPY: (1,),
    Coding.FULL: (1, 2, 4, 8),
    Coding.SPARSE: (0, 1, 2, 4),
    Coding.INTEGERS: (1, 2, 4, 8),
    Coding.FLOATS: (2, 4, 8),
    Coding.PATCH: (1,),
}
