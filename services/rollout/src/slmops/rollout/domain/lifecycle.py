"""The states of a rollout as a table. Transitions that are not in the table are impossible."""

from __future__ import annotations

from enum import StrEnum
from typing import Final

from slmops.contracts.errors import IllegalTransition


class State(StrEnum):
    RUNNING = "running"
    HELD = "held"
    PAUSED = "paused"
    COMPLETED = "completed"
    ABORTED = "aborted"
    ROLLED_BACK = "rolled_back"


class Trigger(StrEnum):
    ADVANCE = "advance"
    HOLD = "hold"
    PAUSE = "pause"
    RESUME = "resume"
    COMPLETE = "complete"
    ABORT = "abort"
    ROLL_BACK = "roll_back"


TRANSITIONS: Final[dict[tuple[State, Trigger], State]] = {
    (State.RUNNING, Trigger.ADVANCE): State.RUNNING,
    (State.RUNNING, Trigger.HOLD): State.HELD,
    (State.RUNNING, Trigger.PAUSE): State.PAUSED,
    (State.RUNNING, Trigger.COMPLETE): State.COMPLETED,
    (State.RUNNING, Trigger.ABORT): State.ABORTED,
    (State.RUNNING, Trigger.ROLL_BACK): State.ROLLED_BACK,
    # A held rollout can continue, because missing data may still arrive.
    (State.HELD, Trigger.ADVANCE): State.RUNNING,
    (State.HELD, Trigger.RESUME): State.RUNNING,
    (State.HELD, Trigger.PAUSE): State.PAUSED,
    (State.HELD, Trigger.COMPLETE): State.COMPLETED,
    (State.HELD, Trigger.ABORT): State.ABORTED,
    (State.HELD, Trigger.ROLL_BACK): State.ROLLED_BACK,
    (State.PAUSED, Trigger.RESUME): State.RUNNING,
    (State.PAUSED, Trigger.ABORT): State.ABORTED,
    (State.PAUSED, Trigger.ROLL_BACK): State.ROLLED_BACK,
    (State.COMPLETED, Trigger.ROLL_BACK): State.ROLLED_BACK,
}

UNDER_WAY: Final = frozenset({State.RUNNING, State.HELD, State.PAUSED})
"""States in which the candidate is in the plan."""

JUDGED: Final = frozenset({State.RUNNING, State.HELD})
"""States in which the gate may move the rollout. Only an operator moves a paused one."""


def next_state(state: State, trigger: Trigger) -> State:
    """Returns the next state. Raises `IllegalTransition` with the allowed triggers."""
    found = TRANSITIONS.get((state, trigger))
    if found is None:
        allowed = ", ".join(t for s, t in TRANSITIONS if s is state) or "nothing"
        raise IllegalTransition(f"a rollout that is {state} does not allow {trigger}", fix=f"Allowed now: {allowed}.")
    return found
