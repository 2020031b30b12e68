"""Reads Protocol Buffers' wire format (https://protobuf.dev/programming-guides/encoding/), as far as ONNX uses it."""

from __future__ import annotations

from collections.abc import Iterator

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Yields field number and value: an integer, or the bytes of a string or inner message, which are not copied.

    Raises `EOFError` if the message is cut off, `ValueError` if it is not in this format.
    """
    position = 0
    while position < len(message):
        key, position = _varint(message, position)
        kind = key & 7
        if kind == _VARINT:
            value, position = _varint(message, position)
            yield key >> 3, value
            continue
        if kind == _BYTES:
            length, position = _varint(message, position)
        elif kind in (_FIXED32, _FIXED64):
            length = 4 if kind == _FIXED32 else 8
        else:
            raise ValueError(f"a field of unknown wire type {kind}")
        end = position + length
        if end > len(message):
            raise EOFError
        yield key >> 3, message[position:end]
        position = end


def integers(value: int | memoryview) -> list[int]:
    """Returns the values of a repeated integer field, which may be packed."""
    if isinstance(value, int):
        return [value]
    found, position = [], 0
    while position < len(value):
        number, position = _varint(value, position)
        found.append(number)
    return found


def inner(value: int | memoryview) -> memoryview:
    """Returns the bytes of a value. Raises `ValueError` if it is a number."""
    if isinstance(value, int):
        raise ValueError("a number in the place of a message")
    return value


def text(value: int | memoryview) -> str:
    return bytes(inner(value)).decode()


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    value = shift = 0
    while position < len(message):
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
        if shift > 63:
            raise ValueError("a number of more than 64 bits")
    raise EOFError
