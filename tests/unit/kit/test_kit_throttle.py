"""A source may have few requests rejected; those that are accepted cost nothing."""

from __future__ import annotations

import json
from datetime import timedelta

import pytest

from slmops.kit.bus import throttle as module
from slmops.kit.bus.throttle import INSIDE, Throttle, source_of


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def throttle(clock: Clock) -> Throttle:
    return Throttle(burst=3, every=timedelta(seconds=10), clock=clock)


def rejected(throttle: Throttle, source: str, attempts: int) -> int:
    """How many of so many wrong requests are looked at."""
    looked_at = 0
    for _ in range(attempts):
        if throttle.take(source):
            looked_at += 1
            throttle.settle(source, rejected=True)
    return looked_at


def test_a_source_has_a_burst_and_then_one_rejection_per_interval(throttle: Throttle, clock: Clock) -> None:
    assert rejected(throttle, "10.0.0.1", 300) == 3
    clock.now += 9.9
    assert rejected(throttle, "10.0.0.1", 300) == 0
    clock.now += 0.2
    assert rejected(throttle, "10.0.0.1", 300) == 1
    clock.now += 3600
    assert rejected(throttle, "10.0.0.1", 300) == 3


def test_another_source_is_not_affected(throttle: Throttle) -> None:
    rejected(throttle, "10.0.0.1", 300)
    assert throttle.take("10.0.0.2")


def test_accepted_requests_cost_nothing(throttle: Throttle) -> None:
    for _ in range(300):
        assert throttle.take("10.0.0.1")
        throttle.settle("10.0.0.1", rejected=False)
    assert rejected(throttle, "10.0.0.1", 300) == 3


def test_requests_that_are_handled_at_the_same_time_do_not_exceed_the_burst(throttle: Throttle) -> None:
    assert [throttle.take("10.0.0.1") for _ in range(5)] == [True, True, True, False, False]


def test_the_sources_that_are_remembered_are_bounded(throttle: Throttle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_SOURCES", 10)
    for number in range(100):
        rejected(throttle, f"10.0.0.{number}", 1)
    assert len(throttle._left) == 10


def test_a_log_line_names_the_source_once(throttle: Throttle, caplog: pytest.LogCaptureFixture) -> None:
    rejected(throttle, "10.0.0.1", 300)
    assert [record.getMessage() for record in caplog.records] == [
        "too many requests of 10.0.0.1 were rejected; not looking at the next ones"
    ]


@pytest.mark.parametrize(
    ("headers", "source"),
    [
        ({"Nats-Request-Info": json.dumps({"acc": "A", "host": "10.0.0.1"})}, "10.0.0.1"),
        ({"Nats-Request-Info": json.dumps({"host": "2001:db8:1:2:3:4:5:6"})}, "2001:db8:1:2::/64"),
        ({"Nats-Request-Info": json.dumps({"host": "2001:db8:1:2::9"})}, "2001:db8:1:2::/64"),
        ({"Nats-Request-Info": json.dumps({"acc": "A"})}, INSIDE),
        ({"Nats-Request-Info": "{"}, INSIDE),
        ({"Nats-Request-Info": "[]"}, INSIDE),
        ({}, INSIDE),
        (None, INSIDE),
    ],
)
def test_the_source_is_the_address_that_the_server_saw(headers: dict[str, str] | None, source: str) -> None:
    assert source_of(headers) == source
