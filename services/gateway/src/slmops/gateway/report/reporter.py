"""Reports (the reported half of the twin) and measurements. They pass through the spool and survive a lost network."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TypeVar

from prometheus_client import Gauge

from slmops.contracts import subjects
from slmops.contracts.clocks import SENT_AT_HEADER
from slmops.contracts.cloudevent import MESSAGE_ID_HEADER, Envelope, event_id
from slmops.contracts.descriptor import Digest
from slmops.contracts.errors import DiskFull, MessageTooLarge, Problem, TemporaryError
from slmops.contracts.events import GatewayReported, UpdatePhase
from slmops.contracts.freshness import GatewayPresence
from slmops.contracts.measurement import MeasurementBatch
from slmops.contracts.plan import Identity
from slmops.gateway.disk_full import raise_disk_full
from slmops.gateway.report.spool import Kind, Spool, Spooled
from slmops.gateway.serving.measurements import ReleaseMeasurement
from slmops.kit.atomic_write import sync
from slmops.kit.bus.client import BusClient
from slmops.kit.clock import Clock
from slmops.kit.tracing import traceparent

log = logging.getLogger(__name__)
T = TypeVar("T")
_MEMORY_ROWS = 1000
_DIGITS = 20
"""Length of a sequence number on disk, with leading zeros."""
_PROBLEM_LENGTH = 100_000
_WAITING = Gauge("slmops_spool_messages", "Reports and measurements that wait for the network")
_DROPPED = Gauge("slmops_spool_dropped_messages", "Messages ever dropped because the spool was full", ["kind"])


@dataclass(frozen=True)
class Status:
    """The content of a report, without the gateway's identity and the time."""

    phase: UpdatePhase
    running: Digest | None = None
    running_version: str | None = None
    target: Digest | None = None
    problem: Problem | None = None
    plan_generation: int = 0
    measured: Mapping[str, float] = field(default_factory=dict)


@dataclass
class Golden:
    """Counts of the golden prompts that a soak asked since the last batch."""

    passed: int = 0
    failed: int = 0


def _shortened(problem: Problem) -> Problem:
    """Returns a problem that fits into a message, whatever library wrote its text."""
    return problem.model_copy(update={"what": problem.what[:_PROBLEM_LENGTH]})


def _last_sequence(counter: Path, clock: Clock) -> int:
    """Returns the last used sequence number; 0 for a gateway that never reported.

    If a power loss damaged the file, the time in seconds is returned. It is higher than the number of any report, so
    the next report counts as the newest. A truncated number would be lower, and every later report would be ignored.
    """
    try:
        text = counter.read_text(errors="replace")
    except FileNotFoundError:
        return 0
    whole = text.isdecimal() and (len(text) == _DIGITS or not text.startswith("0"))  # earlier releases wrote no zeros
    if not whole:
        log.error("the counter of reports %s is damaged; counting on from the time", counter)
    return int(text) if whole else int(clock().timestamp())


class Reporter:
    """Writes messages to the spool and publishes them when there is a network.

    All disk accesses are made in order by one thread, because the event loop also streams the users' answers.
    """

    def __init__(self, identity: Identity, spool: Spool, counter: Path, clock: Clock) -> None:
        self._identity = identity
        self._spool = spool
        self._memory_spool = Spool(Path(":memory:"), max_rows=_MEMORY_ROWS)
        """The newest messages that did not fit on a full disk. They are sent from memory."""
        self._counter = counter
        self._clock = clock
        self._disk = ThreadPoolExecutor(max_workers=1, thread_name_prefix="spool")
        self._queued = asyncio.Event()
        self._sequence = _last_sequence(counter, clock)
        self._boot = secrets.token_hex(8)
        self._since = clock()
        self._measured = 0
        self._enrolment = 0
        self._last: GatewayReported | None = None
        """The newest report; None before the first, and after one that was lost."""
        self._told = 0
        """How many dropped messages the log mentions."""

    def report_as(self, identity: Identity, enrolment: int) -> None:
        """Reports and measures under this identity and enrolment from now on."""
        self._identity, self._enrolment = identity, enrolment

    def presence(self) -> GatewayPresence:
        """Returns what this gateway says when it has nothing to report."""
        return GatewayPresence(enrolment=self._enrolment, sequence=self._sequence)

    def report_changes(self, status: Status) -> None:
        """Queues a report if it says anything else than the last one since the start of this process."""
        if self._last is None or self._content(self._event(status)) != self._content(self._last):
            self.report(status)

    def _content(self, event: GatewayReported) -> str:
        """Returns what makes a report worth sending. While messages wait for a network, every further report may drop
        another one, so the numbers of dropped ones count only when the spool is empty."""
        ignored = {"sequence", "at"}
        if len(self._spool) + len(self._memory_spool):
            ignored |= {"dropped_reports", "dropped_measurements"}
        return event.model_dump_json(exclude=ignored)

    def _event(self, status: Status) -> GatewayReported:
        return GatewayReported(
            gateway_id=self._identity.gateway_id,
            blueprint=self._identity.blueprint,
            enrolment=self._enrolment,
            sequence=max(1, self._sequence),
            boot=self._boot,
            labels=self._identity.labels,
            phase=status.phase,
            running=status.running,
            running_version=status.running_version,
            target=status.target,
            problem=status.problem and _shortened(status.problem),
            plan_generation=status.plan_generation,
            measured=dict(status.measured),
            dropped_reports=self._spool.dropped(Kind.REPORT, Kind.FAILURE),
            dropped_measurements=self._spool.dropped(Kind.MEASUREMENT),
            at=self._clock(),
        )

    def report(self, status: Status) -> None:
        """Queues a report on disk, or in memory if the disk is full, whether or not anything changed.

        If the disk cannot even store the report's sequence number, the report is lost with a line in the log.
        """
        self._sequence += 1
        self._last = event = self._event(status)
        envelope = Envelope(
            # With the boot: after a loss of the counter the same numbers are other reports.
            id=event_id(self._identity.gateway_id, "reported", self._boot, str(self._sequence)),
            source=f"slmops/gateway/{self._identity.gateway_id}",
            type=event.type,
            time=event.at,
            subject=event.key,
            traceparent=traceparent(),
        )
        kind = Kind.FAILURE if event.phase is UpdatePhase.FAILED else Kind.REPORT
        payload = event.model_dump_json().encode()
        self._write(partial(self._put, event.subject, envelope.headers(), payload, envelope.id, kind, self._sequence))

    def measure(
        self,
        taken: Mapping[Digest, ReleaseMeasurement],
        version_of: Mapping[Digest, str],
        golden: Mapping[Digest, Golden],
    ) -> None:
        """Queues one batch for each release that answered requests since the last call."""
        now = self._clock()
        started, self._since = min(self._since, now), now  # the clock may have been set back in between
        for release in taken.keys() | golden.keys():
            if release in version_of:
                figures, asked = taken.get(release) or ReleaseMeasurement(release), golden.get(release) or Golden()
                self._put_batch(self._batch(figures, asked, version_of[release], started, now))

    def _batch(
        self, figures: ReleaseMeasurement, asked: Golden, version: str, started: datetime, now: datetime
    ) -> MeasurementBatch:
        me = self._identity
        self._measured += 1
        return MeasurementBatch(
            boot=self._boot,
            sequence=self._measured,
            batch_id=event_id(me.gateway_id, "measured", figures.release, started.isoformat(), now.isoformat()),
            gateway_id=me.gateway_id,
            blueprint=me.blueprint,
            release=figures.release,
            version=version,
            started_at=started,
            ended_at=now,
            requests=figures.requests,
            synthetic_requests=min(asked.passed + asked.failed, figures.requests),
            failed_requests=figures.failed,
            golden_passed=asked.passed,
            golden_failed=asked.failed,
            prompt_tokens=figures.prompt_tokens,
            completion_tokens=figures.completion_tokens,
            decode_seconds=figures.decode_s,
            ttft_seconds=figures.ttft_sum_s,
        )

    def _put_batch(self, batch: MeasurementBatch) -> None:
        headers = {MESSAGE_ID_HEADER: batch.batch_id, "content-type": "application/json"}
        if parent := traceparent():
            headers["traceparent"] = parent
        subject = subjects.measurements(batch.gateway_id)
        payload = batch.model_dump_json().encode()
        self._write(partial(self._put, subject, headers, payload, batch.batch_id, Kind.MEASUREMENT))

    def _write(self, work: Callable[[], None]) -> None:
        asyncio.get_running_loop().run_in_executor(self._disk, work).add_done_callback(self._written)

    def _written(self, work: asyncio.Future[None]) -> None:
        if not work.cancelled() and (error := work.exception()):
            self._last = None  # report again: the next report contains the whole status
            log.warning("lost a message for the bus: %s", error, exc_info=not isinstance(error, DiskFull) and error)
        self._count()
        self._queued.set()

    def _put(
        self, subject: str, headers: dict[str, str], payload: bytes, message_id: str, kind: Kind, sequence: int = 0
    ) -> None:
        if sequence:
            self._store_sequence(sequence)
        try:
            self._spool.put(subject, headers, payload, message_id, kind)
        except DiskFull as error:
            log.warning("keeping a message for %s in memory: %s", subjects.template(subject), error)
            self._memory_spool.put(subject, headers, payload, message_id, kind)

    def _count(self) -> None:
        """Updates the metrics, and logs the dropped messages when their number has doubled."""
        _WAITING.set(len(self._spool) + len(self._memory_spool))
        for kind in Kind:
            _DROPPED.labels(kind.name.lower()).set(self._spool.dropped(kind))
        if (dropped := self._spool.dropped(*Kind)) > 2 * self._told:
            self._told = dropped
            log.warning("dropped %d old reports and measurements so far: they waited too long for a network", dropped)

    async def flush(self) -> None:
        """Returns when everything that was queued before is on disk."""
        await self._on_disk(lambda: None)

    async def close(self) -> None:
        """Writes what is queued to the disk. Nothing may be queued afterwards."""
        await asyncio.to_thread(self._disk.shutdown)

    async def _on_disk(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._disk, work)

    async def send(self, client: BusClient) -> None:
        """Publishes the spooled messages in order. Runs until cancelled."""
        while True:
            self._queued.clear()
            try:
                for spool in (self._memory_spool, self._spool):  # memory first: on a full disk, not even a delete works
                    while waiting := await self._on_disk(spool.pending):
                        await self._publish(client, spool, waiting)
            except TemporaryError as error:
                log.info("keeping messages in the spool: %s", error)
                await asyncio.sleep(error.delay.total_seconds())
                continue
            await self._queued.wait()

    async def _publish(self, client: BusClient, spool: Spool, waiting: list[Spooled]) -> None:
        """Publishes messages in order and deletes them in one write.

        After a crash they are sent again, which is harmless, because each has an id.
        """
        last = 0
        try:
            for message in waiting:
                # Added here and not in the spool, because the message may have waited: only now can clocks be compared.
                sent = {SENT_AT_HEADER: self._clock().isoformat()}
                try:
                    await client.store(message.subject, message.payload, message.headers | sent)
                except MessageTooLarge as error:  # it would keep all later messages from being sent
                    log.error("dropped a message: %s", error)
                last = message.id
        finally:
            if last:
                await self._on_disk(partial(spool.done, last))
                self._count()

    def _store_sequence(self, sequence: int) -> None:
        """Stores a sequence number before it is used, so that no number is sent with two different reports.

        Overwrites a few bytes in place. That needs no disk space, so a gateway with a full disk can report it.
        """
        with raise_disk_full("to report", self._counter):
            new = not self._counter.exists()
            with self._counter.open("w" if new else "r+") as out:
                out.write(f"{sequence:0{_DIGITS}d}")
                out.flush()
                os.fsync(out.fileno())
            if new:
                sync(self._counter.parent)
