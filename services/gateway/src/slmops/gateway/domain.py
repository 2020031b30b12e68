"""The phases of an update on a gateway, and the decision what to install next. Pure.

Rules it keeps:
- A release serves only after it was probed, and stays only after it soaked.
- Whatever goes wrong ends in FAILED, and FAILED has one way out: back on the previous slot.
- A release that failed is not tried again until somebody forgets the failure. A restart is not a failure of the
  release, but a release that does not survive `MAX_ATTEMPTS` soaks is not tried again either.
"""

from __future__ import annotations

from collections.abc import Collection
from enum import StrEnum

from slmops.contracts.descriptor import Digest
from slmops.contracts.errors import IllegalTransition
from slmops.contracts.events import UpdatePhase

MAX_ATTEMPTS = 3


Phase = UpdatePhase
"""What a report says is where the update is."""


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
    """The agent began anew and found an update half done."""


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
    # On the previous slot again; what soaked is wanted still, so it is tried again from its installed slot.
    (Phase.SOAKING, Event.RESTARTED): Phase.IDLE,
    (Phase.FAILED, Event.RESTARTED): Phase.IDLE,
}

RESTING = frozenset({Phase.IDLE, Phase.COMMITTED})
"""Where an update may begin."""


def next_phase(phase: Phase, event: Event) -> Phase:
    """Raises `IllegalTransition`, naming what would be legal."""
    try:
        return TRANSITIONS[phase, event]
    except KeyError:
        legal = ", ".join(other for at, other in TRANSITIONS if at is phase)
        raise IllegalTransition(
            f"an update that is {phase} cannot take {event}", fix=f"Legal there: {legal or 'nothing'}."
        ) from None


def should_update(
    *,
    desired: Digest | None,
    active: Digest | None,
    failed: Collection[Digest],
    phase: Phase,
    attempts: int = 0,
) -> bool:
    """Whether to begin an update to `desired` now. `attempts`: how often `desired` was swapped in and not committed."""
    return (
        desired is not None
        and desired != active
        and desired not in failed
        and attempts < MAX_ATTEMPTS
        and phase in RESTING
    )
