"""Computes confidence intervals for means over a text, where neighbouring positions are correlated.

The non-overlapping block bootstrap (Carlstein, Annals of Statistics 14, 1986) with percentile limits (Efron and
Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13): blocks of consecutive positions are drawn with
replacement, and the interval is the middle 95% of the means of these draws.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

RESAMPLES = 1000
BLOCK_POSITIONS = 32
_PERCENTILES = (2.5, 97.5)
METHOD = (
    f"95% percentile interval, non-overlapping block bootstrap, {RESAMPLES} resamples of {BLOCK_POSITIONS} positions"
)


def interval(values: npt.NDArray[np.floating], seed: int) -> tuple[float, float]:
    """Returns the 95% interval of the mean of `values` [windows, positions]. No block spans two windows.

    Returns (NaN, NaN) if a value is not finite or there are fewer than two blocks. The same seed gives the same result.
    """
    starts = np.arange(0, values.shape[1], BLOCK_POSITIONS)
    sums = np.add.reduceat(values.astype(np.float64), starts, axis=1).ravel()
    sizes = np.tile(np.diff([*starts, values.shape[1]]), len(values))
    blocks = len(sums)
    if blocks < 2 or not np.isfinite(sums).all():
        return float("nan"), float("nan")
    drawn = np.random.default_rng(seed).multinomial(blocks, np.full(blocks, 1 / blocks), size=RESAMPLES)
    low, high = np.percentile(drawn @ sums / (drawn @ sizes), _PERCENTILES)
    return float(low), float(high)
