"""Handles presence messages: records when each gateway was last seen, and finds reports that this service lacks.

A presence message names its gateway's newest report. A report with this sequence was sent minutes before the next
presence message. If it is still not recorded then, it is read from its stream: this database was lost or restored, or
the consumer of reports was moved past it. A gateway that this database does not know is learned from the bus as well.

Growth: one transaction of two calls of the database for each batch of up to 256 messages, whatever the size of the
fleet. Reads from the bus happen only for gateways that are missing something.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

from slmops.contracts.clocks import SENT_AT_HEADER, time_in
from slmops.contracts.cloudevent import Envelope
from slmops.contracts.errors import CredentialRevoked, Denied, PermanentError, TemporaryError
from slmops.contracts.events import GatewayEnrolled, GatewayReported
from slmops.contracts.freshness import GatewayPresence
from slmops.contracts.subjects import presence, present_gateway
from slmops.kit.bus.batches import Received, Refused
from slmops.kit.bus.client import BusClient
from slmops.kit.bus.service_bus import Batch, Bus, MessageContext
from slmops.kit.journal import Journal, UnitOfWork
from slmops.rollout import membership_rows, presence_rows, store
from slmops.rollout.domain.fleet import Sighting
from slmops.rollout.domain.membership import State
from slmops.rollout.presence_rows import Seen

log = logging.getLogger("slmops.rollout")
EnrolmentOf = Callable[[str], Awaitable[GatewayEnrolled | None]]
Report = Received[GatewayReported, MessageContext]
ReportOf = Callable[[str], Awaitable[Report | None]]
RecordReports = Callable[[Batch[GatewayReported]], Awaitable[Refused]]
Messages = Mapping[int, Received[GatewayPresence, MessageContext]]
_GONE = {State.REVOKED: "revoked", State.REMOVED: "removed"}


@dataclass
class _Outcome:
    """What a batch led to. `unknown`: messages whose gateway, or its newest enrolment, is not in the database;
    `missing`: the sequence of the newest recorded report by gateway, for those that sent a newer one."""

    refused: dict[int, Exception] = field(default_factory=dict)
    unknown: list[int] = field(default_factory=list)
    missing: dict[str, int] = field(default_factory=dict)


class PresenceHandlers:
    def __init__(
        self, journal: Journal, enrolment_of: EnrolmentOf, report_of: ReportOf, record_reports: RecordReports
    ) -> None:
        self._journal = journal
        self._enrolment_of = enrolment_of
        self._report_of = report_of
        self._record_reports = record_reports

    async def on_presence(self, received: Batch[GatewayPresence]) -> Refused:
        """Records presence messages in one transaction.

        Returns `CredentialRevoked` for those of a gateway that was revoked or removed, `Denied` for those of a gateway
        that was never enrolled.
        """
        messages = dict(enumerate(received))
        outcome = await self._journal.transact(lambda unit: _record(unit, messages))
        if outcome.unknown:
            later = await self._record_with_enrolments({index: messages[index] for index in outcome.unknown})
            outcome.refused |= later.refused
            outcome.missing |= later.missing
        await self._recover(outcome.missing)
        return outcome.refused

    async def _record_with_enrolments(self, messages: Messages) -> _Outcome:
        """Reads enrolments from the bus, which keeps our own enrolment events, if our database is younger."""
        found = await asyncio.gather(*map(self._enrolled, messages.values()))
        enrolments = dict(zip(messages, found, strict=True))

        def work(unit: UnitOfWork) -> _Outcome:
            refused: dict[int, Exception] = {}
            for index, enrolled in enrolments.items():
                error = enrolled if isinstance(enrolled, Exception) else _learn(unit, enrolled)
                if error is not None:
                    refused[index] = error
            left = {index: message for index, message in messages.items() if index not in refused}
            outcome = _record(unit, left, learned=True)
            outcome.refused |= refused
            return outcome

        return await self._journal.transact(work)

    async def _enrolled(self, message: Received[GatewayPresence, MessageContext]) -> GatewayEnrolled | PermanentError:
        gateway_id = present_gateway(message.context.subject)
        try:
            enrolled = await self._enrolment_of(gateway_id)
        except PermanentError as error:
            return error
        return enrolled or Denied(f"{gateway_id} says that it is connected but was never enrolled")

    async def _recover(self, missing: Mapping[str, int]) -> None:
        """Records the reports that are on their stream and not in our database. The next presence message of a gateway
        tries again."""
        if not missing:
            return
        try:
            found = await asyncio.gather(*map(self._report_of, missing))
            lost = [one for one in found if one is not None and one.body.sequence > missing[one.body.gateway_id]]
            refused = await self._record_reports(lost) if lost else {}
        except TemporaryError as error:
            log.warning("could not read missing reports, retrying later: %s", error)
            return
        for index, reason in refused.items():
            log.info("a missing report of %s does not count: %s", lost[index].body.gateway_id, reason)
        if lost:
            log.warning("recorded %d reports that were missing", len(lost) - len(refused))


def _record(unit: UnitOfWork, messages: Messages, *, learned: bool = False) -> _Outcome:
    """`learned`: the enrolments were read from the bus, so nothing is unknown any more."""
    outcome, seen = _Outcome(), list[Seen]()
    ids = {index: present_gateway(message.context.subject) for index, message in messages.items()}
    known = presence_rows.known(unit.connection, set(ids.values()))
    for index, (body, context) in messages.items():
        gateway_id, row = ids[index], known.get(ids[index])
        if row is not None and row.revoked:
            outcome.refused[index] = CredentialRevoked(f"{gateway_id} was revoked, so it is not present")
        elif row is None or (body.enrolment > row.enrolment and not learned):
            outcome.unknown.append(index)
        elif 0 < body.enrolment < row.enrolment:
            continue  # of the device before, or on its way to another blueprint
        else:
            seen.append(Seen(gateway_id, Sighting(context.arrived_at, context.clock_ahead), body.sequence))
            told = body.sequence if learned else min(body.sequence, row.last_sequence or 0)
            if told > row.sequence:
                outcome.missing[gateway_id] = row.sequence
    presence_rows.saw(unit.connection, seen)
    return outcome


def _learn(unit: UnitOfWork, enrolled: GatewayEnrolled) -> Exception | None:
    """Records an enrolment that only the bus has. Returns an error if the gateway is gone by our own history."""
    member = membership_rows.load(unit, enrolled.gateway_id)
    if member.state in _GONE:
        return CredentialRevoked(f"{enrolled.gateway_id} was {_GONE[member.state]}, so it is not present")
    if member.enrolments < enrolled.enrolment:
        store.project(unit.connection, enrolled)
    return None


def reports_on(client: Callable[[], BusClient]) -> ReportOf:
    """Returns a function that reads the newest report of a gateway from its stream, with its context. It raises
    `Unreachable`."""

    async def report_of(gateway_id: str) -> Report | None:
        message = await client().last_message(GatewayReported, gateway_id)
        if message is None or message.time is None:
            return None
        try:
            event = GatewayReported.model_validate_json(message.data or b"")
            envelope = Envelope.from_headers(message.headers)
        except (ValueError, PermanentError):
            return None  # its consumer dead-lettered it
        if event.gateway_id != gateway_id:
            return None
        headers = {key.lower(): value for key, value in (message.headers or {}).items()}
        sent_at = time_in(headers.get(SENT_AT_HEADER))
        context = MessageContext(
            envelope.id, message.subject or "", None, _nothing, arrived_at=message.time, sent_at=sent_at
        )
        return Received(event, context)

    return report_of


async def _nothing() -> None:
    """Keeps nothing alive: nobody waits for an acknowledgement of a message that was read directly."""


def routes(bus: Bus, handlers: PresenceHandlers) -> None:
    bus.consume_batches(presence("*"), GatewayPresence, handlers.on_presence, with_ids=False)
