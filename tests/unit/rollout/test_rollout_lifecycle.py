"""The table of a rollout's states: other transitions are impossible."""

from __future__ import annotations

from itertools import product

import pytest

from slmops.contracts.errors import IllegalTransition
from slmops.rollout.domain.blueprint import TRIGGERS
from slmops.rollout.domain.lifecycle import JUDGED, TRANSITIONS, UNDER_WAY, State, Trigger, next_state

ILLEGAL = [pair for pair in product(State, Trigger) if pair not in TRANSITIONS]


@pytest.mark.parametrize(("state", "trigger"), ILLEGAL)
def test_a_pair_that_is_not_in_the_table_is_refused_by_name(state: State, trigger: Trigger) -> None:
    with pytest.raises(IllegalTransition) as refusal:
        next_state(state, trigger)
    assert state in refusal.value.what
    assert trigger in refusal.value.what
    allowed = ", ".join(t for s, t in TRANSITIONS if s is state)
    assert refusal.value.fix == f"Allowed now: {allowed or 'nothing'}."


def test_the_table_has_the_expected_number_of_transitions() -> None:
    assert (len(TRANSITIONS), len(ILLEGAL)) == (16, 26)


@pytest.mark.parametrize(("pair", "following"), TRANSITIONS.items())
def test_each_pair_of_the_table_leads_to_its_state(pair: tuple[State, Trigger], following: State) -> None:
    assert next_state(*pair) is following


def test_of_ended_rollouts_only_a_completed_one_can_be_rolled_back() -> None:
    ended = [pair for pair in TRANSITIONS if pair[0] not in UNDER_WAY]
    assert ended == [(State.COMPLETED, Trigger.ROLL_BACK)]


def test_the_gate_does_not_move_a_paused_rollout() -> None:
    assert State.PAUSED not in JUDGED
    for trigger in (Trigger.ADVANCE, Trigger.COMPLETE, Trigger.HOLD):
        assert (State.PAUSED, trigger) not in TRANSITIONS


def test_every_trigger_has_its_event() -> None:
    assert sorted(TRIGGERS.values()) == sorted(Trigger)
