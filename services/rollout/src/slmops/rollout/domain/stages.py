"""The stages of a rollout under way: which gateways they give the candidate, and how far these are with it.

A gateway's place depends only on the rollout and on the gateway itself: its id, its labels and its own newest reports.
So the service keeps one row per gateway with its place, computes it again when something about the gateway changes, and
counts the places. Nothing that happens to one gateway costs more in a larger fleet.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from slmops.contracts.cohort import in_stage
from slmops.contracts.descriptor import Digest
from slmops.contracts.errors import Denied
from slmops.contracts.events import GatewayReported, UpdatePhase
from slmops.contracts.plan import Candidate, Identity, Plan
from slmops.rollout.domain.blueprint import BlueprintState, candidate_of

NAMED = 5
"""How many gateways a reason names."""


class Progress(StrEnum):
    WAITING = "waiting"
    COMMITTED = "committed"
    FAILED = "failed"


@dataclass(frozen=True)
class Staging:
    """What the places of gateways depend on. `generation` is that of the rollout's first plan.

    `judged`: the gate may move the rollout, which an operator has not paused.
    """

    candidate: Candidate
    stable: Digest | None
    generation: int
    judged: bool = True

    @property
    def rollout(self) -> str:
        return self.candidate.rollout

    @property
    def digest(self) -> Digest:
        return self.candidate.release.manifest.digest

    @classmethod
    def of(cls, plan: Plan, generation: int, *, judged: bool) -> Staging | None:
        """Returns the rollout that a plan describes; None if there is none under way."""
        if plan.candidate is None:
            return None
        return cls(plan.candidate, plan.stable.manifest.digest if plan.stable else None, generation, judged)


def staging_of(state: BlueprintState) -> Staging | None:
    """Returns the rollout of a blueprint that is under way."""
    rollout = state.under_way
    if rollout is None:
        return None
    stable = rollout.previous.manifest.digest if rollout.previous else None
    return Staging(candidate_of(rollout, rollout.stage), stable, rollout.generation)


@dataclass(frozen=True)
class Place:
    """The first stage that gives a gateway the candidate, and how far the gateway is with it.

    `problem` is the reason for a failure that it reported.
    """

    stage: int
    progress: Progress
    problem: str = ""


@dataclass(frozen=True)
class Target:
    """A gateway to which an open stage gives the candidate."""

    gateway_id: str
    place: Place


def first_stage(candidate: Candidate, identity: Identity) -> int | None:
    """Returns the number of the first stage in which `contracts.plan.resolve` gives the gateway the candidate.

    None if no stage does. Each stage adds gateways to those before it, so the gateway keeps it in all later ones.
    """
    for number, stage in enumerate(candidate.stages):
        if in_stage(stage, candidate.rollout, identity):
            return number
    return None


def place(
    staging: Staging, identity: Identity, report: GatewayReported | None, failure: GatewayReported | None
) -> Place | None:
    """Returns a gateway's place in a rollout; None if no stage gives it the candidate.

    `report` is its newest report, `failure` its newest one of a failure.
    """
    stage = first_stage(staging.candidate, identity)
    if stage is None:
        return None
    reached = progress(staging, identity, report, failure)
    failed = reached is Progress.FAILED and failure is not None and failure.problem is not None
    return Place(stage, reached, str(failure.problem.error()) if failed else "")  # type: ignore[union-attr]


def progress(
    staging: Staging, identity: Identity, report: GatewayReported | None, failure: GatewayReported | None
) -> Progress:
    """Returns a gateway's progress. Only reports on plans of this rollout count, because the same package may have
    failed or run before."""
    digest = staging.digest
    if (
        report is not None
        and report.blueprint == identity.blueprint  # not from before it was moved here
        and report.plan_generation >= staging.generation
        and report.phase is UpdatePhase.COMMITTED
        and report.running == digest
        and report.target in (None, digest)
    ):
        return Progress.COMMITTED
    if failure is not None and failure.plan_generation >= staging.generation and failure.target == digest:
        return Progress.FAILED
    return Progress.WAITING


def check_given(report: GatewayReported, staging: Staging) -> None:
    """Raises `Denied` if a report is about a candidate that the open stages do not give to its gateway.

    A report about an older plan, or about the package that every gateway has, is not about the candidate.
    """
    if report.plan_generation < staging.generation or report.target != staging.digest:
        return
    if staging.digest == staging.stable:
        return
    identity = Identity(gateway_id=report.gateway_id, blueprint=report.blueprint, labels=report.labels)
    stage = first_stage(staging.candidate, identity)
    if stage is None or stage > staging.candidate.stage:
        raise Denied(
            f"{report.gateway_id} reports {report.phase} of {staging.candidate.release.version},"
            f" which rollout {staging.rollout} does not give it"
        )


@dataclass(frozen=True)
class StageTargets:
    """The gateways to which a stage and all before it give the candidate: their numbers, and the first ones by id.

    `first_failed` and `first_waiting` hold the first `NAMED` at least, or all if there are fewer.
    """

    committed: int = 0
    failed: int = 0
    waiting: int = 0
    first_failed: Sequence[Target] = ()
    first_waiting: Sequence[Target] = ()

    @property
    def total(self) -> int:
        return self.committed + self.failed + self.waiting


@dataclass(frozen=True)
class RolloutProgress:
    """How far a rollout's gateways are. `counts` is the number of gateways by first stage and progress.

    `first_failed` and `first_waiting` are of the open stages. `complete`: every gateway has its place. Until then the
    counts are too small, and no gate may pass on them.
    """

    counts: Mapping[tuple[int, Progress], int]
    first_failed: Sequence[Target] = ()
    first_waiting: Sequence[Target] = ()
    complete: bool = True

    def targets(self, stage: int) -> StageTargets:
        """Returns the targets of a stage, which include those of the stages before it."""

        def total(progress: Progress) -> int:
            return sum(number for (of, reached), number in self.counts.items() if of <= stage and reached is progress)

        return StageTargets(
            total(Progress.COMMITTED),
            total(Progress.FAILED),
            total(Progress.WAITING),
            self.first_failed,
            self.first_waiting,
        )

    def added(self, stage: int) -> bool:
        """Returns whether a stage gives the candidate to gateways that did not have it before."""
        return any(number for (of, _), number in self.counts.items() if of == stage)


def named(first: Sequence[Target], total: int) -> str:
    """Returns a text like `gw-1, gw-2 and 40 more`."""
    names = ", ".join(target.gateway_id for target in first[:NAMED])
    return names if total <= NAMED else f"{names} and {total - NAMED} more"
