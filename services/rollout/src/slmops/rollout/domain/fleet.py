"""The fleet inventory, and how far each gateway is with a candidate."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum

from slmops.contracts.commands import Standing
from slmops.contracts.errors import Denied
from slmops.contracts.events import GatewayReported, UpdatePhase
from slmops.contracts.plan import Identity, Plan, Side, resolve
from slmops.rollout.domain.blueprint import BlueprintState, Rollout, candidate_of


@dataclass(frozen=True)
class Sighting:
    """When the newest report arrived, by our time, and how far the gateway's clock is ahead of it (None: unknown)."""

    at: datetime
    clock_ahead: timedelta | None = None

    @classmethod
    def of(cls, event: GatewayReported, arrived_at: datetime, clock_ahead: timedelta | None) -> Sighting:
        """Returns the sighting for a report. A report from the future is proof of a clock that is ahead, whether or not
        the time of its publication is known."""
        if clock_ahead is None and event.at > arrived_at:
            clock_ahead = event.at - arrived_at
        return cls(arrived_at, clock_ahead)


@dataclass(frozen=True)
class Member:
    """A gateway of the inventory. `report` is its newest report, `failure` its newest report with phase `failed`.

    The failure is kept separately because a failed gateway then reports that it is idle again.
    """

    identity: Identity
    enrolled_at: datetime
    report: GatewayReported | None = None
    failure: GatewayReported | None = None
    seen: Sighting | None = None
    standing: Standing = Standing.ENROLLED
    enrolment: int = 1
    moving_to: str | None = None
    revoked_at: datetime | None = None
    revoked_because: str = ""
    reenrol_until: datetime | None = None
    credential_expires_at: datetime | None = None
    credential_due_at: datetime | None = None


class Progress(StrEnum):
    WAITING = "waiting"
    COMMITTED = "committed"
    FAILED = "failed"


@dataclass(frozen=True)
class Target:
    """A gateway to which a stage gives the candidate. `problem` is the reason for a failure that it reported."""

    gateway_id: str
    progress: Progress
    problem: str = ""


def progress(member: Member, rollout: Rollout) -> Progress:
    """Returns a gateway's progress. Only reports on plans of this rollout count, because the same package may have
    failed or run before."""
    digest = rollout.candidate.manifest.digest
    report, failure = member.report, member.failure
    if (
        report is not None
        and report.blueprint == member.identity.blueprint  # not from before it was moved here
        and report.plan_generation >= rollout.generation
        and report.phase is UpdatePhase.COMMITTED
        and report.running == digest
        and report.target in (None, digest)
    ):
        return Progress.COMMITTED
    if failure is not None and failure.plan_generation >= rollout.generation and failure.target == digest:
        return Progress.FAILED
    return Progress.WAITING


def stage_targets(rollout: Rollout, stage: int, members: Iterable[Member]) -> list[Target]:
    """Returns the gateways that get the candidate when `stage` is open, as they resolve it from the plan."""
    return [_target(member, rollout) for member in members if _in_stage(rollout, stage, member.identity)]


def check_given(report: GatewayReported, state: BlueprintState) -> None:
    """Raises `Denied` if a report is about a candidate that the open stages do not give to its gateway.

    A report about an older plan, or about the package that every gateway has, is not about the candidate.
    """
    rollout = state.under_way
    if rollout is None or report.plan_generation < rollout.generation:
        return
    digest = rollout.candidate.manifest.digest
    known = {release.manifest.digest for release in (rollout.previous, state.stable) if release}
    identity = Identity(gateway_id=report.gateway_id, blueprint=report.blueprint, labels=report.labels)
    if report.target == digest and digest not in known and not _in_stage(rollout, rollout.stage, identity):
        raise Denied(
            f"{report.gateway_id} reports {report.phase} of {rollout.candidate.version},"
            f" which rollout {rollout.id} does not give it"
        )


def _in_stage(rollout: Rollout, stage: int, identity: Identity) -> bool:
    plan = Plan(
        blueprint=identity.blueprint,
        generation=rollout.generation,
        stable=rollout.previous,
        candidate=candidate_of(rollout, stage),
    )
    return resolve(plan, (), identity).side is Side.CANDIDATE


def _target(member: Member, rollout: Rollout) -> Target:
    reached = progress(member, rollout)
    problem = ""
    if reached is Progress.FAILED and member.failure and member.failure.problem:
        problem = str(member.failure.problem.error())
    return Target(member.identity.gateway_id, reached, problem)


def named(targets: Sequence[Target], most: int = 5) -> str:
    """Returns a text like `gw-1, gw-2 and 40 more`."""
    names = ", ".join(target.gateway_id for target in targets[:most])
    return names if len(targets) <= most else f"{names} and {len(targets) - most} more"
