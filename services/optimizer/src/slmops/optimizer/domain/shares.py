"""How large a share of a model gets more bits: two questions that a few trials answer, because bytes and fidelity both
rise with the share. Shares are whole hundredths."""

from __future__ import annotations

import math
from collections.abc import Sequence

_CLOSE = 2  # hundredths: shares that differ by no more are the same to anybody who downloads them


def largest_fitting(sizes: Sequence[tuple[float, int]], limit_bytes: int) -> float | None:
    """The share to try next on the way to the largest that fits; None if it is known.

    `sizes` are (share, bytes) of what was measured. Bytes are linear in the share, but for whole matrices.
    """
    low = max((point for point in sizes if point[1] <= limit_bytes), default=None)
    high = min((point for point in sizes if point[1] > limit_bytes), default=None)
    if low is None:
        return 0.0 if high and high[0] > 0 else None
    if high is None and len(sizes) == 1:
        return _between(low[0], 1.0, (low[0] + 1) / 2)
    (a, size_a), (b, size_b) = (low, high) if high else (min(sizes), low)
    slope = (size_b - size_a) / (b - a) if b > a else 0
    wanted = low[0] + (limit_bytes - low[1]) / slope if slope > 0 else 1.0
    return _between(low[0], high[0] if high else 1.01, min(wanted, 1.0))


def smallest_sufficient(suffices: Sequence[tuple[float, bool]]) -> float | None:
    """The share to try next on the way to the smallest that suffices; None if it is known. By halving."""
    low = max((share for share, enough in suffices if not enough), default=None)
    high = min((share for share, enough in suffices if enough), default=1.0)
    if low is None:
        return 0.0 if high > 0 else None
    return _between(low, high, (low + high) / 2) if round(100 * (high - low)) > _CLOSE else None


def _between(low: float, high: float, wanted: float) -> float | None:
    share = math.floor(wanted * 100 + 1e-9) / 100
    return share if low < share < high else None
