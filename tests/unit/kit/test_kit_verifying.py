"""The pace of a verification: it waits as long as the rate asks for, and ends at once when it is stopped."""

from __future__ import annotations

import pytest

from slmops.contracts.errors import Unreachable
from slmops.kit.objects.verifying import Pace


def test_a_rate_is_kept_over_all_chunks_and_blobs() -> None:
    now = [0.0]

    def wait(seconds: float) -> None:
        now[0] += seconds

    pace = Pace(100, lambda: now[0], wait)
    for _ in range(3):
        for chunk in pace.over([bytes(50), bytes(150)]):
            now[0] += len(chunk) / 1000  # the reading itself
    assert now[0] == pytest.approx(6.0)


def test_without_a_rate_nothing_waits() -> None:
    def wait(_: float) -> None:
        raise AssertionError("it waited")

    assert list(Pace(None, lambda: 0.0, wait).over([b"a", b"b"])) == [b"a", b"b"]


def test_a_reader_ends_when_nobody_waits_for_it_any_more() -> None:
    pace = Pace(1)
    chunks = pace.over([bytes(1000), bytes(1000)])
    next(chunks)
    pace.stop()
    with pytest.raises(Unreachable):  # and not after a thousand seconds
        next(chunks)
