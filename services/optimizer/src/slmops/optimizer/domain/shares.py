"""Finds the share of a model that gets more bits, in few trials: bytes and fidelity both rise with the share.

Shares are whole hundredths.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

_CLOSE = 2  # hundredths; a smaller difference does not matter to anybody who downloads the model


def largest_fitting(sizes: Sequence[tuple[float, int]], limit_bytes: int) -> float | None:
    """Returns the share to try next when looking for the largest share that fits; None if that share is known.

    `sizes` are measured (share, bytes). Bytes grow linearly with the share, in steps of whole matrices.
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
    """Returns the share to try next when looking for the smallest sufficient share; None if it is known. Bisection."""
    low = max((share for share, enough in suffices if not enough), default=None)
    high = min((share for share, enough in suffices if enough), default=1.0)
    if low is None:
        return 0.0 if high > 0 else None
    return _between(low, high, (low + high) / 2) if round(100 * (high - low)) > _CLOSE else None


def _between(low: float, high: float, wanted: float) -> float | None:
    share = math.floor(wanted * 100 + 1e-9) / 100
    return share if low < share < high else None
