"""The registry's storage: one stream per model, and read tables for lists.

Documents are stored as JSON, with separate columns for the fields on which queries select. Times are Unix seconds.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Connection,
    Double,
    Integer,
    MetaData,
    Row,
    String,
    Table,
    Text,
    UniqueConstraint,
    delete,
    insert,
    select,
    tuple_,
    update,
)

from slmops.contracts.commands import PackageView, VariantView, VersionView
from slmops.contracts.descriptor import Digest
from slmops.contracts.events import (
    Event,
    ModelAliasMoved,
    ModelVersionRegistered,
    ModelVersionRetired,
    PackagePublished,
    VariantOptimized,
    VariantProgressed,
    VariantRejected,
    VariantStarted,
)
from slmops.kit.journal import UnitOfWork
from slmops.registry.domain.lifecycle import State
from slmops.registry.domain.live_blobs import BlobReference, Key
from slmops.registry.domain.live_blobs import named as named_by
from slmops.registry.domain.live_blobs import withdrawn as withdrawn_by
from slmops.registry.domain.version_progress import PASSED, REFUSED, Optimization, progress_of, stage_of
from slmops.registry.domain.versions import Model, replay

MIGRATIONS = Path(__file__).parent / "migrations"
_KEYS_AT_ONCE = 500
_TABLES = MetaData()
_MODEL, _VERSION, _PROFILE, _RECIPE = String(63), String(64), String(63), String(63)

_versions = Table(
    "versions",
    _TABLES,
    Column("id", Integer, primary_key=True, autoincrement=True),  # the order of registration
    Column("model", _MODEL, nullable=False),
    Column("version", _VERSION, nullable=False),
    Column("state", String(20), nullable=False),
    Column("registered", Text, nullable=False),
    UniqueConstraint("model", "version"),
)
_aliases = Table(
    "aliases",
    _TABLES,
    Column("model", _MODEL, primary_key=True),
    Column("alias", String(63), primary_key=True),
    Column("version", _VERSION, nullable=False),
)
_jobs = Table(
    "jobs",
    _TABLES,
    Column("model", _MODEL, primary_key=True),
    Column("version", _VERSION, primary_key=True),
    Column("profile", _PROFILE, primary_key=True),
    Column("recipes", Text, nullable=False, default=""),  # separated by spaces, which names cannot contain
    Column("progress", Text, nullable=False, default=""),
    Column("progress_at", Double, nullable=False, default=0),
)
_variants = Table(
    "variants",
    _TABLES,
    Column("model", _MODEL, primary_key=True),
    Column("version", _VERSION, primary_key=True),
    Column("profile", _PROFILE, primary_key=True),
    Column("recipe", _RECIPE, primary_key=True),
    Column("at", Double, nullable=False),
    Column("view", Text, nullable=False),
)
_packages = Table(
    "packages",
    _TABLES,
    Column("manifest", String(80), primary_key=True),
    Column("model", _MODEL, nullable=False),
    Column("version", _VERSION, nullable=False),
    Column("at", Double, nullable=False),
    Column("view", Text, nullable=False),
)
_named = Table(
    "named_blobs",
    _TABLES,
    Column("kind", String(120), primary_key=True),
    Column("model", _MODEL, primary_key=True),
    Column("version", _VERSION, primary_key=True),
    Column("digest", String(80), primary_key=True),
    Column("document", Boolean, nullable=False),
)
_withdrawn = Table(
    "withdrawn_blobs",
    _TABLES,
    Column("digest", String(80), primary_key=True),
    Column("at", Double, nullable=False),
)
_read_until = Table(
    "named_until",
    _TABLES,
    Column("kind", String(120), primary_key=True),
    Column("sequence", BigInteger, nullable=False),  # of the stream
)
_chores = Table(
    "chores",
    _TABLES,
    Column("name", String(40), primary_key=True),
    Column("due", Double, nullable=False),
    Column("holder", String(64), nullable=False),  # the process that does it, until `held_until`
    Column("held_until", Double, nullable=False),
    Column("state", Text, nullable=False),  # JSON of the chore
    Column("problem", Text, nullable=False),  # why it failed last time; empty: it did not
)

_BEFORE_EVERYTHING = datetime.fromtimestamp(0, UTC)


def schema() -> MetaData:
    """Returns a copy of the tables for one journal, which adds its own tables. `MIGRATIONS` lead to these tables."""
    own = MetaData()
    for table in _TABLES.tables.values():
        table.to_metadata(own)
    return own


def stream(model: str) -> str:
    return f"model:{model}"


def load(unit: UnitOfWork, model: str) -> tuple[Model, int]:
    """Returns a model's current state and the version of its stream."""
    events, version = unit.load(stream(model))
    return replay(model, events), version


def named(connection: Connection) -> list[BlobReference]:
    """Returns all blobs that events of other services ever named."""
    return [BlobReference(**row._mapping) for row in connection.execute(select(_named))]


def withdrawn(connection: Connection) -> dict[Digest, datetime]:
    """Returns the withdrawn blobs and the times of their withdrawal."""
    return {row.digest: datetime.fromtimestamp(row.at, UTC) for row in connection.execute(select(_withdrawn))}


def read_until(connection: Connection, kind: str) -> int:
    """Returns the sequence up to which events of a type were read; 0 if none."""
    return connection.execute(select(_read_until.c.sequence).where(_read_until.c.kind == kind)).scalar() or 0


# ---- writing ----------------------------------------------------------------------------------------------


def project(connection: Connection, event: Event) -> None:
    """Applies an event, our own or a consumed one, to the tables. Applying it twice is the same as once."""
    match event:
        case ModelVersionRegistered():
            row = {"state": State.REGISTERED, "registered": event.model_dump_json()}
            _put(connection, _versions, {"model": event.model, "version": event.version}, row)
        case ModelAliasMoved():
            _put(connection, _aliases, {"model": event.model, "alias": event.alias}, {"version": event.version})
        case ModelVersionRetired():
            _put(connection, _versions, {"model": event.model, "version": event.version}, {"state": State.RETIRED})
        case VariantStarted():
            _put(connection, _jobs, _job(event), {"recipes": " ".join(event.recipes)})
        case VariantProgressed():
            text = f"{event.step} {event.done}/{event.of}"
            _put(connection, _jobs, _job(event), {"progress": text}, newest="progress_at", at=event.at)
        case VariantOptimized() | VariantRejected():
            view = _variant_view(event)
            key = {**_job(event), "recipe": event.recipe}
            # A variant that could not be made does not replace the measurements of another job.
            at = event.at if event.evaluation else _BEFORE_EVERYTHING
            _put(connection, _variants, key, {"view": view.model_dump_json()}, newest="at", at=at)
        case PackagePublished():
            key = {"manifest": event.manifest.digest}
            values = {"model": event.model, "version": event.version, "view": _package_view(event).model_dump_json()}
            _put(connection, _packages, key, values, newest="at", at=event.at)


def name(connection: Connection, event: Event) -> None:
    """Stores the blobs that an event names or withdraws."""
    for digest, at in withdrawn_by(event).items():
        _put(connection, _withdrawn, {"digest": digest}, {"at": at.timestamp()})
    for one in named_by(event):
        row = vars(one)
        there = [_named.c[column] == row[column] for column in ("kind", "model", "version", "digest")]
        if connection.execute(select(_named.c.kind).where(*there)).first() is None:
            connection.execute(insert(_named), row)


def set_read_until(connection: Connection, kind: str, sequence: int) -> None:
    """Stores the sequence up to which events of a type were read."""
    changed = update(_read_until).where(_read_until.c.kind == kind).values(sequence=sequence)
    if connection.execute(changed).rowcount == 0:
        connection.execute(insert(_read_until).values(kind=kind, sequence=sequence))


def forget_read_until(connection: Connection) -> None:
    """Forgets all positions, so that every event type is read again from the beginning of its stream."""
    connection.execute(delete(_read_until))


def claim_chore(connection: Connection, name: str, holder: str, now: float, until: float, first: float) -> str | None:
    """Claims a chore for a process, if it is due and no other process holds it. Returns the chore's state, otherwise
    None. A chore that was never done is due at `first`."""
    row = connection.execute(select(_chores).where(_chores.c.name == name)).first()
    if row is None:
        new = {"name": name, "due": first, "holder": "", "held_until": 0.0, "state": "{}", "problem": ""}
        connection.execute(insert(_chores), new)
        due, state = first, "{}"
    else:
        due, state = row.due, row.state
    if due > now or (row is not None and row.held_until > now):
        return None
    connection.execute(update(_chores).where(_chores.c.name == name).values(holder=holder, held_until=until))
    return str(state)


def hold_chore(connection: Connection, name: str, holder: str, until: float) -> None:
    """Extends the time for which a process holds a chore. Does nothing if another process holds it."""
    mine = (_chores.c.name == name, _chores.c.holder == holder)
    connection.execute(update(_chores).where(*mine).values(held_until=until))


def end_chore(connection: Connection, name: str, holder: str, due: float, state: str | None, problem: str) -> None:
    """Releases a chore until it is due again. `state` None keeps the state. Does nothing if another process holds
    it."""
    mine = (_chores.c.name == name, _chores.c.holder == holder)
    values: dict[str, Any] = {"due": due, "held_until": 0.0, "problem": problem}
    if state is not None:
        values["state"] = state
    connection.execute(update(_chores).where(*mine).values(**values))


def chores(connection: Connection) -> dict[str, tuple[str, str]]:
    """Returns the state and the last problem of every chore by name."""
    return {row.name: (row.state, row.problem) for row in connection.execute(select(_chores))}


def _job(event: VariantStarted | VariantProgressed | VariantOptimized | VariantRejected) -> dict[str, str]:
    return {"model": event.model, "version": event.version, "profile": event.profile}


def _put(
    connection: Connection,
    table: Table,
    key: dict[str, str],
    values: dict[str, Any],
    newest: str | None = None,
    at: datetime | None = None,
) -> None:
    """Updates the row or inserts it, in a way that every database supports. With `newest`, a row with a later `at` is
    kept."""
    match_key = [table.c[column] == value for column, value in key.items()]
    if newest is not None and at is not None:
        values = {**values, newest: at.timestamp()}
        there = connection.execute(select(table.c[newest]).where(*match_key)).scalar()
        if there is not None and there > at.timestamp():
            return
    if connection.execute(update(table).where(*match_key).values(**values)).rowcount == 0:
        connection.execute(insert(table).values(**key, **values))


def _variant_view(event: VariantOptimized | VariantRejected) -> VariantView:
    passed = isinstance(event, VariantOptimized)
    return VariantView(
        model=event.model,
        version=event.version,
        profile=event.profile,
        recipe=event.recipe,
        digest=event.digest,
        gate=PASSED if passed else REFUSED,
        chosen=isinstance(event, VariantOptimized) and event.chosen,
        reason=event.reason,
        evaluation=event.evaluation,
        report=event.report,
    )


def _package_view(event: PackagePublished) -> PackageView:
    fields = event.model_dump(include={"profile", "recipe", "manifest", "signature", "size_bytes", "at"})
    return PackageView.model_validate(fields)


# ---- reading ----------------------------------------------------------------------------------------------


def views(connection: Connection, model: str | None = None, version: str | None = None) -> list[VersionView]:
    """Returns registered and retired versions in the order of their registration: all that match."""
    return [view for _, view in reversed(newest_views(connection, model, version))]


def newest_views(
    connection: Connection,
    model: str | None = None,
    version: str | None = None,
    before: int | None = None,
    limit: int | None = None,
) -> list[tuple[int, VersionView]]:
    """Returns a page of registered and retired versions with their numbers, the newest first, below number `before`."""
    wanted = {"model": model, "version": version}
    where = [_versions.c[column] == value for column, value in wanted.items() if value is not None]
    if before is not None:
        where.append(_versions.c.id < before)
    found = connection.execute(select(_versions).where(*where).order_by(_versions.c.id.desc()).limit(limit)).all()
    details = _Details(connection, [(row.model, row.version) for row in found])
    return [(row.id, details.view(row)) for row in found]


class _Details:
    """The aliases, jobs, variants and packages of some versions."""

    def __init__(self, connection: Connection, keys: Sequence[Key]) -> None:
        def rows(table: Table, order: str) -> list[Row[Any]]:
            found: list[Row[Any]] = []
            for start in range(0, len(keys), _KEYS_AT_ONCE):
                some = tuple_(table.c.model, table.c.version).in_(keys[start : start + _KEYS_AT_ONCE])
                found += connection.execute(select(table).where(some).order_by(table.c[order]))
            return found

        gone = set(connection.execute(select(_withdrawn.c.digest)).scalars())
        self._aliases, self._jobs = _by_version(rows(_aliases, "alias")), _by_version(rows(_jobs, "profile"))
        self._variants = _by_version(rows(_variants, "recipe"))
        self._packages = _by_version([row for row in rows(_packages, "at") if row.manifest not in gone])

    def view(self, row: Row[Any]) -> VersionView:
        key = (row.model, row.version)
        return _version_view(row, self._aliases[key], self._jobs[key], self._variants[key], self._packages[key])


def _by_version(rows: list[Row[Any]]) -> defaultdict[Key, list[Row[Any]]]:
    found: defaultdict[Key, list[Row[Any]]] = defaultdict(list)
    for row in rows:
        found[row.model, row.version].append(row)
    return found


def _variants_of(rows: list[Row[Any]]) -> tuple[VariantView, ...]:
    """Returns the variants. Each job chooses one; of several jobs for a profile the newest choice counts."""
    views = [VariantView.model_validate_json(row.view) for row in rows]
    by_age = sorted(zip(rows, views, strict=True), key=lambda pair: pair[0].at)
    chosen = {view.profile: view.recipe for _, view in by_age if view.chosen}
    return tuple(view.model_copy(update={"chosen": chosen.get(view.profile) == view.recipe}) for view in views)


def _version_view(
    row: Row[Any],
    alias_rows: list[Row[Any]],
    job_rows: list[Row[Any]],
    variant_rows: list[Row[Any]],
    package_rows: list[Row[Any]],
) -> VersionView:
    event = ModelVersionRegistered.model_validate_json(row.registered)
    jobs = [Optimization(job.profile, tuple(job.recipes.split()), job.progress) for job in job_rows]
    variants = _variants_of(variant_rows)
    packages = tuple(PackageView.model_validate_json(package.view) for package in package_rows)
    stage = stage_of(jobs, variants, packages)
    return VersionView(
        model=event.model,
        version=event.version,
        digest=event.digest,
        format=event.format,
        architecture=event.architecture,
        size_bytes=sum(file.size_bytes for file in event.files),
        files=event.files,
        golden=event.golden,
        data=event.data,
        state=row.state,
        stage=stage,
        progress=progress_of(stage, jobs, variants),
        at=event.at,
        aliases=tuple(alias.alias for alias in alias_rows),
        variants=variants,
        packages=packages,
    )
