"""The phases of an update on a gateway, and the decision whether to start an update. Pure.

Rules:
- A release serves only after it passed its probe, and is committed only after it passed its soak.
- Every failed step leads to FAILED. From FAILED the gateway returns to the previous slot.
- A failed release is not tried again until its failure is cleared. A restart of the gateway does not count as a
  failure of the release, but a release that does not finish `MAX_ATTEMPTS` soaks is not tried again either.
"""

from __future__ import annotations

from collections.abc import Collection
from enum import StrEnum

from slmops.contracts.descriptor import Digest
from slmops.contracts.errors import IllegalTransition
from slmops.contracts.events import UpdatePhase

MAX_ATTEMPTS = 3


Phase = UpdatePhase
"""The phases are those that a report contains."""


class Event(StrEnum):
    UPDATE_WANTED = "update_wanted"
    INSTALL_SUCCEEDED = "install_succeeded"
    LOAD_SUCCEEDED = "load_succeeded"
    PROBE_PASSED = "probe_passed"
    SWAPPED = "swapped"
    SOAK_PASSED = "soak_passed"
    STEP_FAILED = "step_failed"
    REVERTED = "reverted"
    RESTARTED = "restarted"
    """The agent restarted during an update, or the update was withdrawn."""


TRANSITIONS: dict[tuple[Phase, Event], Phase] = {
    (Phase.IDLE, Event.UPDATE_WANTED): Phase.DOWNLOADING,
    (Phase.DOWNLOADING, Event.INSTALL_SUCCEEDED): Phase.INSTALLED,
    (Phase.INSTALLED, Event.LOAD_SUCCEEDED): Phase.LOADED,
    (Phase.LOADED, Event.PROBE_PASSED): Phase.PROBED,
    (Phase.PROBED, Event.SWAPPED): Phase.SOAKING,
    (Phase.SOAKING, Event.SOAK_PASSED): Phase.COMMITTED,
    (Phase.COMMITTED, Event.UPDATE_WANTED): Phase.DOWNLOADING,
    (Phase.DOWNLOADING, Event.STEP_FAILED): Phase.FAILED,
    (Phase.INSTALLED, Event.STEP_FAILED): Phase.FAILED,
    (Phase.LOADED, Event.STEP_FAILED): Phase.FAILED,
    (Phase.PROBED, Event.STEP_FAILED): Phase.FAILED,
    (Phase.SOAKING, Event.STEP_FAILED): Phase.FAILED,
    (Phase.FAILED, Event.REVERTED): Phase.IDLE,
    (Phase.DOWNLOADING, Event.RESTARTED): Phase.IDLE,
    (Phase.INSTALLED, Event.RESTARTED): Phase.IDLE,
    (Phase.LOADED, Event.RESTARTED): Phase.IDLE,
    (Phase.PROBED, Event.RESTARTED): Phase.IDLE,
    # The previous slot serves again. If the release is still desired, it is tried again from the slot where it is.
    (Phase.SOAKING, Event.RESTARTED): Phase.IDLE,
    (Phase.FAILED, Event.RESTARTED): Phase.IDLE,
}

RESTING = frozenset({Phase.IDLE, Phase.COMMITTED})
"""The phases in which an update may start."""


def next_phase(phase: Phase, event: Event) -> Phase:
    """Returns the phase after `event`. Raises `IllegalTransition`, which names the legal events."""
    try:
        return TRANSITIONS[phase, event]
    except KeyError:
        legal = ", ".join(other for at, other in TRANSITIONS if at is phase)
        raise IllegalTransition(
            f"event {event} is not allowed in phase {phase} of an update", fix=f"Allowed events: {legal or 'none'}."
        ) from None


def should_update(
    *,
    desired: Digest | None,
    active: Digest | None,
    failed: Collection[Digest],
    phase: Phase,
    attempts: int = 0,
) -> bool:
    """Returns whether to start an update to `desired` now.

    `attempts`: how often `desired` was activated without being committed.
    """
    return (
        desired is not None
        and desired != active
        and desired not in failed
        and attempts < MAX_ATTEMPTS
        and phase in RESTING
    )
