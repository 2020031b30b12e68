"""The journals of the services: rows for each of their tables, made of real events, and queries of their state."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from types import ModuleType
from typing import Any, NamedTuple

from contract.wire_examples import AT, BEFORE, BLUEPRINT, DOCUMENTS, LATER, TRACEPARENT, digest
from contract.wire_examples import EVENTS as EXAMPLES
from pydantic_core import to_jsonable_python
from sqlalchemy import Connection, MetaData

from slmops.access import store as access
from slmops.contracts import events as e
from slmops.contracts.commands import AbortRollout, ApplyBlueprint, StartRollout
from slmops.contracts.identity import Role
from slmops.contracts.plan import Identity
from slmops.kit.journal import Journal, UnitOfWork, journal_tables
from slmops.packager import store as packager
from slmops.registry import store as registry
from slmops.rollout import inventory_rows
from slmops.rollout import store as rollout
from slmops.rollout.domain.decide import apply_blueprint, operate, start_rollout
from slmops.rollout.domain.fleet import Sighting
from slmops.rollout.report_rows import Recorded, Report, record_reports
from slmops.telemetry import repetitions, sums
from slmops.telemetry import store as telemetry
from slmops.telemetry.domain.expectation import Enrolled
from slmops.telemetry.domain.windows import Pending

MODEL, CONSUMED = "smollm2", "9b2f6e0c-consumed"
WINDOW = timedelta(seconds=5)
_EXAMPLE: dict[type[e.Event], Any] = {type(event): event for event in EXAMPLES}


class Kept(NamedTuple):
    """A journal: its service's `store`, a transaction that puts rows into every table, and a query of the state."""

    store: ModuleType
    fill: Callable[[UnitOfWork], None]
    read: Callable[[Connection], dict[str, Any]]

    def metadata(self) -> MetaData:
        """Returns the tables of this release: the service's and those of every journal."""
        metadata: MetaData = self.store.schema()
        journal_tables(metadata)
        return metadata

    def journal(self, service: str, url: str) -> Journal:
        return Journal(
            url,
            service=service,
            metadata=self.store.schema(),
            migrations=self.store.MIGRATIONS,
            project=self.store.project,
            clock=lambda: LATER,
        )


def _fill_registry(unit: UnitOfWork) -> None:
    registered = _EXAMPLE[e.ModelVersionRegistered]
    older = registered.model_copy(update={"version": BEFORE})
    own = [older, registered, _EXAMPLE[e.ModelAliasMoved], _EXAMPLE[e.ModelVersionRetired]]
    unit.append(registry.stream(MODEL), 0, own)
    for kind in (e.VariantStarted, e.VariantProgressed, e.VariantOptimized, e.VariantRejected, e.PackagePublished):
        registry.project(unit.connection, _EXAMPLE[kind])
    for sequence, kind in enumerate((e.VariantOptimized, e.PackagePublished, e.PackageWithdrawn), start=1):
        registry.name(unit.connection, _EXAMPLE[kind])
        registry.set_read_until(unit.connection, kind.type, sequence)


def _read_registry(connection: Connection) -> dict[str, Any]:
    kinds = (e.VariantOptimized, e.PackagePublished, e.PackageWithdrawn)
    return {
        "views": registry.views(connection),
        "named": _unordered(registry.named(connection)),
        "withdrawn": registry.withdrawn(connection),
        "heard": {kind.type: registry.read_until(connection, kind.type) for kind in kinds},
    }


def _fill_packager(unit: UnitOfWork) -> None:
    published = _EXAMPLE[e.PackagePublished]
    gone = _EXAMPLE[e.PackageWithdrawn]
    older = published.model_copy(
        update={"version": BEFORE, "manifest": published.manifest.model_copy(update={"digest": gone.manifest})}
    )
    delta = _EXAMPLE[e.PackageDeltaPublished]
    other = delta.model_copy(update={"base": digest("7")})
    unit.append(packager.stream(MODEL, BEFORE, "edge-small"), 0, [older, gone])
    unit.append(
        packager.stream(MODEL, published.version, "edge-small"),
        0,
        [published, delta, other, _EXAMPLE[e.PackageDeltaWithdrawn]],
    )
    for kind in (e.GatewayEnrolled, e.GatewayReported):
        packager.project(unit.connection, _EXAMPLE[kind])
    files = packager.TrustFiles(unit.connection, AT)
    for version in (1, 2):
        files.put("root", version, b'{"signed": {"version": %d}}' % version)
    files.put_model_key(MODEL, b"-----BEGIN PUBLIC KEY-----\n")


def _read_packager(connection: Connection) -> dict[str, Any]:
    files = packager.TrustFiles(connection, AT)
    return {
        "packages": _unordered(packager.packages(connection)),
        "all packages": _unordered(packager.all_packages(connection)),
        "running": packager.running(connection),
        "deltas": _unordered(packager.deltas_of(connection, MODEL)),
        "blueprint": packager.blueprint_of(connection, "gw-1"),
        "roots": [packager.metadata(connection, "root", version) for version in packager.root_versions(connection)],
        "model key": files.model_key(MODEL),
    }


def _fill_rollout(unit: UnitOfWork) -> None:
    package = _EXAMPLE[e.PackagePublished]
    unit.append("gateway:gw-1", 0, [_EXAMPLE[e.GatewayEnrolled]])
    for sequence, phase in ((7, e.UpdatePhase.FAILED), (8, e.UpdatePhase.IDLE)):
        report = _EXAMPLE[e.GatewayReported].model_copy(update={"sequence": sequence, "phase": phase})
        seen = Sighting.of(report, report.at, None)
        assert record_reports(unit.connection, {0: Report(report, seen)}) == Recorded()
    rollout.record_package(unit.connection, package)
    rollout.record_withdrawal(unit.connection, _EXAMPLE[e.PackageWithdrawn])
    rollout.record_window(unit.connection, "window-1", _EXAMPLE[e.CohortMeasured])

    name = BLUEPRINT.name
    state = rollout.load(unit, name)
    state = rollout.commit(unit, state, apply_blueprint(state, ApplyBlueprint(spec=BLUEPRINT), AT), AT)
    start = StartRollout(blueprint=name, version=package.version)
    state = rollout.commit(unit, state, start_rollout(state, start, [package], AT), AT)
    abort = AbortRollout(blueprint=name, reason="asked by the operator")
    state = rollout.commit(unit, state, operate(state, abort, AT), AT)
    rollout.commit(unit, state, start_rollout(state, start, [package], LATER), LATER)


def _read_rollout(connection: Connection) -> dict[str, Any]:
    return {
        "members": inventory_rows.members(connection),
        "packages": rollout.packages(connection, MODEL),
        "windows": rollout.windows(connection, BLUEPRINT.name, AT.replace(year=2000)),
        "plans": [(row.name, row.plan, row.judged) for row in rollout.plans(connection)],
        "ended": rollout._ended_view(connection, f"{BLUEPRINT.name}-1"),
    }


def _fill_telemetry(unit: UnitOfWork) -> None:
    measured: Any = DOCUMENTS["measure"]
    pending = repetitions.first_times(unit, [Pending(measured, measured.ended_at, TRACEPARENT)], AT)
    sums.add(unit.connection, pending, WINDOW)
    identity = Identity(gateway_id="gw-1", blueprint="edge-chat", labels={"ring": "a"})
    telemetry.record_member(unit.connection, Enrolled(identity, "", AT.replace(year=1970)))
    facts = [_EXAMPLE[kind] for kind in (e.RolloutStarted, e.RolloutStageAdvanced)]
    telemetry.record_rollouts(unit.connection, list(enumerate(facts, start=1)))
    unit.emit("window:edge-chat", [_EXAMPLE[e.CohortMeasured]])


def _read_telemetry(connection: Connection) -> dict[str, Any]:
    started = _EXAMPLE[e.RolloutStarted]
    enrolled = telemetry.member(connection, "gw-1")
    releases = [started.stable.manifest.digest, started.candidate.manifest.digest]
    return {
        "open": sums.ended(connection, LATER.replace(year=2100), WINDOW),
        "member": enrolled and enrolled.identity,
        "offers": [telemetry.offers(connection, "edge-chat", release) for release in releases],
        "caught up": telemetry.caught_up(connection),
    }


def _unordered(found: list[Any]) -> list[Any]:
    return sorted((to_jsonable_python(one) for one in found), key=repr)


def _fill_access(unit: UnitOfWork) -> None:
    added = _EXAMPLE[e.UserAdded]
    bob = added.model_copy(update={"user": "bob", "role": Role.ADMIN})
    unit.append(access.stream("alice"), 0, [added, _EXAMPLE[e.UserRenewed], _EXAMPLE[e.UserRevoked]])
    unit.append(access.stream("bob"), 0, [bob])
    access.record_gateway(unit.connection, _EXAMPLE[e.GatewayRevoked])


def _read_access(connection: Connection) -> dict[str, Any]:
    return {
        "people": access.page(connection, "", 10),
        "revoked": {holders: access.revoked_keys(connection, holders, AT) for holders in access.Holders},
        "admins": access.other_admins(connection, "alice", AT),
    }


JOURNALS = {
    "access": Kept(access, _fill_access, _read_access),
    "registry": Kept(registry, _fill_registry, _read_registry),
    "packager": Kept(packager, _fill_packager, _read_packager),
    "rollout": Kept(rollout, _fill_rollout, _read_rollout),
    "telemetry": Kept(telemetry, _fill_telemetry, _read_telemetry),
}


async def fill(service: str, journal: Journal) -> None:
    """Puts rows into every table of an open, empty journal."""

    def work(unit: UnitOfWork) -> None:
        assert unit.first_time(service, CONSUMED)
        JOURNALS[service].fill(unit)

    await journal.transact(work)
    await journal.published([(await journal.outbox())[0].position])


async def state(service: str, journal: Journal) -> Any:
    """Returns what the service and the relay read from an open journal, as JSON values."""
    tables = await journal.read(JOURNALS[service].read)
    unknown = await journal.transact(lambda unit: unit.first_time(service, CONSUMED))
    recorded, outbox = await journal.history(), await journal.outbox()
    return to_jsonable_python(
        {
            **tables,
            "history": [
                {"position": one.position, "headers": one.envelope.headers(), "event": one.event} for one in recorded
            ],
            "outbox": [one.position for one in outbox],
            "consumed": not unknown,
        }
    )
