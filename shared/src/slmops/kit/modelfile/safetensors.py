"""Reads the header of a safetensors file (https://huggingface.co/docs/safetensors/index#format)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from slmops.contracts.errors import TruncatedModel, UnsupportedArchitecture
from slmops.contracts.json_lines import loads
from slmops.kit.modelfile.facts import Shape, damaged

_MAX_HEADER = 100_000_000  # the format's own limit
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_SMALL = ("F8_", "F6_", "F4")


def read_shapes(path: Path) -> dict[str, Shape]:
    """Returns the shapes by name after checking that the tensors fill the file exactly. Raises `TruncatedModel`,
    `InvalidModel`."""
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) == 8 and length > _MAX_HEADER:
            raise damaged("the file is not a safetensors file", path)
        header = file.read(length)
    if len(prefix) < 8 or len(header) < length:
        raise TruncatedModel(
            f"the file ends inside its header, after {size:,} bytes", where=str(path), fix="Download it again."
        )
    try:
        table = {name: _entry(entry) for name, entry in loads(header).items() if name != "__metadata__"}
    except _Quantized as error:
        raise UnsupportedArchitecture(
            f"the weights are already quantized to {error}",
            where=str(path),
            fix="Give the original, unquantized model.",
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise damaged(f"the safetensors header is damaged: {str(error)[:100]}", path) from error
    _check_filled(sorted(span for _, span in table.values()), size - 8 - length, path)
    return {name: shape for name, (shape, _) in table.items()}


class _Quantized(Exception):
    """The data type is a number of at most 8 bits with a scale elsewhere."""


def _entry(entry: Any) -> tuple[Shape, tuple[int, int]]:
    shape, (start, end) = tuple(entry["shape"]), entry["data_offsets"]
    if str(entry["dtype"]).startswith(_SMALL):
        raise _Quantized(entry["dtype"])
    if not all(isinstance(number, int) and number >= 0 for number in (*shape, start, end)):
        raise ValueError("a size is not a number")
    if end - start != math.prod(shape) * _BYTES[entry["dtype"]]:
        raise ValueError(f"{shape} of {entry['dtype']} in {end - start:,} bytes")
    return shape, (start, end)


def _check_filled(spans: list[tuple[int, int]], size_bytes: int, path: Path) -> None:
    position = 0
    for start, end in spans:
        if start != position:
            raise damaged(f"the weights have a gap or overlap at byte {position:,}", path)
        position = end
    if position > size_bytes:
        raise TruncatedModel(
            f"the weights need {position:,} bytes, the file has {size_bytes:,}",
            where=str(path),
            fix="Download it again.",
        )
    if position < size_bytes:
        raise damaged(f"the file has {size_bytes - position:,} bytes more than its header says", path)
