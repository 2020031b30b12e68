"""What the packager keeps: one stream per model version and profile, and tables to answer gateways from."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import (
    Column,
    Connection,
    Double,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    and_,
    delete,
    insert,
    select,
    update,
)

from slmops.contracts.descriptor import Digest
from slmops.contracts.events import Event, GatewayEnrolled, PackagePublished

_TABLES = MetaData()
_packages = Table(
    "packages", _TABLES, Column("manifest", String(80), primary_key=True), Column("data", Text, nullable=False)
)
_gateways = Table(
    "gateways",
    _TABLES,
    Column("gateway_id", String(63), primary_key=True),
    Column("blueprint", String(63), nullable=False),
    Column("at", Double, nullable=False),  # Unix seconds
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
    """A copy of the tables for one journal, which adds its own."""
    own = MetaData()
    for table in _TABLES.tables.values():
        table.to_metadata(own)
    return own


def stream(model: str, version: str, profile: str) -> str:
    return f"package:{model}:{version}:{profile}"


def project(connection: Connection, event: Event) -> None:
    """What an event, of ours or consumed, does to the tables. The latest enrolment of a gateway counts."""
    match event:
        case PackagePublished():
            _put(connection, _packages, "manifest", event.manifest.digest, {"data": event.model_dump_json()})
        case GatewayEnrolled():
            at = event.at.timestamp()
            known = select(_gateways.c.at).where(_gateways.c.gateway_id == event.gateway_id)
            if (connection.execute(known).scalar() or 0) <= at:
                values = {"blueprint": event.blueprint, "at": at}
                _put(connection, _gateways, "gateway_id", event.gateway_id, values)


def package(connection: Connection, manifest: Digest) -> PackagePublished | None:
    data = connection.execute(select(_packages.c.data).where(_packages.c.manifest == manifest)).scalar()
    return PackagePublished.model_validate_json(data) if data else None


def packages(connection: Connection) -> list[PackagePublished]:
    """All that were published here."""
    found = connection.execute(select(_packages.c.data)).scalars()
    return [PackagePublished.model_validate_json(data) for data in found]


def blueprint_of(connection: Connection, gateway_id: str) -> str | None:
    """What the gateway is enrolled under; None when its enrolment has not arrived."""
    return connection.execute(select(_gateways.c.blueprint).where(_gateways.c.gateway_id == gateway_id)).scalar()


def _put(connection: Connection, table: Table, column: str, key: str, values: dict[str, Any]) -> None:
    """Update the row, or insert it: the same statement for every database."""
    if connection.execute(update(table).where(table.c[column] == key).values(**values)).rowcount == 0:
        connection.execute(insert(table).values({column: key, **values}))


# ---- the trust repository ---------------------------------------------------------------------------------


def metadata(connection: Connection, role: str, version: int | None) -> bytes | None:
    """A metadata file; without a version the newest."""
    query = select(_metadata.c.data).where(_metadata.c.role == role).order_by(_metadata.c.version.desc()).limit(1)
    found = connection.execute(query if version is None else query.where(_metadata.c.version == version)).scalar()
    return bytes(found) if found is not None else None


def forget_metadata(connection: Connection, before: datetime) -> None:
    """Remove versions that a newer one replaced before that time. Roots stay: each leads to the next."""
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
    """`repository.Files` in one transaction."""

    connection: Connection
    now: datetime

    def newest(self, role: str) -> bytes | None:
        return metadata(self.connection, role, None)

    def put(self, role: str, version: int, data: bytes) -> None:
        where = and_(_metadata.c.role == role, _metadata.c.version == version)
        values = {"data": data, "at": self.now.timestamp()}
        if self.connection.execute(update(_metadata).where(where).values(**values)).rowcount == 0:
            self.connection.execute(insert(_metadata).values(role=role, version=version, **values))

    def model_key(self, model: str) -> bytes | None:
        pem = self.connection.execute(select(_model_keys.c.pem).where(_model_keys.c.model == model)).scalar()
        return pem.encode() if pem else None

    def put_model_key(self, model: str, pem: bytes) -> None:
        _put(self.connection, _model_keys, "model", model, {"pem": pem.decode()})
