"""The packager's streams and tables: one stream per model version and profile, and tables for answering gateways."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    Double,
    Integer,
    LargeBinary,
    MetaData,
    Select,
    String,
    Table,
    Text,
    and_,
    bindparam,
    delete,
    func,
    insert,
    or_,
    select,
    update,
)

from slmops.contracts.clocks import NO_REPORT, ReportMark
from slmops.contracts.descriptor import Digest
from slmops.contracts.events import (
    Event,
    GatewayEnrolled,
    GatewayRemoved,
    GatewayReported,
    GatewayRevoked,
    PackageDeltaPublished,
    PackageDeltaWithdrawn,
    PackagePublished,
    PackageWithdrawn,
)
from slmops.kit.journal import put
from slmops.packager.domain import is_newer

MIGRATIONS = Path(__file__).parent / "migrations"
_TABLES = MetaData()
_packages = Table(
    "packages", _TABLES, Column("manifest", String(80), primary_key=True), Column("data", Text, nullable=False)
)
_withdrawn = Table(
    "withdrawn",
    _TABLES,
    Column("manifest", String(80), primary_key=True),
    Column("at", Double, nullable=False),  # Unix seconds
)
_gateways = Table(
    "gateways",
    _TABLES,
    Column("gateway_id", String(63), primary_key=True),
    Column("blueprint", String(63), nullable=False),
    Column("at", Double, nullable=False),  # Unix seconds
    Column("public_key", String(56), nullable=False, server_default=""),
)
# The newest revoked key of each gateway. A separate table, because it may arrive before the enrolment.
_revoked = Table(
    "revoked",
    _TABLES,
    Column("gateway_id", String(63), primary_key=True),
    Column("public_key", String(56), nullable=False),
    Column("at", Double, nullable=False),  # Unix seconds
)
_running = Table(
    "running",
    _TABLES,
    Column("gateway_id", String(63), primary_key=True),
    Column("manifest", String(80), index=True),
    Column("sequence", BigInteger, nullable=False, server_default="0"),
    Column("enrolment", Integer, nullable=False, server_default="0"),
    Column("boot", String(32), nullable=False, server_default=""),
    Column("made_at", Double, nullable=False, server_default="0"),  # Unix seconds
)
_deltas = Table(
    "deltas",
    _TABLES,
    Column("target", String(80), primary_key=True),
    Column("base", String(80), primary_key=True),
    Column("model", String(63), nullable=False, index=True),
    Column("size_bytes", BigInteger, nullable=False),
    Column("at", Double, nullable=False),  # Unix seconds
    Column("data", Text, nullable=False),
)
_metadata = Table(
    "trust_metadata",
    _TABLES,
    Column("role", String(80), primary_key=True),
    Column("version", Integer, primary_key=True),
    Column("at", Double, nullable=False),  # Unix seconds
    Column("data", LargeBinary, nullable=False),
)
_model_keys = Table(
    "trust_model_keys", _TABLES, Column("model", String(63), primary_key=True), Column("pem", Text, nullable=False)
)


def schema() -> MetaData:
    """Returns a copy of the tables for one journal, which adds its own tables. `MIGRATIONS` lead to these tables."""
    own = MetaData()
    for table in _TABLES.tables.values():
        table.to_metadata(own)
    return own


def stream(model: str, version: str, profile: str) -> str:
    return f"package:{model}:{version}:{profile}"


def project(connection: Connection, event: Event) -> None:
    """Applies an event, ours or consumed, to the tables. The latest enrolment of a gateway counts, and its newest
    report."""
    match event:
        case PackagePublished():
            put(connection, _packages, {"manifest": event.manifest.digest}, {"data": event.model_dump_json()})
        case GatewayEnrolled():
            _enrolled(connection, event)
        case GatewayRevoked():
            _record_revoked(connection, event)
        case GatewayRemoved():
            older = _gateways.c.at <= event.at.timestamp()
            if connection.execute(delete(_gateways).where(_gateways.c.gateway_id == event.gateway_id, older)).rowcount:
                connection.execute(delete(_running).where(_running.c.gateway_id == event.gateway_id))
        case GatewayReported():
            record_reports(connection, [(event, ReportMark(event.boot, event.sequence, event.at.timestamp()))])
        case PackageDeltaPublished():
            values = {"model": event.model, "size_bytes": event.delta.size, "at": event.at.timestamp()}
            names = {"base": event.base, "target": event.target, "data": event.model_dump_json()}
            connection.execute(insert(_deltas).values(values | names))
        case PackageWithdrawn():
            put(connection, _withdrawn, {"manifest": event.manifest}, {"at": event.at.timestamp()})
        case PackageDeltaWithdrawn():
            connection.execute(delete(_deltas).where(_deltas.c.target == event.target, _deltas.c.base == event.base))


def _enrolled(connection: Connection, event: GatewayEnrolled) -> None:
    at, matches = event.at.timestamp(), _gateways.c.gateway_id == event.gateway_id
    known = connection.execute(select(_gateways).where(matches)).first()
    if known is not None and known.at > at:
        return
    values = {"blueprint": event.blueprint, "at": at, "public_key": event.public_key}
    put(connection, _gateways, {"gateway_id": event.gateway_id}, values)
    if known is not None and known.public_key not in ("", event.public_key):
        # A device that was set up again: it runs nothing, and its sequence starts anew. It may have reported already.
        older = _running.c.enrolment < event.enrolment
        connection.execute(delete(_running).where(_running.c.gateway_id == event.gateway_id, older))


def _record_revoked(connection: Connection, event: GatewayRevoked) -> None:
    at, matches = event.revoked_at.timestamp(), _revoked.c.gateway_id == event.gateway_id
    if (connection.execute(select(_revoked.c.at).where(matches)).scalar() or 0) <= at:
        values = {"public_key": event.public_key, "at": at}
        put(connection, _revoked, {"gateway_id": event.gateway_id}, values)
    if is_revoked(connection, event.gateway_id):
        connection.execute(delete(_running).where(_running.c.gateway_id == event.gateway_id))


def record_reports(connection: Connection, reports: Collection[tuple[GatewayReported, ReportMark]]) -> None:
    """Records what gateways run, at most one report of each. Growth: five statements, whatever their number."""
    ids = [event.gateway_id for event, _ in reports]
    known = {row.gateway_id: row for row in connection.execute(select(_running).where(_running.c.gateway_id.in_(ids)))}
    gone = _revoked_of(connection, ids)
    added, changed = [], []
    for event, mark in reports:
        before = known.get(event.gateway_id)
        enrolment = before.enrolment if before else 0
        newest = ReportMark(before.boot, before.sequence, before.made_at) if before else NO_REPORT
        if event.gateway_id in gone or not is_newer(event, mark, enrolment, newest):
            continue
        values = {"manifest": event.running, "enrolment": max(event.enrolment, enrolment), **mark._asdict()}
        if before is None:
            added.append({"gateway_id": event.gateway_id, **values})
        else:
            changed.append({"of": event.gateway_id, **{f"new_{name}": value for name, value in values.items()}})
    if added:
        connection.execute(insert(_running), added)
    if changed:
        names = ("manifest", "enrolment", *ReportMark._fields)
        statement = update(_running).where(_running.c.gateway_id == bindparam("of"))
        connection.execute(statement.values({name: bindparam(f"new_{name}") for name in names}), changed)


def is_revoked(connection: Connection, gateway_id: str) -> bool:
    """Returns whether the gateway's current key is revoked. A key that may return is enrolled in a later second."""
    return bool(_revoked_of(connection, [gateway_id]))


def _revoked_of(connection: Connection, gateway_ids: Collection[str]) -> set[str]:
    """Returns those gateways whose current key is revoked, or that were removed and not enrolled again."""
    revoked = connection.execute(select(_revoked).where(_revoked.c.gateway_id.in_(gateway_ids))).all()
    if not revoked:
        return set()
    query = select(_gateways).where(_gateways.c.gateway_id.in_([row.gateway_id for row in revoked]))
    known = {row.gateway_id: row for row in connection.execute(query)}
    return {row.gateway_id for row in revoked if _is_of_key(row, known.get(row.gateway_id))}


def _is_of_key(revoked: Any, known: Any) -> bool:
    # An enrolment that an earlier release recorded has no key. It was before every revocation.
    return known is None or (known.public_key in ("", revoked.public_key) and known.at < revoked.at + 1)


def package(connection: Connection, manifest: Digest) -> PackagePublished | None:
    """Returns a package; None if it was never published here or was withdrawn."""
    data = connection.execute(_not_withdrawn().where(_packages.c.manifest == manifest)).scalar()
    return PackagePublished.model_validate_json(data) if data else None


def packages(connection: Connection) -> list[PackagePublished]:
    """Returns all packages that were published here and not withdrawn."""
    return _read(connection, _not_withdrawn())


def all_packages(connection: Connection) -> list[PackagePublished]:
    """Returns all packages that were ever published here, including withdrawn ones."""
    return _read(connection, select(_packages.c.data))


def _not_withdrawn() -> Select[Any]:
    return select(_packages.c.data).where(_packages.c.manifest.not_in(select(_withdrawn.c.manifest)))


def _read(connection: Connection, query: Select[Any]) -> list[PackagePublished]:
    return [PackagePublished.model_validate_json(data) for data in connection.execute(query).scalars()]


def running(connection: Connection) -> dict[Digest, int]:
    """Returns the number of gateways that last reported running a package, by manifest."""
    query = select(_running.c.manifest, func.count()).where(_running.c.manifest.is_not(None))
    return {manifest: int(count) for manifest, count in connection.execute(query.group_by(_running.c.manifest))}


def deltas_of(connection: Connection, model: str) -> list[PackageDeltaPublished]:
    """Returns all deltas between packages of a model."""
    found = connection.execute(select(_deltas.c.data).where(_deltas.c.model == model)).scalars()
    return [PackageDeltaPublished.model_validate_json(data) for data in found]


def deltas_with(connection: Connection, manifest: Digest) -> list[PackageDeltaPublished]:
    """Returns the deltas that start from a package or lead to it."""
    ends = or_(_deltas.c.target == manifest, _deltas.c.base == manifest)
    found = connection.execute(select(_deltas.c.data).where(ends)).scalars()
    return [PackageDeltaPublished.model_validate_json(data) for data in found]


def oldest_deltas(connection: Connection, space_bytes: int) -> list[PackageDeltaPublished]:
    """Returns the oldest deltas, as many as must go so that the rest fits into `space_bytes`."""
    found, kept = [], 0
    for size, data in connection.execute(select(_deltas.c.size_bytes, _deltas.c.data).order_by(_deltas.c.at.desc())):
        kept += size
        if kept > space_bytes:
            found.append(PackageDeltaPublished.model_validate_json(data))
    return found


def blueprint_of(connection: Connection, gateway_id: str) -> str | None:
    """Returns the blueprint of a gateway; None when its enrolment has not arrived."""
    return connection.execute(select(_gateways.c.blueprint).where(_gateways.c.gateway_id == gateway_id)).scalar()


# ---- the trust repository ---------------------------------------------------------------------------------


def metadata(connection: Connection, role: str, version: int | None) -> bytes | None:
    """Returns a metadata file, the newest one if `version` is None; None when there is no such file."""
    query = select(_metadata.c.data).where(_metadata.c.role == role).order_by(_metadata.c.version.desc()).limit(1)
    found = connection.execute(query if version is None else query.where(_metadata.c.version == version)).scalar()
    return bytes(found) if found is not None else None


def root_versions(connection: Connection) -> list[int]:
    query = select(_metadata.c.version).where(_metadata.c.role == "root").order_by(_metadata.c.version)
    return list(connection.execute(query).scalars())


def delete_replaced_metadata(connection: Connection, before: datetime) -> None:
    """Deletes versions that were replaced before that time. Roots stay: clients go from each root to the next."""
    newer = _metadata.alias()
    replaced = (
        select(newer.c.version)
        .where(
            and_(
                newer.c.role == _metadata.c.role,
                newer.c.version > _metadata.c.version,
                newer.c.at < before.timestamp(),
            )
        )
        .exists()
    )
    connection.execute(delete(_metadata).where(_metadata.c.role != "root", replaced))


@dataclass(frozen=True)
class TrustFiles:
    """Implements `repository.Files` in one transaction."""

    connection: Connection
    now: datetime

    def newest(self, role: str) -> bytes | None:
        return metadata(self.connection, role, None)

    def put(self, role: str, version: int, data: bytes) -> None:
        values = {"data": data, "at": self.now.timestamp()}
        put(self.connection, _metadata, {"role": role, "version": version}, values)

    def model_key(self, model: str) -> bytes | None:
        pem = self.connection.execute(select(_model_keys.c.pem).where(_model_keys.c.model == model)).scalar()
        return pem.encode() if pem else None

    def put_model_key(self, model: str, pem: bytes) -> None:
        put(self.connection, _model_keys, {"model": model}, {"pem": pem.decode()})
