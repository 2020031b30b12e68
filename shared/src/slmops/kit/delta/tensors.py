"""Locates the tensors in a model's files. A file that cannot be read as a model becomes one part without a name.

Only the locations of tensors are taken from the files. A wrong one makes a delta larger, not incorrect.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from slmops.contracts.errors import SlmopsError
from slmops.kit.modelfile.gguf import read_gguf
from slmops.kit.modelfile.protobuf import fields, inner, integers, text


@dataclass(frozen=True)
class Part:
    """A section of a file: a tensor with its name, or the bytes between tensors without a name.

    `width` is the size of a value in bytes; it is 1 for 4-bit codes, of which two share a byte.
    """

    path: str
    offset: int
    size_bytes: int
    name: str = ""
    width: int = 1
    is_float: bool = False

    @property
    def end(self) -> int:
        return self.offset + self.size_bytes


# Fields of onnx.proto3, and the data types whose values are wider than a byte.
_GRAPH, _INITIALIZER, _TYPE, _NAME, _INLINE, _EXTERNAL = 7, 5, 2, 8, 9, 13
_ONNX = {1: (4, True), 4: (2, False), 5: (2, False), 6: (4, False), 7: (8, False), 10: (2, True), 11: (8, True)} | {
    12: (4, False),
    13: (8, False),
    16: (2, True),
}
_SAFETENSORS = {"F64": (8, True), "F32": (4, True), "F16": (2, True), "BF16": (2, True)} | {
    "I64": (8, False),
    "I32": (4, False),
    "I16": (2, False),
}
_GGUF = {0: (4, True), 1: (2, True), 30: (2, True), 28: (8, True)}
_SMALLEST = 64  # a smaller tensor is not worth a separate record
_HEADER_BYTES = 100_000_000


def parts(folder: Path, paths: list[str]) -> list[Part]:
    """Returns the parts of the files `paths` below `folder`, in order. They cover each byte once."""
    tensors = [part for path in paths for part in _tensors(folder, path) if part.size_bytes >= _SMALLEST]
    found: list[Part] = []
    for path in paths:
        mine = sorted((part for part in tensors if part.path == path), key=lambda part: (part.offset, part.size_bytes))
        found += _with_gaps(path, (folder / path).stat().st_size, mine)
    return found


def _with_gaps(path: str, size: int, tensors: list[Part]) -> Iterator[Part]:
    position = 0
    for tensor in tensors:
        if tensor.offset < position or tensor.end > size:
            continue  # it overlaps another tensor (shared weights), or its location is wrong
        if tensor.offset > position:
            yield Part(path, position, tensor.offset - position)
        yield tensor
        position = tensor.end
    if position < size:
        yield Part(path, position, size - position)


def _tensors(folder: Path, path: str) -> list[Part]:
    readers = {".onnx": _onnx, ".onnx_adapter": _none, ".safetensors": _safetensors, ".gguf": _gguf}
    reader = readers.get(Path(path).suffix, _none)
    try:
        return list(reader(folder, path))
    except (SlmopsError, OSError, EOFError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return []


def _none(_folder: Path, _path: str) -> Iterator[Part]:
    yield from ()


def _onnx(folder: Path, path: str) -> Iterator[Part]:
    with (folder / path).open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        data = memoryview(mapped)
        try:
            yield from list(_initializers(data, path))
        finally:
            data.release()


def _initializers(data: memoryview, path: str) -> Iterator[Part]:
    start = _address(data)
    for number, graph in fields(data):
        if number == _GRAPH:
            for kind, found in fields(inner(graph)):
                if kind == _INITIALIZER and (part := _initializer(inner(found), path, start)):
                    yield part


def _initializer(message: memoryview, path: str, start: int) -> Part | None:
    name, kind, inline, external = "", 0, None, {}
    for number, found in fields(message):
        if number == _TYPE:
            kind = integers(found)[0]
        elif number == _NAME:
            name = text(found)
        elif number == _INLINE:
            inline = inner(found)
        elif number == _EXTERNAL:
            pair = {key: text(value) for key, value in fields(inner(found))}
            external[pair.get(1, "")] = pair.get(2, "")
    width, is_float = _ONNX.get(kind, (1, False))
    if "location" in external and "length" in external:
        where = (Path(path).parent / external["location"]).as_posix()
        return Part(where, int(external.get("offset", 0)), int(external["length"]), name, width, is_float)
    if inline is not None and len(inline):
        return Part(path, _address(inline) - start, len(inline), name, width, is_float)
    return None


def _address(view: memoryview) -> int:
    """Returns the memory address of a view, because a slice of a mapping does not know its offset in the mapping."""
    import numpy as np

    return int(np.frombuffer(view, np.uint8).ctypes.data)


def _safetensors(folder: Path, path: str) -> Iterator[Part]:
    with (folder / path).open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > _HEADER_BYTES:
            return
        table = json.loads(file.read(length))
    for name, entry in table.items():
        if name != "__metadata__":
            start, end = entry["data_offsets"]
            width, is_float = _SAFETENSORS.get(entry["dtype"], (1, False))
            yield Part(path, 8 + length + start, end - start, name, width, is_float)


def _gguf(folder: Path, path: str) -> Iterator[Part]:
    for tensor in read_gguf(folder / path)[1]:
        width, is_float = _GGUF.get(tensor.kind, (1, False))
        if math.prod(tensor.shape):
            yield Part(path, tensor.offset, tensor.size_bytes, tensor.name, width, is_float)
