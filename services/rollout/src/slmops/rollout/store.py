"""The rollout service's storage: the streams of blueprints and gateways, and read tables.

Documents are stored as JSON, with separate columns for the fields on which queries select. Times are Unix seconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from functools import reduce
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Connection,
    Double,
    Index,
    MetaData,
    String,
    Table,
    Text,
    delete,
    func,
    insert,
    select,
    update,
)

from slmops.contracts.commands import RolloutView
from slmops.contracts.errors import Denied
from slmops.contracts.events import (
    CohortMeasured,
    Event,
    GatewayEnrolled,
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
from slmops.rollout.domain.blueprint import BlueprintState, Rollout, evolve, plan_of, replay
from slmops.rollout.domain.fleet import Member, Sighting
from slmops.rollout.domain.lifecycle import JUDGED
from slmops.rollout.domain.views import rollout_view

WINDOWS_KEPT = timedelta(days=7)
MIGRATIONS = Path(__file__).parent / "migrations"
_TABLES = MetaData()

_packages = Table(
    "packages",
    _TABLES,
    Column("model", String(63), primary_key=True),
    Column("version", String(64), primary_key=True),
    Column("profile", String(63), primary_key=True),
    Column("at", Double, nullable=False),
    Column("data", Text, nullable=False),
)
_withdrawn = Table(
    "withdrawn",
    _TABLES,
    Column("manifest", String(80), primary_key=True),
    Column("at", Double, nullable=False),
)
_gateways = Table(
    "gateways",
    _TABLES,
    Column("gateway_id", String(63), primary_key=True),
    Column("blueprint", String(63), nullable=False, index=True),
    Column("enrolled", Text),
    Column("sequence", BigInteger, nullable=False, default=0),
    Column("report", Text),
    Column("failure", Text),
)
_sightings = Table(
    "sightings",
    _TABLES,
    Column("gateway_id", String(63), primary_key=True),
    Column("at", Double, nullable=False),
    Column("clock_ahead_s", Double),
)
_windows = Table(
    "windows",
    _TABLES,
    Column("id", String(64), primary_key=True),
    Column("blueprint", String(63), nullable=False),
    Column("ended_at", Double, nullable=False),
    Column("data", Text, nullable=False),
    Index("windows_by_time", "blueprint", "ended_at"),
)
_blueprints = Table(
    "blueprints",
    _TABLES,
    Column("name", String(63), primary_key=True),
    Column("plan", Text, nullable=False),
    Column("judged", Boolean, nullable=False),
)
_ended = Table(
    "ended_rollouts", _TABLES, Column("rollout", String(80), primary_key=True), Column("view", Text, nullable=False)
)


class PlanRow(NamedTuple):
    """A row of the blueprints table. `judged`: a rollout is under way that the gate may move."""

    name: str
    plan: str
    judged: bool


def schema() -> MetaData:
    """Returns a copy of the tables for one journal, which adds its own tables. `MIGRATIONS` lead to these tables."""
    own = MetaData()
    for table in _TABLES.tables.values():
        table.to_metadata(own)
    return own


def project(connection: Connection, event: Event) -> None:
    """Updates read tables that depend on one event only. `commit` updates those that depend on a blueprint's state."""
    if isinstance(event, GatewayEnrolled):
        values = {"blueprint": event.blueprint, "enrolled": event.model_dump_json()}
        _put(connection, _gateways, {"gateway_id": event.gateway_id}, values)


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
    _put(unit.connection, _blueprints, {"name": state.name}, values)
    if rollout and not rollout.under_way and isinstance(events[-1], RolloutEvent):
        # Store the view as of the end, because the same gateways run other releases later.
        view = _view(unit, state, rollout, now)
        _put(unit.connection, _ended, {"rollout": rollout.id}, {"view": view.model_dump_json()})
    return state


def plans(connection: Connection) -> list[PlanRow]:
    rows = connection.execute(select(_blueprints).order_by(_blueprints.c.name)).all()
    return [PlanRow(row.name, row.plan, row.judged) for row in rows]


def plan_row(connection: Connection, name: str) -> PlanRow | None:
    row = connection.execute(select(_blueprints).where(_blueprints.c.name == name)).first()
    return PlanRow(row.name, row.plan, row.judged) if row else None


def rollout_views(unit: UnitOfWork, state: BlueprintState, now: datetime) -> list[RolloutView]:
    """Returns a blueprint's rollouts, oldest first: ended ones as of their end, the one under way as of now."""
    found = [_ended_view(unit.connection, rollout.id) for rollout in state.rollouts if not rollout.under_way]
    return [*found, _view(unit, state, state.under_way, now)] if state.under_way else found


def _ended_view(connection: Connection, rollout: str) -> RolloutView:
    view = connection.execute(select(_ended.c.view).where(_ended.c.rollout == rollout)).scalar_one()
    return RolloutView.model_validate_json(view)


def _view(unit: UnitOfWork, state: BlueprintState, rollout: Rollout, now: datetime) -> RolloutView:
    measured = windows(unit.connection, state.name, rollout.started_at)
    return rollout_view(state, rollout, members(unit.connection, state.name), measured, now)


def stream_of(blueprint: str) -> str:
    return f"blueprint:{blueprint}"


# ---- packages ---------------------------------------------------------------------------------------------


def record_package(connection: Connection, event: PackagePublished) -> None:
    key = {"model": event.model, "version": event.version, "profile": event.profile}
    known = connection.execute(select(_packages.c.at).where(*_matches(_packages, key))).scalar()
    if known is None or event.at.timestamp() >= known:
        _put(connection, _packages, key, {"at": event.at.timestamp(), "data": event.model_dump_json()})


def record_withdrawal(connection: Connection, event: PackageWithdrawn) -> None:
    """Records a withdrawal, which may arrive before the package's event."""
    _put(connection, _withdrawn, {"manifest": event.manifest}, {"at": event.at.timestamp()})


def packages(connection: Connection, model: str) -> list[PackagePublished]:
    """Returns a model's packages for every profile, oldest first, without withdrawn ones."""
    query = select(_packages.c.data).where(_packages.c.model == model).order_by(_packages.c.at)
    found = [PackagePublished.model_validate_json(data) for data in connection.execute(query).scalars()]
    gone = set(connection.execute(select(_withdrawn.c.manifest)).scalars())
    return [package for package in found if package.manifest.digest not in gone]


# ---- gateways ---------------------------------------------------------------------------------------------


def record_report(connection: Connection, event: GatewayReported, seen: Sighting) -> bool:
    """Keeps the newest report, when it arrived, and the newest failure. Newest is the highest sequence.

    Returns False if the gateway is not enrolled here.

    Raises `Denied` if the report names another blueprint than the enrolment.
    """
    key = {"gateway_id": event.gateway_id}
    # Lock the row; otherwise an older report could overwrite a newer one that another process is recording.
    row = connection.execute(select(_gateways).where(*_matches(_gateways, key)).with_for_update()).first()
    if row is None or row.enrolled is None:
        return False
    if row.blueprint != event.blueprint:
        raise Denied(f"{event.gateway_id} is enrolled under {row.blueprint} but reports for {event.blueprint}")
    # JSON has no NaN: it would be written as null, and then the report could not be read.
    event = event.model_copy(update={"measured": {k: v for k, v in event.measured.items() if isfinite(v)}})
    values: dict[str, Any] = {}
    if event.sequence > row.sequence:
        values |= {"sequence": event.sequence, "report": event.model_dump_json()}
        ahead = seen.clock_ahead.total_seconds() if seen.clock_ahead is not None else None
        _put(connection, _sightings, key, {"at": seen.at.timestamp(), "clock_ahead_s": ahead})
    # A failure counts even if a later report arrived first.
    failed = event.phase is UpdatePhase.FAILED
    if failed and (row.failure is None or event.sequence > _report(row.failure).sequence):
        values["failure"] = event.model_dump_json()
    if values:
        _put(connection, _gateways, key, values)
    return True


def enrolled(connection: Connection) -> int:
    """Returns the number of enrolled gateways."""
    return connection.execute(select(func.count()).where(_gateways.c.enrolled.is_not(None))).scalar_one()


def members(connection: Connection, blueprint: str | None = None, gateway_id: str | None = None) -> list[Member]:
    """Returns enrolled gateways: those of one blueprint, one gateway, or all."""
    query = (
        select(_gateways, _sightings.c.at, _sightings.c.clock_ahead_s)
        .select_from(_gateways.outerjoin(_sightings, _gateways.c.gateway_id == _sightings.c.gateway_id))
        .where(_gateways.c.enrolled.is_not(None))
        .order_by(_gateways.c.gateway_id)
    )
    if blueprint is not None:
        query = query.where(_gateways.c.blueprint == blueprint)
    if gateway_id is not None:
        query = query.where(_gateways.c.gateway_id == gateway_id)
    return [_member(row) for row in connection.execute(query)]


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
    )


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
    _put(connection, _windows, {"id": identity}, values)
    outdated = ended - WINDOWS_KEPT.total_seconds()
    connection.execute(delete(_windows).where(_windows.c.blueprint == event.blueprint, _windows.c.ended_at < outdated))


def windows(connection: Connection, blueprint: str, since: datetime) -> list[CohortWindow]:
    """Returns the windows of every release that ended after `since`."""
    query = select(_windows.c.data).where(_windows.c.blueprint == blueprint, _windows.c.ended_at > since.timestamp())
    return [CohortWindow.model_validate_json(data) for data in connection.execute(query).scalars()]


def _matches(table: Table, key: dict[str, str]) -> Iterable[Any]:
    return [table.c[column] == value for column, value in key.items()]


def _put(connection: Connection, table: Table, key: dict[str, str], values: dict[str, Any]) -> None:
    """Updates the row or inserts it, with statements that every database supports."""
    if connection.execute(update(table).where(*_matches(table, key)).values(**values)).rowcount == 0:
        connection.execute(insert(table).values(**key, **values))


def plan_in(row: PlanRow | None) -> Plan | None:
    return Plan.model_validate_json(row.plan) if row else None
