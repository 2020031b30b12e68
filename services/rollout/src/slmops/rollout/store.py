"""The rollout service's storage: the streams of blueprints and gateways, and read tables.

Documents are stored as JSON, with separate columns for the fields on which queries select. Times are Unix seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

from sqlalchemy import Connection, delete, func, select, tuple_

from slmops.contracts.commands import RolloutView
from slmops.contracts.commands.rollout import MOST_ATTENTION
from slmops.contracts.events import (
    CohortMeasured,
    Event,
    GatewayEnrolled,
    GatewayEvent,
    PackagePublished,
    PackageWithdrawn,
    RolloutEvent,
    RolloutStarted,
)
from slmops.contracts.measurement import CohortWindow
from slmops.contracts.plan import Plan
from slmops.kit.journal import UnitOfWork, put
from slmops.kit.tracing import traceparent
from slmops.rollout import membership_rows, presence_rows, progress_rows
from slmops.rollout.domain.blueprint import BlueprintState, Rollout, evolve, plan_of, replay
from slmops.rollout.domain.lifecycle import JUDGED
from slmops.rollout.domain.views import rollout_view, targets_to_show
from slmops.rollout.tables import (
    BLUEPRINTS,
    ENDED,
    GATEWAYS,
    PACKAGES,
    WINDOWS,
    WITHDRAWN,
    matches,
)
from slmops.rollout.tables import schema as schema

WINDOWS_KEPT = timedelta(days=7)
MIGRATIONS = Path(__file__).parent / "migrations"


class PlanRow(NamedTuple):
    """A row of the blueprints table. `judged`: a rollout is under way that the gate may move.

    `generation` is that of the first plan of the rollout under way, None if there is none. `filled`: all its gateways
    have their places.
    """

    name: str
    plan: str
    judged: bool
    generation: int | None = None
    filled: bool = True


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
    generation = state.under_way.generation if state.under_way else None
    profile = state.revisions[-1].spec.profile if state.revisions else None
    values = {"plan": plan.model_dump_json(), "judged": judged, "generation": generation, "profile": profile}
    put(unit.connection, BLUEPRINTS, {"name": state.name}, values)
    if any(isinstance(event, RolloutStarted) for event in events):
        progress_rows.begin(unit.connection, state.name)
    if rollout and not rollout.under_way and isinstance(events[-1], RolloutEvent):
        # Store the view as of the end, because the same gateways run other releases later.
        view = _view(unit, state, rollout, now)
        values = {"view": view.model_dump_json(), "blueprint": state.name, "started_at": view.started_at.timestamp()}
        put(unit.connection, ENDED, {"rollout": rollout.id}, values)
    return state


def plans(connection: Connection) -> list[PlanRow]:
    rows = connection.execute(select(BLUEPRINTS).order_by(BLUEPRINTS.c.name)).all()
    return [_plan_row(row) for row in rows]


def profiles(connection: Connection) -> dict[str, str]:
    """Returns the profile of each blueprint's newest revision."""
    rows = connection.execute(select(BLUEPRINTS.c.name, BLUEPRINTS.c.profile).where(BLUEPRINTS.c.profile.is_not(None)))
    return {row.name: row.profile for row in rows}


def plan_row(connection: Connection, name: str) -> PlanRow | None:
    row = connection.execute(select(BLUEPRINTS).where(BLUEPRINTS.c.name == name)).first()
    return _plan_row(row) if row else None


def _plan_row(row: Any) -> PlanRow:
    return PlanRow(row.name, row.plan, row.judged, row.generation, row.filled_to is None)


def count_places(unit: UnitOfWork) -> None:
    """Prepares the rollouts under way at the start of the service: begins to fill the places of those that an earlier
    release started, and counts those of the others again."""
    for row in plans(unit.connection):
        state = load(unit, row.name)
        if begin_if_unknown(unit, state) or state.under_way is None:
            continue
        progress_rows.recount(unit.connection, row.name)


def begin_if_unknown(unit: UnitOfWork, state: BlueprintState) -> bool:
    """Begins to fill the places of a rollout under way if a process of an earlier release started it."""
    row, rollout = plan_row(unit.connection, state.name), state.under_way
    if rollout is None or row is None or row.generation == rollout.generation:
        return False
    put(unit.connection, BLUEPRINTS, {"name": state.name}, {"generation": rollout.generation})
    progress_rows.begin(unit.connection, state.name)
    return True


def blueprint_names(connection: Connection, after: str, limit: int) -> list[str]:
    """Returns a page of the names of blueprints."""
    query = select(BLUEPRINTS.c.name).where(BLUEPRINTS.c.name > after).order_by(BLUEPRINTS.c.name).limit(limit)
    return list(connection.execute(query).scalars())


def views_under_way(unit: UnitOfWork, blueprint: str | None, now: datetime) -> list[RolloutView]:
    """Returns the rollouts under way, as of now: at most one for each blueprint. Growth: reads the plans of all."""
    rows = [row for row in plans(unit.connection) if blueprint in (None, row.name)]
    states = [load(unit, row.name) for row in rows if (plan := plan_in(row)) is not None and plan.candidate is not None]
    return [_view(unit, state, state.under_way, now) for state in states if state.under_way is not None]


def ended_views(
    connection: Connection, blueprint: str | None, before: tuple[str | float, ...] | None, limit: int
) -> list[RolloutView]:
    """Returns a page of the rollouts that ended, as of their end, newest first. Growth: `limit` rows of an index."""
    started = tuple_(ENDED.c.started_at, ENDED.c.rollout)
    query = select(ENDED.c.view).order_by(ENDED.c.started_at.desc(), ENDED.c.rollout.desc()).limit(limit)
    if blueprint is not None:
        query = query.where(ENDED.c.blueprint == blueprint)
    if before is not None:
        query = query.where(started < tuple_(*before))
    return [RolloutView.model_validate_json(view) for view in connection.execute(query).scalars()]


def latest_view(unit: UnitOfWork, state: BlueprintState, now: datetime) -> RolloutView:
    """Returns a blueprint's latest rollout: as of now if it is under way, otherwise as of its end."""
    assert state.latest is not None, "whoever asks has just changed it"
    return _view(unit, state, state.latest, now) if state.under_way else _ended_view(unit.connection, state.latest.id)


def _ended_view(connection: Connection, rollout: str) -> RolloutView:
    view = connection.execute(select(ENDED.c.view).where(ENDED.c.rollout == rollout)).scalar_one()
    return RolloutView.model_validate_json(view)


def _view(unit: UnitOfWork, state: BlueprintState, rollout: Rollout, now: datetime) -> RolloutView:
    connection, row = unit.connection, plan_row(unit.connection, state.name)
    filled = row is None or row.filled or not rollout.under_way
    progress = progress_rows.progress_of(connection, rollout.id, rollout.stage, MOST_ATTENTION, complete=filled)
    seen = progress_rows.seen(connection, targets_to_show(progress))
    measured = windows(connection, state.name, rollout.started_at)
    clocks = presence_rows.wrong_clocks(connection, now, state.name) if rollout.under_way else []
    return rollout_view(state, rollout, progress, seen, measured, now, clocks)


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


def enrolled(connection: Connection) -> int:
    """Returns the number of gateways that have an enrolment, including revoked ones."""
    return connection.execute(select(func.count()).where(GATEWAYS.c.enrolled.is_not(None))).scalar_one()


def enrolments(connection: Connection, after: str, limit: int) -> list[GatewayEnrolled]:
    """Returns a page of the newest enrolments, by gateway id."""
    query = select(GATEWAYS.c.enrolled).where(GATEWAYS.c.enrolled.is_not(None), GATEWAYS.c.gateway_id > after)
    rows = connection.execute(query.order_by(GATEWAYS.c.gateway_id).limit(limit)).scalars()
    return [GatewayEnrolled.model_validate_json(row) for row in rows]


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
