"""Commands and gate decisions cause events, and events give state and plan."""

from __future__ import annotations

import pytest
from unit.rollout.rollout_examples import NAME, T0, applied, at, blueprint, package, started, told

from slmops.contracts.blueprint import GatePolicy, RuntimeSettings, Stage
from slmops.contracts.commands import (
    AbortRollout,
    ApplyBlueprint,
    PauseRollout,
    ResumeRollout,
    RollbackRollout,
    StartRollout,
)
from slmops.contracts.errors import AlreadyExists, IllegalTransition, InternalError, NotFound, PermanentError
from slmops.contracts.events import (
    RolloutAborted,
    RolloutCompleted,
    RolloutHeld,
    RolloutPaused,
    RolloutResumed,
    RolloutRolledBack,
    RolloutStageAdvanced,
    RolloutStarted,
)
from slmops.contracts.profile import EDGE_SMALL
from slmops.rollout.domain.blueprint import BlueprintState, Rollout, plan_of, replay
from slmops.rollout.domain.decide import apply_blueprint, follow_gate, operate, start_rollout
from slmops.rollout.domain.gate import GateDecision, Verdict
from slmops.rollout.domain.lifecycle import State

PASSED, FAILED, OVERDUE, WAITING = (
    GateDecision(v, v.value) for v in (Verdict.PASSED, Verdict.FAILED, Verdict.OVERDUE, Verdict.WAITING)
)
EMPTY = BlueprintState(NAME)


def latest(state: BlueprintState) -> Rollout:
    assert state.latest is not None
    return state.latest


def judged(state: BlueprintState, *decisions: GateDecision, seconds: float = 10) -> BlueprintState:
    for decision in decisions:
        state = told(state, *follow_gate(state, latest(state), decision, at(seconds)))
    return state


def completed(version: str = "1.0.0", state: BlueprintState | None = None) -> BlueprintState:
    return judged(started(version, state), PASSED, PASSED)


def test_applying_an_unchanged_blueprint_creates_no_revision() -> None:
    state = applied()
    assert apply_blueprint(state, ApplyBlueprint(spec=blueprint()), T0) == []
    [changed] = apply_blueprint(state, ApplyBlueprint(spec=blueprint(role="translate")), T0)
    assert changed.revision == 2  # type: ignore[attr-defined]


def test_an_older_spec_applied_again_is_a_new_revision() -> None:
    state = told(applied(), *apply_blueprint(applied(), ApplyBlueprint(spec=blueprint(role="translate")), T0))
    [back] = apply_blueprint(state, ApplyBlueprint(spec=blueprint()), T0)
    assert back.revision == 3  # type: ignore[attr-defined]


def test_an_unknown_profile_is_not_found() -> None:
    with pytest.raises(NotFound, match="edge-huge") as refusal:
        apply_blueprint(EMPTY, ApplyBlueprint(spec=blueprint(profile="edge-huge")), T0)
    assert "edge-small" in (refusal.value.fix or "")


def test_a_rollout_carries_the_package_and_the_settings_of_the_newest_revision() -> None:
    state = told(
        applied(),
        *apply_blueprint(applied(), ApplyBlueprint(spec=blueprint(runtime=RuntimeSettings(max_tokens=7))), T0),
    )
    [event] = start_rollout(state, StartRollout(blueprint=NAME, version="1.0.0"), [package("1.0.0")], T0)
    assert isinstance(event, RolloutStarted)
    release = event.candidate
    assert (release.revision, release.version, release.runtime.max_tokens) == (2, "1.0.0", 7)
    assert (release.manifest, release.signature) == (package("1.0.0").manifest, package("1.0.0").signature)
    assert (release.min_tokens_per_s, release.max_rss_bytes) == (EDGE_SMALL.min_tokens_per_s, EDGE_SMALL.ram_bytes)
    assert event.stages == blueprint().stages


def test_without_a_version_the_newest_published_package_is_taken() -> None:
    packages = [package("2.0.0", 1), package("1.0.1", 2), package("3.0.0", 3, profile="edge-large")]
    [event] = start_rollout(applied(), StartRollout(blueprint=NAME), packages, T0)
    assert isinstance(event, RolloutStarted)
    assert event.candidate.version == "1.0.1"


def test_a_command_may_override_the_stages() -> None:
    all_at_once = (Stage(name="all"),)
    [event] = start_rollout(applied(), StartRollout(blueprint=NAME, stages=all_at_once), [package("1.0.0")], T0)
    assert isinstance(event, RolloutStarted)
    assert event.stages == all_at_once


def test_a_package_that_is_not_published_is_not_found_and_the_published_are_named() -> None:
    with pytest.raises(NotFound, match=r"smollm2:9\.9\.9") as refusal:
        start_rollout(
            applied(),
            StartRollout(blueprint=NAME, version="9.9.9"),
            [package("1.0.0"), package("2.0.0", profile="big")],
            T0,
        )
    assert refusal.value.fix == "Published of smollm2: 1.0.0 for edge-small, 2.0.0 for big."
    with pytest.raises(NotFound) as refusal:
        start_rollout(applied(), StartRollout(blueprint=NAME), [], T0)
    assert refusal.value.fix == "Published of smollm2: nothing."


def test_an_unknown_blueprint_is_not_found() -> None:
    with pytest.raises(NotFound, match=NAME):
        start_rollout(EMPTY, StartRollout(blueprint=NAME), [package("1.0.0")], T0)
    with pytest.raises(NotFound, match=NAME):
        operate(EMPTY, PauseRollout(blueprint=NAME), T0)
    with pytest.raises(NotFound, match="no rollout"):
        operate(applied(), AbortRollout(blueprint=NAME), T0)


@pytest.mark.parametrize("decisions", [(), (OVERDUE,)])
def test_one_rollout_at_a_time(decisions: tuple[GateDecision, ...]) -> None:
    state = judged(started(), *decisions)
    with pytest.raises(AlreadyExists, match="edge-chat-1"):
        start_rollout(state, StartRollout(blueprint=NAME), [package("1.0.0")], T0)
    with pytest.raises(IllegalTransition, match=r"smollm2:1\.0\.0"):
        start_rollout(state, StartRollout(blueprint=NAME), [package("1.0.1")], T0)


def test_the_stable_release_is_rejected_until_the_blueprint_changes() -> None:
    state = completed()
    with pytest.raises(PermanentError, match="already the stable release of edge-chat"):
        start_rollout(state, StartRollout(blueprint=NAME), [package("1.0.0")], T0)
    state = told(
        state, *apply_blueprint(state, ApplyBlueprint(spec=blueprint(runtime=RuntimeSettings(max_tokens=7))), T0)
    )
    [event] = start_rollout(state, StartRollout(blueprint=NAME), [package("1.0.0")], T0)
    assert isinstance(event, RolloutStarted)
    assert event.rollout == "edge-chat-2"


def test_stages_open_one_by_one_and_the_last_completes() -> None:
    state = judged(started(), PASSED)
    assert (latest(state).state, latest(state).stage, latest(state).stage_started_at) == (State.RUNNING, 1, at(10))
    state = judged(state, PASSED, seconds=20)
    assert (latest(state).state, latest(state).ended_at) == (State.COMPLETED, at(20))
    assert state.stable == latest(state).candidate


def test_waiting_gives_no_event_and_overdue_holds_once() -> None:
    state = started()
    assert follow_gate(state, latest(state), WAITING, T0) == []
    [held] = follow_gate(state, latest(state), OVERDUE, T0)
    assert isinstance(held, RolloutHeld)
    state = told(state, held)
    assert follow_gate(state, latest(state), OVERDUE, T0) == []


def test_a_held_rollout_continues_when_data_arrives() -> None:
    state = judged(started(), OVERDUE)
    assert latest(state).state is State.HELD
    [event] = follow_gate(state, latest(state), PASSED, T0)
    assert isinstance(event, RolloutStageAdvanced)
    assert latest(told(state, event)).state is State.RUNNING


def test_a_failed_gate_returns_everybody_to_stable() -> None:
    state = started("1.0.1", completed())
    assert plan_of(state).candidate is not None
    state = judged(state, FAILED)
    plan = plan_of(state)
    assert (latest(state).state, plan.candidate) == (State.ROLLED_BACK, None)
    assert plan.stable is not None
    assert plan.stable.version == "1.0.0"


@pytest.mark.parametrize("command", [PauseRollout, ResumeRollout, AbortRollout, RollbackRollout])
def test_a_retried_command_does_not_act_twice(
    command: type[PauseRollout | ResumeRollout | AbortRollout | RollbackRollout],
) -> None:
    asked = command(blueprint=NAME)
    state = started("1.0.1", completed())
    if command is ResumeRollout:
        state = told(state, *operate(state, PauseRollout(blueprint=NAME), T0))
    [event] = operate(state, asked, T0)
    state = told(state, event)
    assert operate(state, asked, T0) == []


def test_pause_and_resume_keep_the_stage_and_restart_the_deadline() -> None:
    state = judged(started(), PASSED)
    [paused] = operate(state, PauseRollout(blueprint=NAME), at(20))
    assert isinstance(paused, RolloutPaused)
    state = told(state, paused)
    assert plan_of(state).candidate is not None, "who has the candidate keeps it"
    [resumed] = operate(state, ResumeRollout(blueprint=NAME), at(500))
    assert isinstance(resumed, RolloutResumed)
    rollout = latest(told(state, resumed))
    assert (rollout.state, rollout.stage, rollout.stage_started_at, rollout.judged_since) == (
        State.RUNNING,
        1,
        at(10),
        at(500),
    )


def test_abort_removes_the_candidate() -> None:
    state = started("1.0.1", completed())
    [event] = operate(state, AbortRollout(blueprint=NAME, reason="wrong day"), T0)
    assert isinstance(event, RolloutAborted)
    state = told(state, event)
    assert (latest(state).reason, plan_of(state).candidate) == ("wrong day", None)
    assert state.stable is not None
    assert state.stable.version == "1.0.0"


def test_rolling_back_a_completed_rollout_restores_the_release_before_it() -> None:
    state = completed("1.0.1", completed())
    [event] = operate(state, RollbackRollout(blueprint=NAME), T0)
    assert isinstance(event, RolloutRolledBack)
    state = told(state, event)
    assert state.stable is not None
    assert state.stable.version == "1.0.0"
    assert operate(state, RollbackRollout(blueprint=NAME), T0) == [], "a retry goes back no further"


def test_the_plan_names_the_release_of_a_possible_rollback() -> None:
    assert plan_of(completed()).previous is None, "the first has nothing before it"
    state = completed("1.0.1", completed())
    previous = plan_of(state).previous
    assert previous is not None and previous.version == "1.0.0"
    [event] = operate(state, RollbackRollout(blueprint=NAME), T0)
    assert isinstance(event, RolloutRolledBack) and event.restored == previous
    assert plan_of(told(state, event)).previous is None
    assert plan_of(started("1.0.2", state)).previous is None, "then a rollback returns to what is stable"


def test_a_completed_rollout_is_rolled_back_only_while_it_is_the_latest() -> None:
    state = completed("1.0.1", completed())
    state = told(started("1.0.2", state))
    [event] = operate(state, RollbackRollout(blueprint=NAME), T0)
    assert isinstance(event, RolloutRolledBack)
    assert (event.rollout, event.restored and event.restored.version) == ("edge-chat-3", "1.0.1")


def test_the_first_release_cannot_be_rolled_back() -> None:
    with pytest.raises(IllegalTransition, match="there is no earlier release"):
        operate(completed(), RollbackRollout(blueprint=NAME), T0)


def test_commands_that_the_table_forbids_are_refused() -> None:
    state = completed()
    for command in (PauseRollout, ResumeRollout, AbortRollout):
        with pytest.raises(IllegalTransition, match="completed"):
            operate(state, command(blueprint=NAME), T0)


def test_the_generation_of_the_plan_is_the_version_of_the_stream() -> None:
    state, seen = applied(), [1]
    assert plan_of(state).generation == 1
    for following in (
        started(state=state),
        judged(started(state=state), PASSED),
        judged(started(state=state), PASSED, PASSED),
    ):
        seen.append(plan_of(following).generation)
    assert seen == [1, 2, 3, 4]
    assert latest(started(state=state)).generation == 2


def test_the_plan_carries_the_trace_it_was_given() -> None:
    trace = "00-" + "a" * 32 + "-" + "b" * 16 + "-01"
    assert plan_of(started(), trace).traceparent == trace


def test_a_history_replays_to_the_same_state() -> None:
    events = [*apply_blueprint(EMPTY, ApplyBlueprint(spec=blueprint()), T0)]
    state = told(EMPTY, *events)
    events += start_rollout(state, StartRollout(blueprint=NAME), [package("1.0.0")], T0)
    events += [RolloutCompleted(blueprint=NAME, rollout="edge-chat-1", reason="", at=at(1))]
    assert replay(NAME, events) == told(EMPTY, *events)
    with pytest.raises(IllegalTransition):
        replay(NAME, [*events, events[-1]])
    with pytest.raises(InternalError):
        replay(NAME, [*events[:2], RolloutCompleted(blueprint=NAME, rollout="other", reason="", at=at(1))])


def test_the_gate_of_a_rollout_is_that_of_the_revision_it_started_from() -> None:
    state = started(state=applied(gate=GatePolicy(min_requests=3)))
    state = told(state, *apply_blueprint(state, ApplyBlueprint(spec=blueprint(gate=GatePolicy(min_requests=99))), T0))
    assert state.gate_of(latest(state)).min_requests == 3
