"""What queries select gateways on. The rows of the release before are filled from the documents beside them."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "rollout_0006"
down_revision = "rollout_0005"

_AT_ONCE = 500
_MOST_LABELS, _KEY_LENGTH, _VALUE_LENGTH = 64, 128, 256
_DUE = 0.875


def upgrade() -> None:
    op.create_table(
        "gateway_labels",
        sa.Column("gateway_id", sa.String(length=63), nullable=False),
        sa.Column("key", sa.String(length=128), nullable=False),
        sa.Column("value", sa.String(length=256), nullable=False),
        sa.PrimaryKeyConstraint("gateway_id", "key"),
    )
    with op.batch_alter_table("gateway_labels", schema=None) as batch_op:
        batch_op.create_index("gateways_by_label", ["key", "value", "gateway_id"], unique=False)

    with op.batch_alter_table("blueprints", schema=None) as batch_op:
        batch_op.add_column(sa.Column("profile", sa.String(length=63), nullable=True))

    with op.batch_alter_table("ended_rollouts", schema=None) as batch_op:
        batch_op.add_column(sa.Column("blueprint", sa.String(length=63), server_default="", nullable=False))
        batch_op.add_column(sa.Column("started_at", sa.Double(), server_default="0", nullable=False))
        batch_op.create_index("ended_rollouts_by_time", ["started_at", "rollout"], unique=False)
        batch_op.create_index("ended_rollouts_of_blueprint", ["blueprint", "started_at", "rollout"], unique=False)

    with op.batch_alter_table("gateways", schema=None) as batch_op:
        batch_op.add_column(sa.Column("standing", sa.String(length=8), nullable=True))
        batch_op.add_column(sa.Column("phase", sa.String(length=16), server_default="idle", nullable=False))
        batch_op.add_column(sa.Column("running_version", sa.String(length=64), nullable=True))
        batch_op.add_column(sa.Column("failed", sa.Boolean(), server_default=sa.false(), nullable=False))
        batch_op.add_column(sa.Column("dropped", sa.Boolean(), server_default=sa.false(), nullable=False))
        batch_op.add_column(sa.Column("labels", sa.Text(), server_default="{}", nullable=False))
        batch_op.add_column(sa.Column("due_at", sa.Double(), nullable=True))
    _fill()
    with op.batch_alter_table("gateways", schema=None) as batch_op:
        batch_op.create_index("gateways_by_dropped", ["dropped", "gateway_id"], unique=False)
        batch_op.create_index("gateways_by_failed", ["failed", "gateway_id"], unique=False)
        batch_op.create_index("gateways_by_phase", ["phase", "gateway_id"], unique=False)
        batch_op.create_index("gateways_by_standing", ["standing", "gateway_id"], unique=False)
        batch_op.create_index(
            "gateways_by_values",
            ["blueprint", "standing", "phase", "running_version", "failed", "dropped"],
            unique=False,
        )
        batch_op.create_index("gateways_by_version", ["running_version", "gateway_id"], unique=False)
        batch_op.create_index(batch_op.f("ix_gateways_due_at"), ["due_at"], unique=False)

    with op.batch_alter_table("sightings", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_sightings_at"), ["at"], unique=False)
        batch_op.create_index(batch_op.f("ix_sightings_clock_ahead_s"), ["clock_ahead_s"], unique=False)


# ---- rows of the release before ---------------------------------------------------------------------------


def _fill() -> None:
    """Fills the new columns. Growth: one row for each gateway, some seconds for 100,000."""
    connection, tables = op.get_bind(), sa.MetaData()
    names = ("gateways", "gateway_labels", "sightings", "blueprints", "ended_rollouts", "journal")
    tables.reflect(connection, only=names)
    gateways, after = tables.tables["gateways"], ""
    query = sa.select(gateways).where(gateways.c.enrolled.is_not(None)).order_by(gateways.c.gateway_id).limit(_AT_ONCE)
    while rows := connection.execute(query.where(gateways.c.gateway_id > after)).all():
        after = rows[-1].gateway_id
        _fill_gateways(connection, tables.tables, rows)
    _fill_blueprints(connection, tables.tables)


def _fill_gateways(connection: sa.Connection, tables: Any, rows: Any) -> None:
    gateways, sightings = tables["gateways"], tables["sightings"]
    values, labels, enrolled_at = [], [], {}
    for row in rows:
        enrolled, report = json.loads(row.enrolled), json.loads(row.report) if row.report else {}
        found = _searchable(report.get("labels") or enrolled.get("labels") or {})
        values.append(_values(row, report, found))
        labels += [{"gateway_id": row.gateway_id, "key": key, "value": value} for key, value in found.items()]
        enrolled_at[row.gateway_id] = _seconds(enrolled["at"])
    changed: dict[str, Any] = {name: sa.bindparam(f"new_{name}") for name in values[0]["new"]}
    statement = sa.update(gateways).where(gateways.c.gateway_id == sa.bindparam("id")).values(**changed)
    connection.execute(
        statement, [{"id": one["id"], **{f"new_{k}": v for k, v in one["new"].items()}} for one in values]
    )
    if labels:
        connection.execute(sa.insert(tables["gateway_labels"]), labels)
    known = sa.select(sightings.c.gateway_id).where(sightings.c.gateway_id.in_(enrolled_at))
    unseen = enrolled_at.keys() - set(connection.execute(known).scalars())
    if unseen:
        connection.execute(sa.insert(sightings), [{"gateway_id": name, "at": enrolled_at[name]} for name in unseen])


def _values(row: Any, report: dict[str, Any], labels: dict[str, str]) -> dict[str, Any]:
    standing = "revoked" if row.revoked_at is not None else "enrolled" if row.moving_to is None else "moving"
    phase = report.get("phase", "idle")
    lasting = row.issued_at is not None and row.expires_at is not None
    new = {
        "standing": standing,
        "phase": phase,
        "running_version": report.get("running_version"),
        "failed": phase == "failed" or report.get("problem") is not None,
        "dropped": bool(report.get("dropped_reports") or report.get("dropped_measurements")),
        "labels": json.dumps(labels),
        "due_at": row.issued_at + (row.expires_at - row.issued_at) * _DUE if lasting else None,
    }
    return {"id": row.gateway_id, "new": new}


def _searchable(labels: dict[str, str]) -> dict[str, str]:
    fit = {k: v for k, v in labels.items() if len(k) <= _KEY_LENGTH and len(v) <= _VALUE_LENGTH and "\0" not in k + v}
    return dict(sorted(fit.items())[:_MOST_LABELS])


def _fill_blueprints(connection: sa.Connection, tables: Any) -> None:
    blueprints, ended, journal = tables["blueprints"], tables["ended_rollouts"], tables["journal"]
    applied = sa.select(journal.c.data).where(journal.c.type == "slmops.blueprint.applied.v1")
    profiles = {}
    for data in connection.execute(applied.order_by(journal.c.position)).scalars():
        spec = json.loads(data)["spec"]
        profiles[spec["name"]] = spec.get("profile", "edge-small")
    for name, profile in profiles.items():
        connection.execute(sa.update(blueprints).where(blueprints.c.name == name).values(profile=profile))
    for rollout, text in connection.execute(sa.select(ended.c.rollout, ended.c.view)).all():
        view = json.loads(text)
        values = {"blueprint": view["blueprint"], "started_at": _seconds(view["started_at"])}
        connection.execute(sa.update(ended).where(ended.c.rollout == rollout).values(**values))


def _seconds(time: str) -> float:
    return datetime.fromisoformat(time).timestamp()
