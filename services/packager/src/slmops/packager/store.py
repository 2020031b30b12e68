"""What the packager keeps: one stream per model version and profile, and tables to answer gateways from."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Column, Connection, Double, MetaData, String, Table, Text, insert, select, update

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


def blueprint_of(connection: Connection, gateway_id: str) -> str | None:
    """What the gateway is enrolled under; None when its enrolment has not arrived."""
    return connection.execute(select(_gateways.c.blueprint).where(_gateways.c.gateway_id == gateway_id)).scalar()


def _put(connection: Connection, table: Table, column: str, key: str, values: dict[str, Any]) -> None:
    """Update the row, or insert it: the same statement for every database."""
    if connection.execute(update(table).where(table.c[column] == key).values(**values)).rowcount == 0:
        connection.execute(insert(table).values({column: key, **values}))
