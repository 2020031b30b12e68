"""The states of a version as a table."""

from __future__ import annotations

from enum import StrEnum
from typing import Final

from slmops.contracts.errors import IllegalTransition


class State(StrEnum):
    ABSENT = "absent"
    REGISTERED = "registered"
    RETIRED = "retired"


class Trigger(StrEnum):
    REGISTER = "register"
    SET_ALIAS = "set alias"
    RETIRE = "retire"


TRANSITIONS: Final[dict[tuple[State, Trigger], State]] = {
    (State.ABSENT, Trigger.REGISTER): State.REGISTERED,
    (State.REGISTERED, Trigger.SET_ALIAS): State.REGISTERED,
    (State.REGISTERED, Trigger.RETIRE): State.RETIRED,
}


def next_state(state: State, trigger: Trigger) -> State:
    """Returns the next state. Raises `IllegalTransition` for a pair that is not in the table."""
    found = TRANSITIONS.get((state, trigger))
    if found is None:
        allowed = ", ".join(t for s, t in TRANSITIONS if s is state) or "nothing"
        raise IllegalTransition(f"a version that is {state} does not allow '{trigger}'", fix=f"Allowed now: {allowed}.")
    return found
