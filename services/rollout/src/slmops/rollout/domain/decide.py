"""Decides which events follow from an operator's command or a gate's decision.

A command whose result already exists causes no event, so a retry does not act twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from slmops.contracts.commands import (
    AbortRollout,
    ApplyBlueprint,
    PauseRollout,
    ResumeRollout,
    RollbackRollout,
    StartRollout,
)
from slmops.contracts.errors import AlreadyExists, IllegalTransition, NotFound, PermanentError
from slmops.contracts.events import (
    BlueprintApplied,
    Event,
    PackagePublished,
    RolloutAborted,
    RolloutCompleted,
    RolloutHeld,
    RolloutPaused,
    RolloutResumed,
    RolloutRolledBack,
    RolloutStageAdvanced,
    RolloutStarted,
)
from slmops.contracts.plan import Release
from slmops.contracts.profile import PROFILES
from slmops.rollout.domain.blueprint import BlueprintState, Rollout
from slmops.rollout.domain.gate import GateDecision, Verdict
from slmops.rollout.domain.lifecycle import State, Trigger, next_state
from slmops.rollout.domain.soundness import check_blueprint, check_stages

OperatorCommand = PauseRollout | ResumeRollout | AbortRollout | RollbackRollout


def apply_blueprint(state: BlueprintState, command: ApplyBlueprint, now: datetime) -> list[Event]:
    """Decides `ApplyBlueprint`. Raises `NotFound` for an unknown device profile, and `InvalidBlueprint`."""
    spec = command.spec
    check_blueprint(spec)
    if spec.profile not in PROFILES:
        raise NotFound(
            f"there is no device profile named {spec.profile}", fix=f"Profiles: {', '.join(sorted(PROFILES))}."
        )
    if state.revisions and state.revisions[-1].spec == spec:
        return []
    return [BlueprintApplied(blueprint=spec.name, revision=len(state.revisions) + 1, spec=spec, at=now)]


def start_rollout(
    state: BlueprintState, command: StartRollout, packages: Sequence[PackagePublished], now: datetime
) -> list[Event]:
    """Decides `StartRollout`. `packages` are those of the blueprint's model, oldest first.

    Raises `InvalidBlueprint` (stages of the command), `NotFound` (blueprint, package), `AlreadyExists` (this candidate
    is under way), `IllegalTransition` (another one is), `PermanentError` (it is already the stable release).
    """
    revision = _applied(state)
    check_stages(state.name, command.stages)
    candidate = _release(revision, _package(revision, command.version, packages))
    _check_startable(state, candidate)
    return [
        RolloutStarted(
            blueprint=state.name,
            rollout=f"{state.name}-{len(state.rollouts) + 1}",
            candidate=candidate,
            stable=state.stable,
            stages=command.stages or revision.spec.stages,
            at=now,
        )
    ]


def operate(state: BlueprintState, command: OperatorCommand, now: datetime) -> list[Event]:
    """Decides to pause, resume, abort or roll back the latest rollout. Raises `NotFound`, `IllegalTransition`."""
    rollout = _latest(state)
    done, trigger = {
        PauseRollout: (State.PAUSED, Trigger.PAUSE),
        ResumeRollout: (State.RUNNING, Trigger.RESUME),
        AbortRollout: (State.ABORTED, Trigger.ABORT),
        RollbackRollout: (State.ROLLED_BACK, Trigger.ROLL_BACK),
    }[type(command)]
    if rollout.state is done:
        return []
    next_state(rollout.state, trigger)
    match command:
        case PauseRollout():
            return [RolloutPaused(blueprint=state.name, rollout=rollout.id, at=now)]
        case ResumeRollout():
            return [RolloutResumed(blueprint=state.name, rollout=rollout.id, at=now)]
        case AbortRollout():
            return [RolloutAborted(blueprint=state.name, rollout=rollout.id, reason=command.reason, at=now)]
        case RollbackRollout():
            return [_rolled_back(state, rollout, command.reason, now)]


def follow_gate(state: BlueprintState, rollout: Rollout, decision: GateDecision, now: datetime) -> list[Event]:
    """Returns the events that follow from the gate's decision on a running or held rollout."""
    last = rollout.stage == len(rollout.stages) - 1
    name, identity, reason = state.name, rollout.id, decision.reason
    match decision.verdict:
        case Verdict.PASSED if last:
            return [RolloutCompleted(blueprint=name, rollout=identity, reason=reason, at=now)]
        case Verdict.PASSED:
            following = rollout.stage + 1
            return [RolloutStageAdvanced(blueprint=name, rollout=identity, stage=following, reason=reason, at=now)]
        case Verdict.FAILED:
            return [_rolled_back(state, rollout, reason, now)]
        case Verdict.OVERDUE if rollout.state is State.RUNNING:
            return [RolloutHeld(blueprint=name, rollout=identity, stage=rollout.stage, reason=reason, at=now)]
    return []


def _rolled_back(state: BlueprintState, rollout: Rollout, reason: str, now: datetime) -> RolloutRolledBack:
    restored = rollout.previous if rollout.state is State.COMPLETED else state.stable
    if rollout.state is State.COMPLETED and restored is None:
        raise IllegalTransition(
            f"rollout {rollout.id} was the first of {state.name}, so there is no earlier release",
            fix="Start a rollout of another version instead.",
        )
    return RolloutRolledBack(blueprint=state.name, rollout=rollout.id, reason=reason, restored=restored, at=now)


def _applied(state: BlueprintState) -> BlueprintApplied:
    if not state.revisions:
        raise NotFound(f"there is no blueprint named {state.name}", fix="Apply it first: slmops blueprint apply FILE.")
    return state.revisions[-1]


def _latest(state: BlueprintState) -> Rollout:
    _applied(state)
    if state.latest is None:
        raise NotFound(f"blueprint {state.name} has no rollout", fix=f"Start one: slmops rollout start {state.name}.")
    return state.latest


def _package(revision: BlueprintApplied, version: str | None, packages: Sequence[PackagePublished]) -> PackagePublished:
    spec = revision.spec
    fitting = [p for p in packages if p.profile == spec.profile and version in (None, p.version)]
    if fitting:
        return fitting[-1]
    published = ", ".join(f"{p.version} for {p.profile}" for p in packages) or "nothing"
    wanted = f"{spec.model}:{version}" if version else spec.model
    raise NotFound(
        f"no package of {wanted} for profile {spec.profile} is published",
        fix=f"Published of {spec.model}: {published}.",
    )


def _release(revision: BlueprintApplied, package: PackagePublished) -> Release:
    return Release.under(
        revision.spec,
        PROFILES[revision.spec.profile],
        revision=revision.revision,
        version=package.version,
        manifest=package.manifest,
        signature=package.signature,
        size_bytes=package.size_bytes,
    )


def _check_startable(state: BlueprintState, candidate: Release) -> None:
    what = f"{candidate.model}:{candidate.version}"
    if (present := state.under_way) is not None:
        if present.candidate == candidate:
            raise AlreadyExists(
                f"{what} is already rolling out: rollout {present.id} is {present.state}",
                fix=f"Watch it: slmops rollout watch {state.name}.",
            )
        raise IllegalTransition(
            f"rollout {present.id} to {present.candidate.model}:{present.candidate.version} is still {present.state}",
            where=f"blueprint {state.name}",
            fix=f"Wait for it, or end it: slmops rollout abort {state.name}.",
        )
    if state.stable == candidate:
        raise PermanentError(
            f"{what} under revision {candidate.revision} is already the stable release of {state.name}",
            fix="Name another version, or apply a changed blueprint first.",
        )
