"""The state machine of an update: every pair of phase and event, whether in the table or not."""

from itertools import product

import pytest

from slmops.contracts.errors import IllegalTransition
from slmops.gateway.domain import MAX_ATTEMPTS, RESTING, TRANSITIONS, Event, Phase, next_phase, should_update

NEW, OLD = "sha256:" + "a" * 64, "sha256:" + "b" * 64
MISSING = [pair for pair in product(Phase, Event) if pair not in TRANSITIONS]


def test_a_good_update_passes_all_phases_in_order() -> None:
    phase, seen = Phase.IDLE, []
    for event in (
        Event.UPDATE_WANTED,
        Event.INSTALL_SUCCEEDED,
        Event.LOAD_SUCCEEDED,
        Event.PROBE_PASSED,
        Event.SWAPPED,
        Event.SOAK_PASSED,
    ):
        phase = next_phase(phase, event)
        seen.append(phase)
    assert seen == ["downloading", "installed", "loaded", "probed", "soaking", "committed"]


@pytest.mark.parametrize(("phase", "event"), MISSING)
def test_a_pair_that_is_not_in_the_table_is_illegal(phase: Phase, event: Event) -> None:
    with pytest.raises(IllegalTransition, match=event):
        next_phase(phase, event)


def test_a_release_serves_only_after_its_probe_and_is_committed_only_after_its_soak() -> None:
    assert [at for (at, _), to in TRANSITIONS.items() if to is Phase.SOAKING] == [Phase.PROBED]
    assert [at for (at, _), to in TRANSITIONS.items() if to is Phase.COMMITTED] == [Phase.SOAKING]


def test_every_phase_can_be_reached_and_none_is_a_dead_end() -> None:
    assert {to for _, to in TRANSITIONS.items()} == set(Phase)
    assert {at for at, _ in TRANSITIONS} == set(Phase)


def test_a_restart_resets_an_unfinished_update_to_idle() -> None:
    for phase in set(Phase) - RESTING:
        assert next_phase(phase, Event.RESTARTED) is Phase.IDLE


@pytest.mark.parametrize("phase", Phase)
def test_an_update_starts_only_in_a_resting_phase(phase: Phase) -> None:
    wanted = should_update(desired=NEW, active=OLD, failed=(), phase=phase)
    assert wanted == ((phase, Event.UPDATE_WANTED) in TRANSITIONS)


@pytest.mark.parametrize(
    ("desired", "failed", "attempts"),
    [(None, (), 0), (OLD, (), 0), (NEW, (NEW,), 0), (NEW, (), MAX_ATTEMPTS)],
    ids=["nothing is desired", "it already serves", "it failed before", "it never finished a soak"],
)
def test_no_update_starts_when(desired: str | None, failed: tuple[str, ...], attempts: int) -> None:
    assert not should_update(desired=desired, active=OLD, failed=failed, phase=Phase.IDLE, attempts=attempts)
