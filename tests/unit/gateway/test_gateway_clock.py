"""A gateway notices that its clock is wrong. If something expired only by that clock, its error names the clock."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from slmops.contracts.clocks import clock_text, is_wrong, time_in
from slmops.contracts.errors import Problem
from slmops.contracts.tuf_names import Attack, refused
from slmops.gateway.report.clock_check import ClockCheck

FROZEN = Problem.of(refused(Attack.FREEZE, "the newest available timestamp has expired", fix="Start the packager."))


class Connected:
    """A connection whose last answer came from services with another time."""

    def __init__(self, ahead: timedelta | None) -> None:
        self.clock_ahead = ahead


def explained(ahead: timedelta | None, problem: Problem | None) -> Problem | None:
    clocks = ClockCheck("gw-1")
    client: Any = Connected(ahead)
    clocks._client = client
    return clocks.explained(problem)


@pytest.mark.parametrize("attack", [Attack.FREEZE, Attack.EXPIRED])
def test_what_expired_by_a_wrong_clock_names_the_clock(attack: Attack) -> None:
    problem = explained(timedelta(days=3), Problem.of(refused(attack, "it has expired", fix="Start the packager.")))
    assert problem is not None
    assert problem.code == "trust_refused"
    assert problem.what.startswith(f"{attack}: it has expired. The clock of this gateway is 3 days and 0:00:00 ahead")
    assert problem.fix == "Correct the gateway's clock."


@pytest.mark.parametrize("ahead", [None, timedelta(seconds=2), timedelta(seconds=-2)])
def test_a_right_or_unknown_clock_explains_nothing(ahead: timedelta | None) -> None:
    assert explained(ahead, FROZEN) == FROZEN


def test_a_wrong_clock_explains_no_other_problem() -> None:
    other = Problem.of(refused(Attack.ROLLBACK, "older"))
    assert explained(timedelta(days=3), other) == other
    assert explained(timedelta(days=3), None) is None
    assert ClockCheck("gw-1").explained(FROZEN) == FROZEN


def test_texts_and_times() -> None:
    assert clock_text(timedelta(days=1, seconds=61)) == "1 day and 0:01:01 ahead of the services' clock"
    assert clock_text(timedelta(minutes=-5)) == "0:05:00 behind the services' clock"
    assert (is_wrong(None), is_wrong(timedelta(seconds=60)), is_wrong(timedelta(seconds=-61))) == (False, False, True)
    assert (time_in(None), time_in("x"), time_in("2030-01-01T00:00:00")) == (None, None, None)
