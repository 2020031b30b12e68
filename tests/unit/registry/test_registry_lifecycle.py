"""The table of a version's states: other transitions are impossible."""

from __future__ import annotations

from itertools import product

import pytest

from slmops.contracts.errors import IllegalTransition
from slmops.registry.domain.lifecycle import TRANSITIONS, State, Trigger, next_state

ILLEGAL = [pair for pair in product(State, Trigger) if pair not in TRANSITIONS]


@pytest.mark.parametrize(("state", "trigger"), ILLEGAL)
def test_a_pair_that_is_not_in_the_table_is_refused_by_name(state: State, trigger: Trigger) -> None:
    with pytest.raises(IllegalTransition) as refusal:
        next_state(state, trigger)
    assert state in refusal.value.what
    assert trigger in refusal.value.what


def test_the_table_has_the_expected_number_of_transitions() -> None:
    assert (len(TRANSITIONS), len(ILLEGAL)) == (3, 6)


@pytest.mark.parametrize(("pair", "following"), TRANSITIONS.items())
def test_each_pair_of_the_table_leads_to_its_state(pair: tuple[State, Trigger], following: State) -> None:
    assert next_state(*pair) is following


def test_nothing_leaves_retirement() -> None:
    assert not [pair for pair in TRANSITIONS if pair[0] is State.RETIRED]
