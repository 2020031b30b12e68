"""Stores enrolled gateways, and the releases that rollouts gave to gateways. The sums are in `sums`.

`members` and `revoked` grow with the fleet, `offers` and `opened` with the number of rollouts.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import TypeAdapter
from sqlalchemy import (
    Column,
    Connection,
    Double,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    delete,
    select,
)

from slmops.contracts.blueprint import Stage
from slmops.contracts.descriptor import Digest
from slmops.contracts.events import (
    Event,
    GatewayEnrolled,
    GatewayRemoved,
    GatewayRevoked,
    RolloutCompleted,
    RolloutRolledBack,
    RolloutStageAdvanced,
    RolloutStarted,
)
from slmops.contracts.plan import Identity, Release
from slmops.kit.journal import put
from slmops.telemetry.domain.expectation import Enrolled, Offer, counts
from slmops.telemetry.repetitions import sequences
from slmops.telemetry.sums import forget_gateway, window_sums

MIGRATIONS = Path(__file__).parent / "migrations"
_TABLES = MetaData()
_members = Table(
    "members",
    _TABLES,
    Column("gateway_id", String(63), primary_key=True),
    Column("blueprint", String(63), nullable=False),
    Column("labels", Text, nullable=False),
    Column("public_key", String(56), nullable=False, server_default=""),
    Column("enrolled_at", Double, nullable=False, server_default="0"),  # Unix seconds
    Column("moved_from", String(63)),
)
# The newest revoked key of each gateway. A separate table, because it may arrive before the enrolment.
_revoked = Table(
    "revoked",
    _TABLES,
    Column("gateway_id", String(63), primary_key=True),
    Column("public_key", String(56), nullable=False),
    Column("at", Double, nullable=False),  # Unix seconds
)
_offers = Table(
    "offers",
    _TABLES,
    Column("rollout", String(80), primary_key=True),
    Column("release", String(80), primary_key=True),
    Column("blueprint", String(63), nullable=False),
    Column("version", String(64), nullable=False),
    Column("since", Double, nullable=False),  # Unix seconds
    Column("stages", Text),  # NULL: given to every gateway
    Index("offers_by_release", "blueprint", "release"),
)
# A separate table, because the event of a stage may arrive before that of its rollout.
_opened = Table(
    "opened",
    _TABLES,
    Column("rollout", String(80), primary_key=True),
    Column("stage", Integer, nullable=False),
)
_caught_up = Table(
    "caught_up",
    _TABLES,
    Column("stream", String(63), primary_key=True),
    Column("sequence", Integer, nullable=False),
)
_ROLLOUTS = "EVENTS"
_EVERY_STAGE = 1 << 30
_STAGES = TypeAdapter(tuple[Stage, ...])


def schema() -> MetaData:
    """Returns a copy of the tables for one journal, which adds its own tables. `MIGRATIONS` lead to these tables."""
    own = MetaData()
    for table in _TABLES.tables.values():
        table.to_metadata(own)
    window_sums(own)
    sequences(own)
    return own


def project(_connection: Connection, _event: Event) -> None:
    """Does nothing: published windows are not kept here, because their consumers store what they need."""


class Member(NamedTuple):
    enrolled: Enrolled
    revoked: bool
    """Whether its current key is revoked."""


def member(connection: Connection, gateway_id: str) -> Enrolled | None:
    found = members(connection, [gateway_id]).get(gateway_id)
    return found.enrolled if found else None


def members(connection: Connection, gateway_ids: Iterable[str]) -> dict[str, Member]:
    """Returns those of up to some hundred gateways that are enrolled. One statement."""
    query = (
        select(*_members.c, _revoked.c.public_key.label("revoked_key"), _revoked.c.at)
        .select_from(_members.outerjoin(_revoked, _members.c.gateway_id == _revoked.c.gateway_id))
        .where(_members.c.gateway_id.in_(list(gateway_ids)))
    )
    return {row.gateway_id: _member(row) for row in connection.execute(query)}


def _member(row: Any) -> Member:
    # Without validation: 256 rows of our own for each transaction.
    identity = Identity.model_construct(
        gateway_id=row.gateway_id, blueprint=row.blueprint, labels=json.loads(row.labels)
    )
    enrolled = Enrolled(identity, row.public_key, datetime.fromtimestamp(row.enrolled_at, UTC), row.moved_from)
    return Member(
        enrolled,
        row.revoked_key is not None and not counts(enrolled, row.revoked_key, datetime.fromtimestamp(row.at, UTC)),
    )


def offers(connection: Connection, blueprint: str, release: Digest) -> list[Offer]:
    """Returns the past and current offers of a release by rollouts of a blueprint."""
    query = (
        select(_offers, _opened.c.stage)
        .select_from(_offers.outerjoin(_opened, _offers.c.rollout == _opened.c.rollout))
        .where(_offers.c.blueprint == blueprint, _offers.c.release == release)
    )
    return [_offer(row) for row in connection.execute(query)]


def _offer(row: Any) -> Offer:
    since = datetime.fromtimestamp(row.since, UTC)
    if row.stages is None or row.stage == _EVERY_STAGE:
        return Offer(row.rollout, row.version, since)
    return Offer(row.rollout, row.version, since, _STAGES.validate_json(row.stages), row.stage or 0)


def record_member(connection: Connection, enrolled: Enrolled) -> None:
    """Records an enrolment, unless a newer one is known."""
    identity = enrolled.identity
    known = member(connection, identity.gateway_id)
    if known is not None and known.at > enrolled.at:
        return
    values = {
        "blueprint": identity.blueprint,
        "labels": json.dumps(identity.labels, sort_keys=True),
        "public_key": enrolled.public_key,
        "enrolled_at": enrolled.at.timestamp(),
        "moved_from": enrolled.moved_from,
    }
    put(connection, _members, {"gateway_id": identity.gateway_id}, values)
    if known is not None and known.public_key != enrolled.public_key:
        _forget_uncounted(connection, identity.gateway_id)


def _record_revoked(connection: Connection, event: GatewayRevoked) -> None:
    at = event.revoked_at.timestamp()
    known = connection.execute(select(_revoked.c.at).where(_revoked.c.gateway_id == event.gateway_id)).scalar()
    if known is None or known <= at:
        put(connection, _revoked, {"gateway_id": event.gateway_id}, {"public_key": event.public_key, "at": at})
        _forget_uncounted(connection, event.gateway_id)


def _forget_uncounted(connection: Connection, gateway_id: str) -> None:
    """Takes a gateway that is revoked or removed out of the open windows, so they hold only gateways that count."""
    found = members(connection, [gateway_id]).get(gateway_id)
    if found is None or found.revoked:
        forget_gateway(connection, gateway_id)


def _forget(connection: Connection, event: GatewayRemoved) -> None:
    """Forgets a removed gateway, unless another device was enrolled under its id since."""
    older = _members.c.enrolled_at <= event.at.timestamp()
    connection.execute(delete(_members).where(_members.c.gateway_id == event.gateway_id, older))
    _forget_uncounted(connection, event.gateway_id)


def forget_revoked(connection: Connection, before: datetime) -> None:
    """Forgets the revocations of gateways that were removed, if they are older than that."""
    old = _revoked.c.at < before.timestamp()
    connection.execute(delete(_revoked).where(old, _revoked.c.gateway_id.not_in(select(_members.c.gateway_id))))


def record_fact(connection: Connection, event: Event) -> None:
    """Records an event. Events may arrive in any order and repeatedly."""
    match event:
        case GatewayEnrolled():
            fields = event.model_dump(include={"gateway_id", "blueprint", "labels"})
            record_member(connection, Enrolled(Identity(**fields), event.public_key, event.at, event.moved_from))
        case GatewayRevoked():
            _record_revoked(connection, event)
        case GatewayRemoved():
            _forget(connection, event)
        case RolloutStarted():
            _put_offer(connection, event, event.candidate, _STAGES.dump_json(event.stages).decode())
            if event.stable is not None:  # last, because it may be the same package as the candidate
                _put_offer(connection, event, event.stable, None)
        case RolloutStageAdvanced():
            _open(connection, event.rollout, event.stage)
        case RolloutCompleted():
            _open(connection, event.rollout, _EVERY_STAGE)
        case RolloutRolledBack() if event.restored is not None:
            _put_offer(connection, event, event.restored, None)


def caught_up(connection: Connection) -> int:
    """Returns the sequence in the stream of facts up to which every event of a rollout is recorded here."""
    query = select(_caught_up.c.sequence).where(_caught_up.c.stream == _ROLLOUTS)
    return connection.execute(query).scalar() or 0


def record_rollouts(connection: Connection, found: Sequence[tuple[int, Event]]) -> None:
    for _, event in found:
        record_fact(connection, event)
    put(connection, _caught_up, {"stream": _ROLLOUTS}, {"sequence": found[-1][0]})


def _put_offer(
    connection: Connection, event: RolloutStarted | RolloutRolledBack, release: Release, stages: str | None
) -> None:
    key = {"rollout": event.rollout, "release": release.manifest.digest}
    values = {"blueprint": event.blueprint, "version": release.version, "since": event.at.timestamp(), "stages": stages}
    put(connection, _offers, key, values)


def _open(connection: Connection, rollout: str, stage: int) -> None:
    found = connection.execute(select(_opened.c.stage).where(_opened.c.rollout == rollout)).scalar()
    put(connection, _opened, {"rollout": rollout}, {"stage": max(stage, found or 0)})
