"""Reports (the reported half of the twin) and measurements. They pass through the spool and survive a lost network."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from slmops.contracts import subjects
from slmops.contracts.cloudevent import MESSAGE_ID_HEADER, Envelope, event_id
from slmops.contracts.descriptor import Digest
from slmops.contracts.errors import DiskFull, Problem, TemporaryError
from slmops.contracts.events import GatewayReported, UpdatePhase
from slmops.contracts.measurement import MeasurementBatch
from slmops.contracts.plan import Identity
from slmops.gateway.disk_full import raise_disk_full
from slmops.gateway.report.spool import Spool
from slmops.gateway.serving.measurements import ReleaseMeasurement
from slmops.kit.bus.client import BusClient
from slmops.kit.clock import Clock
from slmops.kit.tracing import traceparent

log = logging.getLogger(__name__)
_MEMORY_ROWS = 1000


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


class Reporter:
    """Writes messages to the spool at once and publishes them when there is a network."""

    def __init__(self, identity: Identity, spool: Spool, counter: Path, clock: Clock) -> None:
        self._identity = identity
        self._spool = spool
        self._memory_spool = Spool(Path(":memory:"), max_rows=_MEMORY_ROWS)
        """The newest messages that did not fit on a full disk. They are sent from memory."""
        self._counter = counter
        self._clock = clock
        self._queued = asyncio.Event()
        self._sequence = int(counter.read_text() or 0) if counter.exists() else 0
        self._since = clock()

    def report(self, status: Status) -> None:
        """Queues a report on disk, or in memory if the disk is full.

        Raises `DiskFull` if the disk cannot even store the report's sequence number.
        """
        self._sequence += 1
        self._store_sequence(self._sequence)
        event = GatewayReported(
            gateway_id=self._identity.gateway_id,
            blueprint=self._identity.blueprint,
            sequence=self._sequence,
            labels=self._identity.labels,
            phase=status.phase,
            running=status.running,
            running_version=status.running_version,
            target=status.target,
            problem=status.problem,
            plan_generation=status.plan_generation,
            measured=dict(status.measured),
            at=self._clock(),
        )
        envelope = Envelope(
            id=event_id(self._identity.gateway_id, "reported", str(self._sequence)),
            source=f"slmops/gateway/{self._identity.gateway_id}",
            type=event.type,
            time=event.at,
            subject=event.key,
            traceparent=traceparent(),
        )
        self._put(event.subject, envelope.headers(), event.model_dump_json().encode(), envelope.id, droppable=False)

    def measure(
        self,
        taken: Mapping[Digest, ReleaseMeasurement],
        version_of: Mapping[Digest, str],
        golden: Mapping[Digest, Golden],
    ) -> None:
        """Queues one batch for each release that answered requests since the last call."""
        started, now = self._since, self._clock()
        self._since = now
        for release in taken.keys() | golden.keys():
            if release in version_of:
                figures, asked = taken.get(release) or ReleaseMeasurement(release), golden.get(release) or Golden()
                self._put_batch(self._batch(figures, asked, version_of[release], started, now))

    def _batch(
        self, figures: ReleaseMeasurement, asked: Golden, version: str, started: datetime, now: datetime
    ) -> MeasurementBatch:
        me = self._identity
        return MeasurementBatch(
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
        self._put(subject, headers, batch.model_dump_json().encode(), batch.batch_id, droppable=True)

    def _put(self, subject: str, headers: dict[str, str], payload: bytes, message_id: str, *, droppable: bool) -> None:
        try:
            self._spool.put(subject, headers, payload, message_id, droppable=droppable)
        except DiskFull as error:
            log.warning("keeping a message for %s in memory: %s", subjects.template(subject), error)
            self._memory_spool.put(subject, headers, payload, message_id, droppable=True)
        self._queued.set()

    async def send(self, client: BusClient) -> None:
        """Publishes the spooled messages in order. Runs until cancelled."""
        while True:
            self._queued.clear()
            try:
                for spool in (self._memory_spool, self._spool):  # memory first: on a full disk, not even a delete works
                    while waiting := spool.pending():
                        for message in waiting:
                            await client.store(message.subject, message.payload, message.headers)
                            spool.done([message.id])
            except TemporaryError as error:
                log.info("keeping messages in the spool: %s", error)
                await asyncio.sleep(error.delay.total_seconds())
                continue
            await self._queued.wait()

    def _store_sequence(self, sequence: int) -> None:
        """Stores a sequence number before it is used, so that no number is sent with two different reports.

        Overwrites a few bytes in place. That needs no disk space, so a gateway with a full disk can report it.
        """
        with (
            raise_disk_full("to report", self._counter),
            self._counter.open("r+" if self._counter.exists() else "w") as out,
        ):
            out.write(f"{sequence:020d}")
            out.flush()
            os.fsync(out.fileno())
