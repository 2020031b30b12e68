"""The places of gateways in the rollouts under way, and their numbers, as rows of the database.

Whatever changes something about a gateway calls `refresh` or `update_places` in the same transaction, which compute its
place again, change its row and correct the counters. So a report costs the same in every fleet, and a judgement reads
counters. All writers of the database take turns (`kit.journal`), so the counters are never wrong by a lost race.

When a rollout starts, its places are filled page by page, in order of the gateways' ids, so that no transaction is long
however many gateways there are. How far that is stands in the blueprint's row: after a crash, or beside another
process, filling goes on there. Meanwhile a gateway that enrols or reports gets its place at once, and keeps it when its
page is filled, because a place depends on nothing else. Growth: O(gateways of the blueprint) for each rollout.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

from sqlalchemy import Connection, bindparam, delete, func, select, union_all, update

from slmops.contracts.events import GatewayEnrolled, GatewayReported
from slmops.contracts.plan import Identity, Plan
from slmops.rollout.domain.stages import Place, Progress, RolloutProgress, Staging, Target, place
from slmops.rollout.tables import (
    BLUEPRINTS,
    COUNTS,
    GATEWAYS,
    MEMBERS,
    NOT_COMMITTED,
    SIGHTINGS,
    add_all,
    change_all,
)

log = logging.getLogger("slmops.rollout")
PAGE = 1000
"""Gateways that get their places in one transaction: about 0.1 s."""
_NAMED_STAGES = 50


class Located(NamedTuple):
    """What a gateway's place depends on. `blueprint` None: it counts nowhere, because it was revoked, is being moved or
    was removed."""

    gateway_id: str
    blueprint: str | None
    labels: dict[str, str]
    report: GatewayReported | None
    failure: GatewayReported | None


def stagings(connection: Connection, blueprints: Collection[str]) -> dict[str, Staging]:
    """Returns the rollouts under way of these blueprints, with one statement."""
    query = select(BLUEPRINTS).where(BLUEPRINTS.c.name.in_(blueprints), BLUEPRINTS.c.generation.is_not(None))
    found = {}
    for row in connection.execute(query):
        staging = Staging.of(Plan.model_validate_json(row.plan), row.generation, judged=row.judged)
        if staging is not None:
            found[row.name] = staging
    return found


# ---- changes ----------------------------------------------------------------------------------------------


def refresh(connection: Connection, gateway_ids: Sequence[str]) -> set[str]:
    """Computes gateways' places from their rows; returns the blueprints whose rollout's progress this changed."""
    known = {row.gateway_id: row for row in connection.execute(_rows().where(GATEWAYS.c.gateway_id.in_(gateway_ids)))}
    gone = [Located(name, None, {}, None, None) for name in gateway_ids if name not in known]
    return update_places(connection, [*map(located, known.values()), *gone])


def update_places(connection: Connection, gateways: Sequence[Located]) -> set[str]:
    """Stores gateways' places; returns the blueprints whose rollout's progress this changed.

    Growth: at most six statements, whatever the number of gateways and the size of the fleet.
    """
    if not gateways:
        return set()
    by_id = {gateway.gateway_id: gateway for gateway in gateways}
    before = {row.gateway_id: row for row in connection.execute(select(MEMBERS).where(MEMBERS.c.gateway_id.in_(by_id)))}
    names = {gateway.blueprint for gateway in gateways if gateway.blueprint} | {
        row.blueprint for row in before.values()
    }
    under_way = stagings(connection, names)
    wanted = {name: _wanted(gateway, under_way) for name, gateway in by_id.items()}
    return _store(connection, before, wanted, {staging.rollout for staging in under_way.values()})


def _wanted(gateway: Located, under_way: Mapping[str, Staging]) -> dict[str, Any] | None:
    staging = under_way.get(gateway.blueprint) if gateway.blueprint else None
    if staging is None or gateway.blueprint is None:
        return None
    identity = Identity(gateway_id=gateway.gateway_id, blueprint=gateway.blueprint, labels=gateway.labels)
    found = place(staging, identity, gateway.report, gateway.failure)
    if found is None:
        return None
    return {
        "gateway_id": gateway.gateway_id,
        "blueprint": gateway.blueprint,
        "rollout": staging.rollout,
        "stage": found.stage,
        "progress": found.progress.value,
        "problem": found.problem,
    }


def _store(
    connection: Connection,
    before: Mapping[str, Any],
    wanted: Mapping[str, dict[str, Any] | None],
    under_way: Collection[str],
) -> set[str]:
    """Stores the rows that differ, and corrects the counters of rollouts under way. Those of ended ones stay."""
    added, changed, gone, blueprints = [], [], [], set()
    numbers: Counter[tuple[str, int, str]] = Counter()
    for gateway_id, new in wanted.items():
        old = before.get(gateway_id)
        if new is None:
            if old is None or old.rollout not in under_way:
                continue
            gone.append(gateway_id)
        elif old is None:
            added.append(new)
        elif old._asdict() == new:
            continue
        else:
            changed.append(new)
        for row, one in ((old._asdict() if old is not None else None, -1), (new, 1)):
            if row is not None and row["rollout"] in under_way:
                numbers[row["rollout"], row["stage"], row["progress"]] += one
                blueprints.add(row["blueprint"])
    add_all(connection, MEMBERS, added)
    change_all(connection, MEMBERS, "gateway_id", changed)
    if gone:
        connection.execute(delete(MEMBERS).where(MEMBERS.c.gateway_id.in_(gone)))
    _count(connection, numbers)
    return blueprints


def _count(connection: Connection, numbers: Mapping[tuple[str, int, str], int]) -> None:
    rows = [
        {"of": rollout, "number": stage, "reached": progress, "more": more}
        for (rollout, stage, progress), more in numbers.items()
        if more
    ]
    if rows:
        statement = (
            update(COUNTS)
            .where(
                COUNTS.c.rollout == bindparam("of"),
                COUNTS.c.stage == bindparam("number"),
                COUNTS.c.progress == bindparam("reached"),
            )
            .values(gateways=COUNTS.c.gateways + bindparam("more"))
        )
        connection.execute(statement, rows)


def _rows() -> Any:
    return select(GATEWAYS).where(GATEWAYS.c.enrolled.is_not(None))


def located(row: Any) -> Located:
    """Returns what the place of a gateway depends on, from its row."""
    if row.revoked_at is not None or row.moving_to is not None:
        return Located(row.gateway_id, None, {}, None, None)
    report = GatewayReported.model_validate_json(row.report) if row.report else None
    failure = GatewayReported.model_validate_json(row.failure) if row.failure else None
    return Located(row.gateway_id, row.blueprint, labels_of(report, row.enrolled), report, failure)


def labels_of(report: GatewayReported | None, enrolled: str) -> dict[str, str]:
    """Returns the newest labels that a gateway reported, by which it resolves its plan; else those of its enrolment."""
    return (report.labels if report else {}) or GatewayEnrolled.model_validate_json(enrolled).labels


# ---- filling ----------------------------------------------------------------------------------------------


def begin(connection: Connection, blueprint: str) -> None:
    """Begins to fill the places of a rollout that has just started, with the first page."""
    staging = stagings(connection, [blueprint])[blueprint]
    connection.execute(delete(COUNTS).where(COUNTS.c.blueprint == blueprint))
    # One counter for each stage and progress, so that later changes only update them.
    numbers = range(len(staging.candidate.stages))
    key = {"rollout": staging.rollout, "blueprint": blueprint, "gateways": 0}
    add_all(connection, COUNTS, [key | {"stage": n, "progress": p.value} for n in numbers for p in Progress])
    connection.execute(update(BLUEPRINTS).where(BLUEPRINTS.c.name == blueprint).values(filled_to=""))
    fill_page(connection, blueprint)


def fill_page(connection: Connection, blueprint: str) -> bool:
    """Gives the next `PAGE` gateways their places; returns whether there may be more of them."""
    query = select(BLUEPRINTS.c.filled_to).where(BLUEPRINTS.c.name == blueprint, BLUEPRINTS.c.generation.is_not(None))
    after = connection.execute(query).scalar()
    if after is None:
        return False
    here = (GATEWAYS.c.blueprint == blueprint, GATEWAYS.c.gateway_id > after)
    page = connection.execute(_rows().where(*here).order_by(GATEWAYS.c.gateway_id).limit(PAGE)).all()
    update_places(connection, [located(row) for row in page])
    more = len(page) == PAGE
    to = page[-1].gateway_id if more else None
    connection.execute(update(BLUEPRINTS).where(BLUEPRINTS.c.name == blueprint).values(filled_to=to))
    return more


def unfilled(connection: Connection) -> list[str]:
    """Returns the blueprints with a rollout whose places are not filled yet."""
    query = select(BLUEPRINTS.c.name).where(BLUEPRINTS.c.generation.is_not(None), BLUEPRINTS.c.filled_to.is_not(None))
    return list(connection.execute(query).scalars())


def recount(connection: Connection, blueprint: str) -> None:
    """Counts the rows of the rollout under way again. Growth: O(gateways); only at the start of the service."""
    staging = stagings(connection, [blueprint])[blueprint]
    query = select(MEMBERS.c.stage, MEMBERS.c.progress, func.count()).where(MEMBERS.c.rollout == staging.rollout)
    rows = connection.execute(query.group_by(MEMBERS.c.stage, MEMBERS.c.progress))
    counted = Counter({(stage, Progress(progress)): number for stage, progress, number in rows})
    counters = _counts(connection, staging.rollout)
    wrong = {key: counted[key] - counters.get(key, 0) for key in {*counted, *counters}}
    if any(wrong.values()):
        log.error("the counters of rollout %s were wrong by %s; corrected", staging.rollout, wrong)
        _count(connection, {(staging.rollout, stage, reached): n for (stage, reached), n in wrong.items()})


# ---- queries ----------------------------------------------------------------------------------------------


def progress_of(
    connection: Connection, rollout: str, stage: int, limit: int, *, complete: bool = True
) -> RolloutProgress:
    """Returns how far a rollout's gateways are, and for each open stage the first `limit` that failed or wait, by id.

    Growth: two statements; O(stages * limit) rows, whatever the size of the fleet.
    """
    counts = _counts(connection, rollout)
    pairs = [(n, p) for (n, p), many in sorted(counts.items()) if many and n <= stage and p is not Progress.COMMITTED]
    found = sorted(_first(connection, rollout, pairs[:_NAMED_STAGES], limit), key=lambda target: target.gateway_id)
    failed = [target for target in found if target.place.progress is Progress.FAILED]
    waiting = [target for target in found if target.place.progress is Progress.WAITING]
    return RolloutProgress(counts, failed, waiting, complete)


def _counts(connection: Connection, rollout: str) -> dict[tuple[int, Progress], int]:
    rows = connection.execute(select(COUNTS).where(COUNTS.c.rollout == rollout))
    return {(row.stage, Progress(row.progress)): row.gateways for row in rows}


def _first(connection: Connection, rollout: str, pairs: Sequence[tuple[int, Progress]], limit: int) -> Iterable[Target]:
    """Returns gateways of each stage and progress. One range of the index for each, which is sorted already."""
    if not pairs:
        return []
    of = select(MEMBERS).where(MEMBERS.c.rollout == rollout, NOT_COMMITTED)
    ranges = [
        of.where(MEMBERS.c.stage == stage, MEMBERS.c.progress == progress.value)
        .order_by(MEMBERS.c.gateway_id)
        .limit(limit)
        .subquery()
        for stage, progress in pairs
    ]
    rows = connection.execute(union_all(*[select(one) for one in ranges]))
    return [Target(row.gateway_id, Place(row.stage, Progress(row.progress), row.problem)) for row in rows]


def seen(connection: Connection, targets: Iterable[Target]) -> dict[str, datetime]:
    """Returns when these gateways were last seen, with one statement."""
    query = select(SIGHTINGS.c.gateway_id, SIGHTINGS.c.at)
    rows = connection.execute(query.where(SIGHTINGS.c.gateway_id.in_([target.gateway_id for target in targets])))
    return {row.gateway_id: datetime.fromtimestamp(row.at, UTC) for row in rows}
