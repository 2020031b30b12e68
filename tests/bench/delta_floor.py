"""Computes the entropy of changed values: the lower bound for coders that treat changes as independent."""

from __future__ import annotations

from math import lgamma, log
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from slmops.kit.delta.format import Coding, Record, inflate, read_header, records


def entropy_bytes(delta: Path) -> int:
    """Returns the entropy in bytes: for sparse records of positions and changes, for others of the byte planes. Each
    record is separate."""
    with delta.open("rb") as source:
        header = read_header(source)
        return round(sum(_bits(record) for _, record in records(source, header)) / 8)


def _bits(record: Record) -> float:
    if record.coding is Coding.PATCH:
        return 8.0 * record.size_bytes
    streams = [np.frombuffer(inflate(stream, limit=1 << 24), np.uint8) for stream in record.streams]
    if record.coding is not Coding.SPARSE:
        return sum(_order_0(stream) for stream in streams)
    width = record.width or 1
    changes = streams[2].reshape(-1, width)
    values = record.base_bytes * 2 if record.width == 0 else record.base_bytes // record.width
    return _choices(values, len(changes)) + sum(_order_0(plane) for plane in changes.T)


def _choices(n: int, k: int) -> float:
    """Returns log2 of the number of ways to choose k of n."""
    return (lgamma(n + 1) - lgamma(k + 1) - lgamma(n - k + 1)) / log(2)


def _order_0(stream: npt.NDArray[Any]) -> float:
    counts = np.bincount(stream.reshape(-1))
    shares = counts[counts > 0] / max(1, stream.size)
    return float(-stream.size * np.sum(shares * np.log2(shares)))
