"""Records gateways' reports in batches. Repetitions and late reports are recognised by the sequence of each gateway."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import Any, Final, NamedTuple

from sqlalchemy import Connection

from slmops.contracts.errors import CredentialRevoked, Denied, PermanentError
from slmops.contracts.events import GatewayEnrolled, GatewayReported, UpdatePhase
from slmops.rollout import inventory_rows, presence_rows, progress_rows
from slmops.rollout.domain.fleet import Sighting
from slmops.rollout.domain.report_order import counter_restarted
from slmops.rollout.domain.stages import Staging, check_given
from slmops.rollout.inventory_rows import sighting
from slmops.rollout.presence_rows import Seen
from slmops.rollout.progress_rows import Located, labels_of
from slmops.rollout.tables import GATEWAYS, change_all

# Reports of intermediate steps decide nothing, and a large fleet sends many.
_DECISIVE: Final = frozenset({UpdatePhase.COMMITTED, UpdatePhase.FAILED})


class Report(NamedTuple):
    event: GatewayReported
    seen: Sighting


@dataclass
class Recorded:
    """What became of a batch, by the numbers of its reports. `changed`: blueprints whose rollout's progress changed.

    `unknown`: reports of gateways that are not enrolled here, which were not recorded.
    """

    refused: dict[int, Exception] = field(default_factory=dict)
    unknown: list[int] = field(default_factory=list)
    changed: set[str] = field(default_factory=set)


class _Gateway:
    """A gateway's row, and what the batch changes in it."""

    def __init__(self, row: Any) -> None:
        self.row = row
        self.sequence: int = row.sequence
        self.newest: Report | None = None
        self.failed: GatewayReported | None = None

    def apply(self, report: Report) -> None:
        """Keeps the report if it is the newest, and if it is the newest failure. Newest is the highest sequence.

        A report that waited on the gateway since an earlier enrolment changes nothing. Raises `CredentialRevoked`, and
        `Denied` if the report names another blueprint than the enrolment.
        """
        event, row = report.event, self.row
        if row.revoked_at is not None:
            raise CredentialRevoked(f"{event.gateway_id} was revoked, so its reports do not count")
        if 0 < event.enrolment < row.enrolment or self._left(event.blueprint):
            return
        if row.blueprint != event.blueprint:
            raise Denied(f"{event.gateway_id} is enrolled under {row.blueprint} but reports for {event.blueprint}")
        if not all(map(isfinite, event.measured.values())):
            # JSON has no NaN: it would be written as null, and then the report could not be read.
            event = event.model_copy(update={"measured": {k: v for k, v in event.measured.items() if isfinite(v)}})
        newest = event.sequence > self.sequence or self._counter_restarted(event, report.seen)
        if newest:
            self.sequence, self.newest = event.sequence, Report(event, report.seen)
        # A failure counts even if a later report arrived first.
        if event.phase is UpdatePhase.FAILED and (
            newest or self.failure is None or event.sequence > self.failure.sequence
        ):
            self.failed = event

    def _counter_restarted(self, event: GatewayReported, seen: Sighting) -> bool:
        if self.newest is not None:
            return counter_restarted(event, seen, *self.newest)
        if (known := _report(self.row.report)) is None:
            return False
        return counter_restarted(event, seen, known, sighting(self.row) or Sighting(known.at))

    def _left(self, blueprint: str) -> bool:
        """Returns whether the gateway's newest enrolment moved it away from this blueprint."""
        return (
            blueprint != self.row.blueprint
            and GatewayEnrolled.model_validate_json(self.row.enrolled).moved_from == blueprint
        )

    @property
    def failure(self) -> GatewayReported | None:
        if self.failed is not None or not self.row.failure:
            return self.failed
        return GatewayReported.model_validate_json(self.row.failure)

    @property
    def changed(self) -> bool:
        return self.newest is not None or self.failed is not None

    def located(self) -> Located:
        if self.row.moving_to is not None:
            return progress_rows.located(self.row)
        report = self.newest.event if self.newest else _report(self.row.report)
        return Located(self.row.gateway_id, self.row.blueprint, self.labels(), report, self.failure)

    def labels(self) -> dict[str, str]:
        return labels_of(self.newest.event if self.newest else _report(self.row.report), self.row.enrolled)

    @property
    def relabelled(self) -> bool:
        return bool(self.row.labels != inventory_rows.labels_text(self.labels()))

    def columns(self) -> dict[str, Any]:
        """Returns the columns of the row that the newest report determines."""
        assert self.newest is not None
        event = self.newest.event
        return {
            "gateway_id": event.gateway_id,
            "sequence": event.sequence,
            "report": event.model_dump_json(),
            "labels": inventory_rows.labels_text(self.labels()),
            **inventory_rows.values_of(event),
        }


def _report(data: str | None) -> GatewayReported | None:
    return GatewayReported.model_validate_json(data) if data else None


def record_reports(connection: Connection, reports: Mapping[int, Report]) -> Recorded:
    """Records a batch of reports in their order. A report that is refused changes nothing, and no other report.

    Writers take turns (`kit.journal`), so no other process changes the rows between reading and writing.
    Growth: at most 13 statements for a batch, whatever its length and the size of the fleet.
    """
    recorded = Recorded()
    ids = {report.event.gateway_id for report in reports.values()}
    under_way = progress_rows.stagings(connection, {report.event.blueprint for report in reports.values()})
    query = inventory_rows.with_sightings().where(GATEWAYS.c.gateway_id.in_(ids), GATEWAYS.c.enrolled.is_not(None))
    gateways = {row.gateway_id: _Gateway(row) for row in connection.execute(query)}
    for number, report in reports.items():
        try:
            _check(report.event, under_way.get(report.event.blueprint))
            known = gateways.get(report.event.gateway_id)
            if known is None:
                recorded.unknown.append(number)
            else:
                known.apply(report)
        except PermanentError as error:
            recorded.refused[number] = error
    changed = [gateway for gateway in gateways.values() if gateway.changed]
    _write(connection, changed)
    placed = [gateway.located() for gateway in changed if gateway.row.blueprint in under_way]
    recorded.changed = progress_rows.update_places(connection, placed)
    return recorded


def _check(event: GatewayReported, staging: Staging | None) -> None:
    """Raises `Denied` for a decisive report that the open stages do not allow."""
    if staging is not None and staging.judged and event.phase in _DECISIVE:
        check_given(event, staging)


def _write(connection: Connection, changed: Collection[_Gateway]) -> None:
    reported = [gateway for gateway in changed if gateway.newest]
    newest = [gateway.newest for gateway in changed if gateway.newest]
    failed = [gateway.failed for gateway in changed if gateway.failed]
    change_all(connection, GATEWAYS, "gateway_id", [gateway.columns() for gateway in reported])
    relabelled = {gateway.row.gateway_id: gateway.labels() for gateway in reported if gateway.relabelled}
    inventory_rows.put_labels(connection, relabelled)
    failures = [{"gateway_id": event.gateway_id, "failure": event.model_dump_json()} for event in failed]
    change_all(connection, GATEWAYS, "gateway_id", failures)
    presence_rows.saw(connection, [Seen(report.event.gateway_id, report.seen) for report in newest])
