"""How fast a service works off messages that waited for it, and the same messages in a bare loop.

The service was stopped while the gateways reported, as in an upgrade of the control plane. Only consuming is measured:
the gateways are quiet meanwhile.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from bench.fleet_deployment import REPORTS
from bench.fleet_gateway import UPDATE, Gateway
from bench.fleet_rollout import STAGES, Fleet, begin, not_recorded
from bench.fleet_simulator import REQUESTS
from nats.aio.msg import Msg
from nats.js.api import ConsumerConfig, DeliverPolicy
from sqlalchemy import Connection, create_engine, event, text

from slmops.contracts.subjects import measurements

ROUNDS = 3
GATEWAYS = 5_000
"""Gateways that report in each round, once for each phase of an update: the stream keeps no more of one gateway."""
BATCHES_PER_GATEWAY, MEASURING = 8, 5_000
_BATCH = 256
_IDLE_SHARE, _IDLE_S = 0.1, 2.0
_TABLES = (
    "CREATE TABLE gateways (gateway_id VARCHAR(63) PRIMARY KEY, sequence BIGINT, report TEXT)",
    "CREATE TABLE sightings (gateway_id VARCHAR(63) PRIMARY KEY, at DOUBLE PRECISION)",
    "CREATE TABLE members (gateway_id VARCHAR(63) PRIMARY KEY, progress VARCHAR(16))",
    "CREATE TABLE counts (progress VARCHAR(16) PRIMARY KEY, gateways INTEGER)",
)
_FILL = (
    "INSERT INTO gateways VALUES (:id, 0, '')",
    "INSERT INTO sightings VALUES (:id, 0)",
    "INSERT INTO members VALUES (:id, 'waiting')",
)
_RECORD = (
    "UPDATE gateways SET sequence = :sequence, report = :report WHERE gateway_id = :id AND sequence < :sequence",
    "UPDATE sightings SET at = :at WHERE gateway_id = :id",
    "UPDATE members SET progress = :phase WHERE gateway_id = :id",
)
_COUNT = "UPDATE counts SET gateways = gateways + :more WHERE progress = 'committed'"


@dataclass(frozen=True)
class Drained:
    """What a process needed for messages that waited for it."""

    messages: int
    per_s: float
    cpu_s: float

    @property
    def cpu_ms(self) -> float:
        return self.cpu_s * 1000 / self.messages


async def drain(fleet: Fleet, service: str, subject: str) -> Drained:
    """Starts a service and measures from the first handled message on; its start does not count."""
    deployed = fleet.deployed
    waiting = await deployed.unhandled(service, subject)
    starting = asyncio.create_task(deployed.start(service))
    try:
        while (left := await deployed.unhandled(service, subject)) == waiting:
            if starting.done():
                starting.result()
            fleet.tell(f"{waiting:,} messages wait for {service}")
            await asyncio.sleep(0.02)
        began, first, cpu = time.perf_counter(), left, deployed.cpu_s(service)
        while left := await deployed.unhandled(service, subject):
            fleet.tell(f"{left:,} of {waiting:,} messages for {service} left")
            await asyncio.sleep(0.05)
        took, cpu = time.perf_counter() - began, deployed.cpu_s(service) - cpu
    finally:
        await starting
    return Drained(max(1, first), first / max(took, 1e-3), cpu)


async def measure_reports(fleet: Fleet, version: str) -> dict[str, Any]:
    """Measures reports during a rollout to all gateways, which its gate holds, because nobody measures requests."""
    simulator, deployed = fleet.simulator, fleet.deployed
    simulator.updates = False
    rollout = await begin(fleet, version, STAGES[-1:])
    await fleet.until(lambda: _done(simulator.decided), lambda: f"{rollout}: gateways decide")
    await quiet(fleet, "rollout")
    sample = _spread(simulator.gateways, GATEWAYS)
    count = len(sample) * len(UPDATE)
    bare, ours = [], []
    for number in range(1, ROUNDS + 1):
        await deployed.stop("rollout")
        fleet.tell(f"round {number} of {ROUNDS}: publishing {count:,} reports")
        first = await deployed.last_sequence(REPORTS) + 1
        await simulator.go_through_updates(sample)
        bare.append(await _bare(fleet, first, count, number))
        ours.append(await drain(fleet, "rollout", REPORTS))
    return {
        "reports": count * ROUNDS,
        "reports_per_s": round(median(one.per_s for one in ours), 1),
        "raw_pull_per_s": round(median(bare), 1),
        "cpu_ms_per_report": round(median(one.cpu_ms for one in ours), 4),
        "rounds": [{"ours": round(o.per_s, 1), "bare": round(b, 1)} for o, b in zip(ours, bare, strict=True)],
        "not_recorded": await not_recorded(deployed, sample),
    }


async def measure_batches(fleet: Fleet) -> dict[str, Any]:
    """Measures batches of measurements that waited for the telemetry service."""
    deployed, simulator = fleet.deployed, fleet.simulator
    letters = await deployed.dead_letters()
    await fleet.handled("telemetry", measurements("*"))
    await deployed.stop("telemetry")
    sample = _spread(simulator.gateways, MEASURING)
    fleet.tell(f"publishing {len(sample) * BATCHES_PER_GATEWAY:,} batches of measurements")
    await simulator.measure(sample, BATCHES_PER_GATEWAY)
    found = await drain(fleet, "telemetry", measurements("*"))
    return {
        "batches": len(sample) * BATCHES_PER_GATEWAY,
        "measurement_batches_per_s": round(found.per_s, 1),
        "samples_per_s": round(found.per_s * REQUESTS, 1),
        "cpu_ms_per_batch": round(found.cpu_ms, 4),
        "dead_letters": await deployed.dead_letters() - letters,
    }


async def quiet(fleet: Fleet, service: str) -> None:
    """Waits until a service has finished what it does at the start of a rollout: it uses hardly any processor time."""
    used = fleet.deployed.cpu_s(service)
    while True:
        await asyncio.sleep(_IDLE_S)
        before, used = used, fleet.deployed.cpu_s(service)
        if used - before < _IDLE_SHARE * _IDLE_S:
            return
        fleet.tell(f"{service} works")


def _spread(gateways: Sequence[Gateway], count: int) -> list[Gateway]:
    """Returns up to `count` gateways, evenly spread."""
    step = max(1, len(gateways) // count)
    return list(gateways[::step][:count])


async def _done(condition: bool) -> bool:
    return condition


# ---- the bare loop ----------------------------------------------------------------------------------------


async def _bare(fleet: Fleet, begin: int, count: int, number: int) -> float:
    """Returns messages per second of nats-py's fetch, one transaction of the same changes, and an ack for each."""
    js = fleet.deployed.client.js
    config = ConsumerConfig(
        deliver_policy=DeliverPolicy.BY_START_SEQUENCE, opt_start_seq=begin, max_ack_pending=2 * _BATCH
    )
    durable = f"bench-{number}"
    pull = await js.pull_subscribe(REPORTS, durable, "GATEWAYS", config=config)
    commit, close = await asyncio.to_thread(_database, fleet, number)
    done = first = 0
    started = time.perf_counter()
    try:
        while done < count:
            messages = await pull.fetch(_BATCH, timeout=30)
            await asyncio.to_thread(commit, messages)
            for message in messages:
                await message.ack()
            done += len(messages)
            if not first and done < count:  # from the first handled message to the last, as for the service
                first, started = done, time.perf_counter()
        return (count - first) / (time.perf_counter() - started)
    finally:
        await pull.unsubscribe()
        await js.delete_consumer("GATEWAYS", durable)
        await asyncio.to_thread(close)


def _database(fleet: Fleet, number: int) -> tuple[Callable[[Sequence[Msg]], None], Callable[[], None]]:
    """Returns a function that records messages in a database like the service's, and one that closes it."""
    deployed = fleet.deployed
    engine = create_engine(deployed.new_database(f"bare_{number}"))
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", lambda connection, _: connection.execute("PRAGMA journal_mode=WAL"))
    rows = [{"id": gateway.identity.gateway_id} for gateway in fleet.simulator.gateways]
    with engine.begin() as connection:
        for statement in _TABLES:
            connection.execute(text(statement))
        for statement in _FILL:
            connection.execute(text(statement), rows)
        connection.execute(text("INSERT INTO counts VALUES ('committed', 0)"))

    def commit(messages: Sequence[Msg]) -> None:
        rows = [_values(message) for message in messages]
        with engine.begin() as connection:
            _record(connection, rows)

    return commit, engine.dispose


def _record(connection: Connection, rows: Sequence[dict[str, Any]]) -> None:
    for statement in _RECORD:
        connection.execute(text(statement), rows)
    more = sum(row["phase"] == "committed" for row in rows)
    connection.execute(text(_COUNT), {"more": more})


def _values(message: Msg) -> dict[str, Any]:
    report = json.loads(message.data)
    return {
        "id": report["gateway_id"],
        "sequence": report["sequence"],
        "phase": report["phase"],
        "report": message.data.decode(),
        "at": message.metadata.timestamp.timestamp(),
    }
