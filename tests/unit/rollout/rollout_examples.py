"""A blueprint, its packages, its gateways and their measurements, for the tests of the rollout service."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Any

from slmops.contracts.blueprint import Blueprint
from slmops.contracts.commands import ApplyBlueprint, StartRollout
from slmops.contracts.descriptor import Descriptor, digest_of
from slmops.contracts.errors import Problem
from slmops.contracts.events import Event, GatewayReported, PackagePublished, UpdatePhase
from slmops.contracts.measurement import CohortWindow
from slmops.contracts.plan import Identity, Plan, Side, resolve
from slmops.rollout.domain.blueprint import BlueprintState, Rollout, candidate_of, evolve
from slmops.rollout.domain.decide import apply_blueprint, start_rollout
from slmops.rollout.domain.fleet import Member
from slmops.rollout.domain.stages import Place, Progress, RolloutProgress, Target

T0 = datetime(2030, 1, 1, tzinfo=UTC)
NAME = "edge-chat"


def at(seconds: float) -> datetime:
    return T0 + timedelta(seconds=seconds)


def digest(version: str) -> str:
    return digest_of(f"manifest {version}".encode())


def package(version: str, seconds: float = 0, profile: str = "edge-small", model: str = "smollm2") -> PackagePublished:
    return PackagePublished(
        model=model,
        version=version,
        profile=profile,
        recipe="int4",
        variant=digest_of(version.encode()),
        manifest=Descriptor.of(f"manifest {version}".encode(), "application/vnd.oci.image.manifest.v1+json"),
        signature=Descriptor.of(f"signature {version}".encode(), "application/json"),
        size_bytes=86_000_000,
        at=at(seconds),
    )


def blueprint(**changes: Any) -> Blueprint:
    return Blueprint(name=NAME, model="smollm2", **changes)


def told(state: BlueprintState, *events: Event) -> BlueprintState:
    for event in events:
        state = evolve(state, event)
    return state


def applied(**changes: Any) -> BlueprintState:
    return told(
        BlueprintState(NAME), *apply_blueprint(BlueprintState(NAME), ApplyBlueprint(spec=blueprint(**changes)), T0)
    )


def started(version: str = "1.0.0", state: BlueprintState | None = None, seconds: float = 0) -> BlueprintState:
    state = state or applied()
    command = StartRollout(blueprint=NAME, version=version)
    return told(state, *start_rollout(state, command, [package(version)], at(seconds)))


def member(gateway_id: str, ring: str = "fleet", **reports: GatewayReported | None) -> Member:
    identity = Identity(gateway_id=gateway_id, blueprint=NAME, labels={"ring": ring})
    return Member(identity=identity, enrolled_at=T0, **reports)


def report(gateway_id: str, phase: UpdatePhase, version: str, generation: int, **changes: Any) -> GatewayReported:
    """Returns a report whose phase refers to `version`. The gateway runs this version if it is committed."""
    committed = phase is UpdatePhase.COMMITTED
    values = {
        "gateway_id": gateway_id,
        "blueprint": NAME,
        "sequence": 1,
        "labels": {"ring": "canary" if gateway_id == "gw-1" else "fleet"},
        "phase": phase,
        "running": digest(version) if committed else None,
        "running_version": version if committed else None,
        "target": digest(version),
        "plan_generation": generation,
        "at": T0,
    }
    return GatewayReported(**(values | changes))


def failure(gateway_id: str, version: str, generation: int, what: str = "it talks nonsense") -> GatewayReported:
    problem = Problem(code="inference_failed", what=what)
    return report(gateway_id, UpdatePhase.FAILED, version, generation, problem=problem)


def committed(gateway_id: str, ring: str, version: str, generation: int) -> Member:
    return member(gateway_id, ring, report=report(gateway_id, UpdatePhase.COMMITTED, version, generation))


def failed(gateway_id: str, ring: str, version: str, generation: int) -> Member:
    """Returns a gateway that failed and went back to idle, as gateways do."""
    idle = report(gateway_id, UpdatePhase.IDLE, version, generation, sequence=2)
    return member(gateway_id, ring, report=idle, failure=failure(gateway_id, version, generation))


def window(version: str, seconds: float, **changes: Any) -> CohortWindow:
    """Returns a window of ten requests of 20 tokens at 50 tokens/s, unless changed."""
    values = {
        "blueprint": NAME,
        "release": digest(version),
        "version": version,
        "started_at": at(seconds),
        "ended_at": at(seconds + 5),
        "gateways": 1,
        "requests": 10,
        "failed_requests": 0,
        "golden_passed": 5,
        "completion_tokens": 200,
        "decode_seconds": 4.0,
        "ttft_seconds": 1.0,
    }
    return CohortWindow(**(values | changes))


def listed(rollout: Rollout, members: Iterable[Member]) -> RolloutProgress:
    """Returns the progress by listing the fleet: each member resolves its plan in every stage, and all are compared.

    The service keeps rows and counters instead, which must say the same.
    """
    places: dict[str, Place] = {}
    for member in sorted(members, key=lambda member: member.identity.gateway_id):
        for stage in range(len(rollout.stages)):
            plan = Plan(blueprint=NAME, generation=1, stable=rollout.previous, candidate=candidate_of(rollout, stage))
            if resolve(plan, (), member.identity).side is Side.CANDIDATE:
                places[member.identity.gateway_id] = Place(stage, *_progress(rollout, member))
                break
    counts = Counter((place.stage, place.progress) for place in places.values())
    opened = [Target(name, place) for name, place in places.items() if place.stage <= rollout.stage]
    failed = [target for target in opened if target.place.progress is Progress.FAILED]
    waiting = [target for target in opened if target.place.progress is Progress.WAITING]
    return RolloutProgress(counts, failed, waiting)


def _progress(rollout: Rollout, member: Member) -> tuple[Progress, str]:
    digest, newest, failure = rollout.candidate.manifest.digest, member.report, member.failure
    if newest and newest.plan_generation >= rollout.generation and newest.blueprint == member.identity.blueprint:
        runs = newest.phase is UpdatePhase.COMMITTED and newest.running == digest
        if runs and newest.target in (None, digest):
            return Progress.COMMITTED, ""
    if failure and failure.plan_generation >= rollout.generation and failure.target == digest:
        return Progress.FAILED, str(failure.problem.error()) if failure.problem else ""
    return Progress.WAITING, ""
