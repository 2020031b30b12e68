"""Builds the results of queries and commands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime

from slmops.contracts.commands import BlueprintView, GatewayProblem, GatewayView, RolloutView, StageView, Standing
from slmops.contracts.commands.rollout import MOST_ATTENTION
from slmops.contracts.events import UpdatePhase
from slmops.contracts.measurement import CohortWindow
from slmops.contracts.plan import Plan, resolve
from slmops.rollout.domain.attention import attention_of
from slmops.rollout.domain.blueprint import BlueprintState, Rollout
from slmops.rollout.domain.clocks import WrongClock, with_clocks
from slmops.rollout.domain.fleet import Member
from slmops.rollout.domain.gate import Verdict, assess, of_release, stable_windows, total
from slmops.rollout.domain.stages import Progress, RolloutProgress, Target


def blueprint_view(state: BlueprintState) -> BlueprintView:
    newest = state.revisions[-1]
    return BlueprintView(revision=newest.revision, spec=newest.spec, stable=state.stable, at=newest.at)


def rollout_view(
    state: BlueprintState,
    rollout: Rollout,
    progress: RolloutProgress,
    seen: Mapping[str, datetime],
    windows: Sequence[CohortWindow],
    now: datetime,
    clocks: Sequence[WrongClock] = (),
) -> RolloutView:
    """Returns the view of a rollout. `windows` are those of the whole rollout. The targets of a stage include those of
    the earlier stages. `seen`: when the gateways that `progress` names were last seen. `clocks`: wrong clocks of the
    blueprint's gateways."""
    waiting = _waiting(state, rollout, progress, windows, now, clocks)
    during = [window for window in windows if window.ended_at > rollout.started_at]
    return RolloutView(
        rollout=rollout.id,
        blueprint=state.name,
        state=rollout.state,
        version=rollout.candidate.version,
        model=rollout.candidate.model,
        stage=rollout.stage,
        stages=tuple(_stage_view(rollout, number, progress, waiting) for number in range(len(rollout.stages))),
        reason=rollout.reason,
        started_at=rollout.started_at,
        ended_at=rollout.ended_at,
        candidate_window=total(of_release(during, rollout.candidate.manifest.digest)),
        stable_window=total(stable_windows(rollout, during)),
        attention=tuple(_problem(rollout, target, seen) for target in targets_to_show(progress)),
    )


def gateway_view(member: Member, plan: Plan | None, now: datetime) -> GatewayView:
    """Returns the view of a gateway. `plan` is None if the gateway's blueprint has not been applied yet."""
    identity, report = member.identity, member.report
    revoked = member.standing is Standing.REVOKED
    desired = resolve(plan, (), identity) if plan and not revoked else None
    release = desired.release if desired else None
    missing = "the gateway is revoked" if revoked else f"the blueprint {identity.blueprint} has not been applied"
    unknown = {"release": missing}
    return GatewayView(
        gateway_id=identity.gateway_id,
        blueprint=identity.blueprint,
        standing=member.standing,
        enrolment=member.enrolment,
        moving_to=member.moving_to,
        revoked_at=member.revoked_at,
        revoked_because=member.revoked_because,
        reenrol_until=member.reenrol_until,
        credential_expires_at=member.credential_expires_at,
        labels=identity.labels,
        phase=report.phase if report else UpdatePhase.IDLE,
        running=report.running if report else None,
        running_version=report.running_version if report else None,
        target=report.target if report else None,
        desired=release.manifest.digest if release else None,
        desired_because=desired.explain if desired else unknown,
        problem=report.problem if report else None,
        measured=report.measured if report else {},
        plan_generation=report.plan_generation if report else 0,
        dropped_reports=report.dropped_reports if report else 0,
        dropped_measurements=report.dropped_measurements if report else 0,
        last_seen=member.seen.at if member.seen else member.enrolled_at,
        clock_ahead_s=_clock_ahead_s(member),
        attention=attention_of(member, now),
    )


def _clock_ahead_s(member: Member) -> float | None:
    if member.seen is None or member.seen.clock_ahead is None:
        return None
    return member.seen.clock_ahead.total_seconds()


def _waiting(
    state: BlueprintState,
    rollout: Rollout,
    progress: RolloutProgress,
    windows: Sequence[CohortWindow],
    now: datetime,
    clocks: Sequence[WrongClock],
) -> str:
    if not rollout.under_way:
        return ""
    decision = with_clocks(assess(state, rollout, progress, windows, now), clocks)
    return decision.reason if decision.verdict in (Verdict.WAITING, Verdict.OVERDUE) else ""


def _stage_view(rollout: Rollout, number: int, progress: RolloutProgress, waiting: str) -> StageView:
    targets = progress.targets(number)
    later = "the previous stage" if rollout.under_way and number > rollout.stage else ""
    return StageView(
        name=rollout.stages[number].name,
        targets=targets.total,
        committed=targets.committed,
        failed=targets.failed,
        waiting=waiting if number == rollout.stage else later,
    )


def targets_to_show(progress: RolloutProgress) -> list[Target]:
    """Returns the gateways to show: failed ones first, then those that wait, the earliest stages first."""
    waiting = sorted(progress.first_waiting, key=lambda target: target.place.stage)  # stable: by id within a stage
    return [*progress.first_failed, *waiting][:MOST_ATTENTION]


def _problem(rollout: Rollout, target: Target, seen: Mapping[str, datetime]) -> GatewayProblem:
    return GatewayProblem(
        gateway_id=target.gateway_id,
        stage=rollout.stages[target.place.stage].name,
        failed=target.place.progress is Progress.FAILED,
        problem=target.place.problem,
        last_seen=seen.get(target.gateway_id),
    )
