"""Encodes and decodes one piece of a file from the base's bytes and compressed streams. Pure.

Changed 4-bit codes of a fine-tuned model are rare (about 1 in 200) and independent of one another, so the gaps between
them are geometrically distributed. They are Rice-coded (Rice & Plaunt 1971): the low bits are stored verbatim and
zstd's Huffman coder compresses the high part, which comes within a tenth of the entropy. Scales change everywhere, but
little. They are stored as differences of order-preserving integers, split into byte planes, of which the high ones are
nearly all zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from slmops.contracts.errors import InvalidDelta
from slmops.kit.delta.format import SPARSEST, Coding, Record, inflate

Bytes = npt.NDArray[np.uint8]
Compress = Callable[[bytes], bytes]
_ESCAPE = 255  # in a gap's high part: add 255 and continue with the next byte
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_SIGNED: dict[int, type[np.signedinteger[Any]]] = {2: np.int16, 4: np.int32, 8: np.int64}


def full(target: Bytes, width: int, compress: Compress) -> Record:
    return Record(Coding.FULL, target.size, width, streams=_planes(target, width, compress))


def difference(base: Bytes, target: Bytes, width: int, is_float: bool, compress: Compress) -> Record:
    """Encodes the difference of every value, for pieces in which most values change."""
    coding = Coding.FLOATS if is_float else Coding.INTEGERS
    before, after = (_numbers(data, width, is_float) for data in (base, target))
    changed = after - before
    streams = _planes(_folded(changed, width).view(np.uint8), width, compress)
    return Record(coding, target.size, width, base_bytes=base.size, streams=streams)


def sparse(base: Bytes, target: Bytes, width: int, compress: Compress) -> Record | None:
    """Encodes only the changed values; returns None if they are not few. `width` 0: values of half a byte."""
    before, after = (_values(data, width) for data in (base, target))
    places = np.flatnonzero(before != after)
    if not 0 < places.size <= before.size // SPARSEST:
        return None
    gaps = np.diff(places, prepend=-1) - 1
    shift = _shift(before.size / places.size)
    high, low = gaps >> shift, gaps & ((1 << shift) - 1)
    changed = after[places] - before[places]
    if not width:
        changed &= np.uint8(15)
    streams = (_escaped(high).tobytes(), _bits(low, shift).tobytes(), changed.tobytes())
    return Record(Coding.SPARSE, target.size, width, shift, base_bytes=base.size, streams=tuple(map(compress, streams)))


def decode(record: Record, base: Bytes) -> Bytes:
    """Returns the target's bytes. `base` holds the bytes that the record reads; it may be modified. Raises
    `InvalidDelta`."""
    if record.coding is Coding.COPY:
        return base
    if record.coding is Coding.PATCH:
        found = inflate(record.streams[0], limit=record.target_bytes, dictionary=base.tobytes())
        return np.frombuffer(_sized(found, record.target_bytes), np.uint8)
    if record.coding is Coding.SPARSE:
        return _changed(record, base)
    numbers = _joined(record)
    if record.coding is not Coding.FULL:
        is_float = record.coding is Coding.FLOATS
        numbers = _unfolded(numbers, record.width) + _numbers(base, record.width, is_float)
        numbers = _ordered(numbers, record.width) if is_float else numbers
    return numbers.view(np.uint8)


def _changed(record: Record, base: Bytes) -> Bytes:
    places, changed = _places(record, base.size), _differences(record)
    if places.size != changed.size:
        raise InvalidDelta(f"a record names {places.size:,} places and {changed.size:,} changes")
    if record.width:
        base.view(_UNSIGNED[record.width])[places] += changed
        return base
    for half, (mask, up) in enumerate(((0x0F, 0), (0xF0, 4))):  # two changes may share a byte, but not a half byte
        mine = (places & 1) == half
        at = places[mine] >> 1
        value = (((base[at] & mask) >> up) + changed[mine]) & 0x0F
        base[at] = (base[at] & (0xFF ^ mask)) | (value << up)
    return base


def _places(record: Record, base_bytes: int) -> npt.NDArray[np.int64]:
    units = base_bytes * 2 if record.width == 0 else base_bytes // record.width
    most = units // SPARSEST
    high = np.frombuffer(inflate(record.streams[0], limit=most + units // _ESCAPE + 1), np.uint8)
    ends = np.flatnonzero(high != _ESCAPE)
    if not 0 < ends.size <= most:
        raise InvalidDelta(f"a record changes {ends.size:,} of {units:,} values")
    reached = np.cumsum(high, dtype=np.int64)[ends]
    gaps = np.diff(reached, prepend=0) << record.shift
    gaps |= _unpacked(inflate(record.streams[1], limit=ends.size * 16 // 8 + 1), ends.size, record.shift)
    places: npt.NDArray[np.int64] = np.cumsum(gaps + 1) - 1
    if places[-1] >= units:
        raise InvalidDelta(f"a record changes value {places[-1]:,} of {units:,}")
    return places


def _differences(record: Record) -> npt.NDArray[np.unsignedinteger]:
    size = max(record.width, 1)
    data = inflate(record.streams[2], limit=record.target_bytes)
    if len(data) % size:
        raise InvalidDelta("a record ends inside a value")
    return np.frombuffer(data, _UNSIGNED[size])


def _values(data: Bytes, width: int) -> npt.NDArray[np.unsignedinteger]:
    """Returns the single values. Of two half bytes the low one comes first."""
    if width:
        return data.view(_UNSIGNED[width])
    return np.stack([data & 0x0F, data >> 4], axis=1).reshape(-1)


def _shift(mean: float) -> int:
    """Returns the number of low bits of a gap that leaves a few dozen symbols for most high parts."""
    return max(0, math.floor(math.log2(mean)) - 5)


def _escaped(high: npt.NDArray[np.int64]) -> Bytes:
    escapes = high // _ESCAPE
    ends = np.cumsum(escapes + 1) - 1
    found = np.full(int(ends[-1]) + 1, _ESCAPE, np.uint8)
    found[ends] = high % _ESCAPE
    return found


def _bits(values: npt.NDArray[np.int64], count: int) -> Bytes:
    return np.packbits((values[:, None] >> np.arange(count)) & 1, axis=None) if count else np.zeros(0, np.uint8)


def _unpacked(data: bytes, count: int, bits: int) -> npt.NDArray[np.int64]:
    if not bits:
        return np.zeros(count, np.int64)
    if len(data) != -(-count * bits // 8):
        raise InvalidDelta("a record lacks the low bits of its gaps")
    found = np.zeros(count, np.int64)
    single = np.unpackbits(np.frombuffer(data, np.uint8), count=count * bits).reshape(count, bits)
    for bit in range(bits):
        found |= single[:, bit].astype(np.int64) << bit
    return found


def _planes(data: Bytes, width: int, compress: Compress) -> tuple[bytes, ...]:
    return tuple(compress(np.ascontiguousarray(plane).tobytes()) for plane in data.reshape(-1, width).T)


def _joined(record: Record) -> npt.NDArray[np.unsignedinteger]:
    count = record.target_bytes // record.width
    if record.width == 1:
        return np.frombuffer(_sized(inflate(record.streams[0], limit=count), count), np.uint8)
    found = np.empty((count, record.width), np.uint8)
    for number, stream in enumerate(record.streams):
        found[:, number] = np.frombuffer(_sized(inflate(stream, limit=count), count), np.uint8)
    return found.reshape(-1).view(_UNSIGNED[record.width])


def _sized(data: bytes, size: int) -> bytes:
    if len(data) != size:
        raise InvalidDelta(f"a stream has {len(data):,} bytes, not {size:,}")
    return data


def _numbers(data: Bytes, width: int, is_float: bool) -> npt.NDArray[np.unsignedinteger]:
    numbers = data.view(_UNSIGNED[width])
    return _ordered(numbers, width) if is_float else numbers


def _ordered(numbers: npt.NDArray[np.unsignedinteger], width: int) -> npt.NDArray[np.unsignedinteger]:
    """Maps the bits of floats to integers in the floats' order by inverting negative ones. It is its own inverse."""
    signed = numbers.view(_SIGNED[width])
    turned: npt.NDArray[Any] = signed ^ ((signed >> (width * 8 - 1)) & np.iinfo(signed.dtype).max)
    return turned.view(_UNSIGNED[width])


def _folded(changed: npt.NDArray[np.unsignedinteger], width: int) -> npt.NDArray[np.unsignedinteger]:
    """Maps small differences of either sign to small numbers (zigzag). Single bytes stay unchanged."""
    if width == 1:
        return changed
    signed = changed.view(_SIGNED[width])
    folded: npt.NDArray[Any] = (signed << 1) ^ (signed >> (width * 8 - 1))
    return folded.view(_UNSIGNED[width])


def _unfolded(numbers: npt.NDArray[np.unsignedinteger], width: int) -> npt.NDArray[np.unsignedinteger]:
    if width == 1:
        return numbers
    one = numbers.dtype.type(1)
    unfolded: npt.NDArray[Any] = (numbers >> one) ^ (~(numbers & one) + one)
    return unfolded
