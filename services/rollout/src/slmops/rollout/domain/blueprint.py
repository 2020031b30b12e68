"""The state of a blueprint, computed from its stream: revisions, the stable release, and its rollouts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import datetime
from functools import reduce
from typing import Any, Final

from slmops.contracts.blueprint import GatePolicy, Stage
from slmops.contracts.errors import InternalError
from slmops.contracts.events import (
    BlueprintApplied,
    Event,
    RolloutAborted,
    RolloutCompleted,
    RolloutEvent,
    RolloutHeld,
    RolloutPaused,
    RolloutResumed,
    RolloutRolledBack,
    RolloutStageAdvanced,
    RolloutStarted,
)
from slmops.contracts.plan import Candidate, Plan, Release
from slmops.rollout.domain.lifecycle import UNDER_WAY, State, Trigger, next_state

TRIGGERS: Final[dict[type[RolloutEvent], Trigger]] = {
    RolloutStageAdvanced: Trigger.ADVANCE,
    RolloutHeld: Trigger.HOLD,
    RolloutPaused: Trigger.PAUSE,
    RolloutResumed: Trigger.RESUME,
    RolloutCompleted: Trigger.COMPLETE,
    RolloutAborted: Trigger.ABORT,
    RolloutRolledBack: Trigger.ROLL_BACK,
}


@dataclass(frozen=True)
class Rollout:
    """A rollout. `generation` is that of the first plan with this candidate; reports on older plans do not count.

    The gate's deadline starts at `judged_since`; measurements count from `stage_started_at`.
    """

    id: str
    candidate: Release
    previous: Release | None
    stages: tuple[Stage, ...]
    generation: int
    started_at: datetime
    stage_started_at: datetime
    judged_since: datetime
    state: State = State.RUNNING
    stage: int = 0
    reason: str = ""
    ended_at: datetime | None = None

    @property
    def under_way(self) -> bool:
        return self.state in UNDER_WAY


@dataclass(frozen=True)
class BlueprintState:
    """The state of a blueprint. `version` is the number of events in its stream; 0: the blueprint does not exist."""

    name: str
    version: int = 0
    revisions: tuple[BlueprintApplied, ...] = ()
    stable: Release | None = None
    rollouts: tuple[Rollout, ...] = ()

    @property
    def latest(self) -> Rollout | None:
        return self.rollouts[-1] if self.rollouts else None

    @property
    def under_way(self) -> Rollout | None:
        return self.latest if self.latest and self.latest.under_way else None

    def gate_of(self, rollout: Rollout) -> GatePolicy:
        """Returns the policy of the rollout's revision. A later revision does not change a rollout under way."""
        return self.revisions[rollout.candidate.revision - 1].spec.gate


def replay(name: str, events: Iterable[Event]) -> BlueprintState:
    return reduce(evolve, events, BlueprintState(name))


def evolve(state: BlueprintState, event: Event) -> BlueprintState:
    """Returns the state after `event`. Raises `IllegalTransition` or `InternalError` for an impossible history."""
    state = replace(state, version=state.version + 1)
    match event:
        case BlueprintApplied():
            return replace(state, revisions=(*state.revisions, event))
        case RolloutStarted():
            return replace(state, rollouts=(*state.rollouts, _started(event, state.version)))
        case RolloutEvent():
            return _moved(state, event)
    raise InternalError(f"the stream of blueprint {state.name} contains an unexpected {event.type}")


def plan_of(state: BlueprintState, traceparent: str | None = None) -> Plan:
    """Returns what the gateways of this blueprint should run now. The state must have at least one event."""
    rollout = state.under_way
    return Plan(
        blueprint=state.name,
        generation=state.version,
        stable=state.stable,
        candidate=candidate_of(rollout, rollout.stage) if rollout else None,
        previous=state.latest.previous if state.latest and state.latest.state is State.COMPLETED else None,
        traceparent=traceparent,
    )


def candidate_of(rollout: Rollout, stage: int) -> Candidate:
    return Candidate(rollout=rollout.id, release=rollout.candidate, stages=rollout.stages, stage=stage)


def _started(event: RolloutStarted, version: int) -> Rollout:
    return Rollout(
        id=event.rollout,
        candidate=event.candidate,
        previous=event.stable,
        stages=event.stages,
        generation=version,
        started_at=event.at,
        stage_started_at=event.at,
        judged_since=event.at,
    )


def _moved(state: BlueprintState, event: RolloutEvent) -> BlueprintState:
    rollout = state.latest
    if rollout is None or rollout.id != event.rollout:
        raise InternalError(f"{event.type} names rollout {event.rollout}, which is not the latest of {state.name}")
    changes: dict[str, Any] = {"state": next_state(rollout.state, TRIGGERS[type(event)])}
    stable = state.stable
    match event:
        case RolloutStageAdvanced():
            changes |= {"stage": event.stage, "stage_started_at": event.at, "judged_since": event.at}
        case RolloutResumed():
            changes |= {"judged_since": event.at}
        case RolloutCompleted():
            changes |= {"ended_at": event.at}
            stable = rollout.candidate
        case RolloutAborted():
            changes |= {"ended_at": event.at}
        case RolloutRolledBack():
            changes |= {"ended_at": event.at}
            stable = event.restored
    changes["reason"] = getattr(event, "reason", "")
    return replace(state, stable=stable, rollouts=(*state.rollouts[:-1], replace(rollout, **changes)))
