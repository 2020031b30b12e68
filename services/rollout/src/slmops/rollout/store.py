"""The rollout service's storage: the streams of blueprints and gateways, and read tables.

Documents are stored as JSON, with separate columns for the fields on which queries select. Times are Unix seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from functools import reduce
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

from sqlalchemy import (
    ColumnElement,
    Connection,
    Select,
    delete,
    func,
    not_,
    select,
)

from slmops.contracts.commands import ListGateways, RolloutView, Standing
from slmops.contracts.errors import CredentialRevoked, Denied
from slmops.contracts.events import (
    CohortMeasured,
    Event,
    GatewayEnrolled,
    GatewayEvent,
    GatewayReported,
    PackagePublished,
    PackageWithdrawn,
    RolloutEvent,
    UpdatePhase,
)
from slmops.contracts.measurement import CohortWindow
from slmops.contracts.plan import Identity, Plan
from slmops.kit.journal import UnitOfWork
from slmops.kit.tracing import traceparent
from slmops.rollout import membership_rows
from slmops.rollout.domain.blueprint import BlueprintState, Rollout, evolve, plan_of, replay
from slmops.rollout.domain.fleet import Member, Sighting
from slmops.rollout.domain.lifecycle import JUDGED
from slmops.rollout.domain.views import rollout_view
from slmops.rollout.report_order import counter_restarted
from slmops.rollout.tables import (
    BLUEPRINTS,
    ENDED,
    GATEWAYS,
    PACKAGES,
    SIGHTINGS,
    WINDOWS,
    WITHDRAWN,
    matches,
    put,
    time_of,
)
from slmops.rollout.tables import schema as schema

WINDOWS_KEPT = timedelta(days=7)
MIGRATIONS = Path(__file__).parent / "migrations"


class PlanRow(NamedTuple):
    """A row of the blueprints table. `judged`: a rollout is under way that the gate may move."""

    name: str
    plan: str
    judged: bool


def project(connection: Connection, event: Event) -> None:
    """Updates read tables that depend on one event only. `commit` updates those that depend on a blueprint's state."""
    if isinstance(event, GatewayEvent):
        membership_rows.project(connection, event)


# ---- blueprints -------------------------------------------------------------------------------------------


def load(unit: UnitOfWork, name: str) -> BlueprintState:
    events, _ = unit.load(stream_of(name))
    return replay(name, events)


def commit(unit: UnitOfWork, state: BlueprintState, events: Sequence[Event], now: datetime) -> BlueprintState:
    """Appends to the blueprint's stream, and updates its plan and views in the same transaction."""
    if not events:
        return state
    unit.append(stream_of(state.name), state.version, events)
    state = reduce(evolve, events, state)
    rollout, plan = state.latest, plan_of(state, traceparent())
    judged = rollout is not None and rollout.state in JUDGED
    values = {"plan": plan.model_dump_json(), "judged": judged}
    put(unit.connection, BLUEPRINTS, {"name": state.name}, values)
    if rollout and not rollout.under_way and isinstance(events[-1], RolloutEvent):
        # Store the view as of the end, because the same gateways run other releases later.
        view = _view(unit, state, rollout, now)
        put(unit.connection, ENDED, {"rollout": rollout.id}, {"view": view.model_dump_json()})
    return state


def plans(connection: Connection) -> list[PlanRow]:
    rows = connection.execute(select(BLUEPRINTS).order_by(BLUEPRINTS.c.name)).all()
    return [PlanRow(row.name, row.plan, row.judged) for row in rows]


def plan_row(connection: Connection, name: str) -> PlanRow | None:
    row = connection.execute(select(BLUEPRINTS).where(BLUEPRINTS.c.name == name)).first()
    return PlanRow(row.name, row.plan, row.judged) if row else None


def rollout_views(unit: UnitOfWork, state: BlueprintState, now: datetime) -> list[RolloutView]:
    """Returns a blueprint's rollouts, oldest first: ended ones as of their end, the one under way as of now."""
    found = [_ended_view(unit.connection, rollout.id) for rollout in state.rollouts if not rollout.under_way]
    return [*found, _view(unit, state, state.under_way, now)] if state.under_way else found


def _ended_view(connection: Connection, rollout: str) -> RolloutView:
    view = connection.execute(select(ENDED.c.view).where(ENDED.c.rollout == rollout)).scalar_one()
    return RolloutView.model_validate_json(view)


def _view(unit: UnitOfWork, state: BlueprintState, rollout: Rollout, now: datetime) -> RolloutView:
    measured = windows(unit.connection, state.name, rollout.started_at)
    return rollout_view(state, rollout, members(unit.connection, state.name), measured, now)


def stream_of(blueprint: str) -> str:
    return f"blueprint:{blueprint}"


# ---- packages ---------------------------------------------------------------------------------------------


def record_package(connection: Connection, event: PackagePublished) -> None:
    key = {"model": event.model, "version": event.version, "profile": event.profile}
    known = connection.execute(select(PACKAGES.c.at).where(*matches(PACKAGES, key))).scalar()
    if known is None or event.at.timestamp() >= known:
        put(connection, PACKAGES, key, {"at": event.at.timestamp(), "data": event.model_dump_json()})


def record_withdrawal(connection: Connection, event: PackageWithdrawn) -> None:
    """Records a withdrawal, which may arrive before the package's event."""
    put(connection, WITHDRAWN, {"manifest": event.manifest}, {"at": event.at.timestamp()})


def packages(connection: Connection, model: str) -> list[PackagePublished]:
    """Returns a model's packages for every profile, oldest first, without withdrawn ones."""
    query = select(PACKAGES.c.data).where(PACKAGES.c.model == model).order_by(PACKAGES.c.at)
    found = [PackagePublished.model_validate_json(data) for data in connection.execute(query).scalars()]
    gone = set(connection.execute(select(WITHDRAWN.c.manifest)).scalars())
    return [package for package in found if package.manifest.digest not in gone]


# ---- gateways ---------------------------------------------------------------------------------------------


def record_report(connection: Connection, event: GatewayReported, seen: Sighting) -> bool:
    """Keeps the newest report, when it arrived, and the newest failure. Newest is the highest sequence, or the first
    report after the gateway lost its counter.

    Returns False if the gateway is not enrolled here. A report that waited on the gateway since an earlier enrolment
    changes nothing.

    Raises `CredentialRevoked`, and `Denied` if the report names another blueprint than the enrolment.
    """
    key = {"gateway_id": event.gateway_id}
    # Lock the row; otherwise an older report could overwrite a newer one that another process is recording.
    row = connection.execute(select(GATEWAYS).where(*matches(GATEWAYS, key)).with_for_update()).first()
    if row is None or row.enrolled is None:
        return False
    if row.revoked_at is not None:
        raise CredentialRevoked(f"{event.gateway_id} was revoked, so its reports do not count")
    if 0 < event.enrolment < row.enrolment or _left(row, event.blueprint):
        return True
    if row.blueprint != event.blueprint:
        raise Denied(f"{event.gateway_id} is enrolled under {row.blueprint} but reports for {event.blueprint}")
    # JSON has no NaN: it would be written as null, and then the report could not be read.
    event = event.model_copy(update={"measured": {k: v for k, v in event.measured.items() if isfinite(v)}})
    values: dict[str, Any] = {}
    newest = event.sequence > row.sequence or counter_restarted(connection, event, seen, row.report)
    if newest:
        values |= {"sequence": event.sequence, "report": event.model_dump_json()}
        ahead = seen.clock_ahead.total_seconds() if seen.clock_ahead is not None else None
        put(connection, SIGHTINGS, key, {"at": seen.at.timestamp(), "clock_ahead_s": ahead})
    # A failure counts even if a later report arrived first.
    failed = event.phase is UpdatePhase.FAILED
    if failed and (newest or row.failure is None or event.sequence > _report(row.failure).sequence):
        values["failure"] = event.model_dump_json()
    if values:
        put(connection, GATEWAYS, key, values)
    return True


def _left(row: Any, blueprint: str) -> bool:
    """Returns whether the gateway's newest enrolment moved it away from this blueprint."""
    return blueprint != row.blueprint and GatewayEnrolled.model_validate_json(row.enrolled).moved_from == blueprint


def enrolled(connection: Connection) -> int:
    """Returns the number of gateways that have an enrolment, including revoked ones."""
    return connection.execute(select(func.count()).where(GATEWAYS.c.enrolled.is_not(None))).scalar_one()


def enrolments(connection: Connection, after: str, limit: int) -> list[GatewayEnrolled]:
    """Returns a page of the newest enrolments, by gateway id."""
    query = select(GATEWAYS.c.enrolled).where(GATEWAYS.c.enrolled.is_not(None), GATEWAYS.c.gateway_id > after)
    rows = connection.execute(query.order_by(GATEWAYS.c.gateway_id).limit(limit)).scalars()
    return [GatewayEnrolled.model_validate_json(row) for row in rows]


def members(connection: Connection, blueprint: str | None = None) -> list[Member]:
    """Returns the gateways that count, of one blueprint or all: neither revoked ones, nor ones that are being moved."""
    counted = (GATEWAYS.c.revoked_at.is_(None), GATEWAYS.c.moving_to.is_(None))
    query = _fleet().where(*counted)
    if blueprint is not None:
        query = query.where(GATEWAYS.c.blueprint == blueprint)
    return [_member(row) for row in connection.execute(query)]


def inventory(connection: Connection, asked: ListGateways) -> list[Member]:
    """Returns the gateways that a query asks for, including those that do not count."""
    query = _fleet()
    revoked, moving = GATEWAYS.c.revoked_at.is_not(None), GATEWAYS.c.moving_to.is_not(None)
    wanted: list[ColumnElement[bool]] = []
    match asked.standing:
        case Standing.REVOKED:
            wanted = [revoked]
        case Standing.MOVING:
            wanted = [moving, not_(revoked)]
        case Standing.ENROLLED:
            wanted = [not_(moving), not_(revoked)]
    if asked.blueprint is not None:
        wanted.append(GATEWAYS.c.blueprint == asked.blueprint)
    if asked.gateway_id is not None:
        wanted.append(GATEWAYS.c.gateway_id == asked.gateway_id)
    return [_member(row) for row in connection.execute(query.where(*wanted))]


def _fleet() -> Select[Any]:
    return (
        select(GATEWAYS, SIGHTINGS.c.at, SIGHTINGS.c.clock_ahead_s)
        .select_from(GATEWAYS.outerjoin(SIGHTINGS, GATEWAYS.c.gateway_id == SIGHTINGS.c.gateway_id))
        .where(GATEWAYS.c.enrolled.is_not(None))
        .order_by(GATEWAYS.c.gateway_id)
    )


def _member(row: Any) -> Member:
    report = _report(row.report) if row.report else None
    known = GatewayEnrolled.model_validate_json(row.enrolled)
    # A gateway resolves its plan with its own labels, so the prediction uses the newest labels that it reported.
    labels = (report.labels if report else {}) or known.labels
    return Member(
        identity=Identity(gateway_id=row.gateway_id, blueprint=row.blueprint, labels=labels),
        enrolled_at=known.at,
        report=report,
        failure=_report(row.failure) if row.failure else None,
        seen=_sighting(row) if row.at is not None else None,
        standing=_standing(row),
        enrolment=row.enrolment,
        moving_to=row.moving_to,
        revoked_at=time_of(row.revoked_at),
        revoked_because=row.revoked_because or "",
        reenrol_until=time_of(row.reenrol_until),
        credential_expires_at=time_of(row.expires_at),
    )


def _standing(row: Any) -> Standing:
    if row.revoked_at is not None:
        return Standing.REVOKED
    return Standing.ENROLLED if row.moving_to is None else Standing.MOVING


def _sighting(row: Any) -> Sighting:
    ahead = timedelta(seconds=row.clock_ahead_s) if row.clock_ahead_s is not None else None
    return Sighting(datetime.fromtimestamp(row.at, UTC), ahead)


def _report(data: str) -> GatewayReported:
    return GatewayReported.model_validate_json(data)


# ---- measured windows -------------------------------------------------------------------------------------


def record_window(connection: Connection, identity: str, event: CohortMeasured) -> None:
    """Stores a measured window. `identity` is the event's id; the same event is stored once."""
    ended = event.window.ended_at.timestamp()
    values = {"blueprint": event.blueprint, "ended_at": ended, "data": event.window.model_dump_json()}
    put(connection, WINDOWS, {"id": identity}, values)
    outdated = ended - WINDOWS_KEPT.total_seconds()
    connection.execute(delete(WINDOWS).where(WINDOWS.c.blueprint == event.blueprint, WINDOWS.c.ended_at < outdated))


def windows(connection: Connection, blueprint: str, since: datetime) -> list[CohortWindow]:
    """Returns the windows of every release that ended after `since`."""
    query = select(WINDOWS.c.data).where(WINDOWS.c.blueprint == blueprint, WINDOWS.c.ended_at > since.timestamp())
    return [CohortWindow.model_validate_json(data) for data in connection.execute(query).scalars()]


def plan_in(row: PlanRow | None) -> Plan | None:
    return Plan.model_validate_json(row.plan) if row else None
