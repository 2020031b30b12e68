"""Intervals have their nominal coverage, even if neighbouring positions are correlated."""

from __future__ import annotations

import math

import numpy as np
import pytest

from slmops.optimizer.measure.bootstrap import BLOCK_POSITIONS, interval

WINDOWS, POSITIONS = 6, 256


def correlated(seed: int) -> np.ndarray:
    """Returns values with mean 0; each is 0.8 times the previous one plus noise."""
    new = np.random.default_rng(seed).normal(size=(WINDOWS, POSITIONS + 50))
    values = np.zeros_like(new)
    for position in range(1, new.shape[1]):
        values[:, position] = 0.8 * values[:, position - 1] + new[:, position]
    return values[:, 50:].astype(np.float32)


def test_an_interval_covers_the_true_mean_about_95_times_in_100() -> None:
    covered = sum(low <= 0 <= high for low, high in (interval(correlated(seed), 0) for seed in range(200)))
    assert 176 <= covered <= 200


def test_an_interval_is_wider_than_for_independent_positions() -> None:
    values = correlated(0)
    shuffled = np.random.default_rng(0).permutation(values.ravel()).reshape(values.shape)
    (low, high), (shuffled_low, shuffled_high) = interval(values, 0), interval(shuffled, 0)
    assert high - low > 1.8 * (shuffled_high - shuffled_low)


def test_the_same_seed_gives_the_same_interval_and_another_seed_a_similar_one() -> None:
    values = correlated(3)
    assert interval(values, 1) == interval(values, 1) != interval(values, 2)
    assert interval(values, 1) == pytest.approx(interval(values, 2), abs=0.05)


def test_a_short_last_block_is_weighted_by_its_size() -> None:
    values = np.zeros((1000, BLOCK_POSITIONS + 1))
    values[:, -1] = 1
    low, high = interval(values, 0)
    assert low < 1 / (BLOCK_POSITIONS + 1) < high < 0.05


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_value_that_is_not_finite_gives_no_interval(broken: float) -> None:
    values = correlated(0)
    values[3, 7] = broken
    assert all(map(math.isnan, interval(values, 0)))


def test_a_single_block_gives_no_interval() -> None:
    assert all(map(math.isnan, interval(np.ones((1, BLOCK_POSITIONS)), 0)))
    assert interval(np.ones((1, 2 * BLOCK_POSITIONS)), 0) == (1, 1)
