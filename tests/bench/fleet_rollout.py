"""A whole two-stage rollout to a simulated fleet: writes, decisions, reports, judgements, losses, memory."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, NamedTuple

from bench.fleet_deployment import REPORTS, SERVICES, Deployment
from bench.fleet_enrolment import Tell, enrol, everywhere, record
from bench.fleet_gateway import HEARTBEAT_EVERY_S, Gateway
from bench.fleet_simulator import RAW, Simulator, Wave
from bench.fleet_wire import Wire
from integration.rollout_world import NAME
from nats.js.errors import NotFoundError
from sqlalchemy import create_engine, text

from slmops.contracts import subjects
from slmops.contracts.blueprint import GatePolicy, Stage
from slmops.contracts.commands import StartRollout
from slmops.contracts.errors import NotFound
from slmops.contracts.events import RolloutAborted, RolloutCompleted, RolloutEvent, RolloutHeld, RolloutRolledBack
from slmops.contracts.identity import Identity
from slmops.contracts.plan import Plan
from slmops.contracts.signed import plan_in
from slmops.contracts.subjects import inbox

FIRST, SAMPLE = 20, 2000
"""Gateways of the first release, and gateways that enrol by the command."""
CANARY = Stage(name="canary", percent=10)
STAGES = (CANARY, Stage(name="fleet"))
_GATE = GatePolicy(deadline_s=6 * 3600)
_RAW_ROUNDS = 3
_CONNECTING = 50
_DONE = "slmops_messages_total{outcome=done,service=rollout,subject=slmops.gateway.reported.v1.{gateway_id}}"
_JUDGED = "slmops_judgement_seconds"
_RAW_HEADER = "NATS/1.0\r\nBench: \r\n\r\n"


@dataclass
class Fleet:
    """A deployment with its simulated gateways, all enrolled and running release 1.0.0."""

    deployed: Deployment
    simulator: Simulator
    tell: Tell
    enrolments_per_s: float
    rss_before: int = 0

    async def until(self, done: Callable[[], Awaitable[bool]], what: Callable[[], str]) -> None:
        while not await done():
            self.simulator.check()
            self.tell(what())
            await asyncio.sleep(0.1)

    async def handled(self, service: str = "rollout", subject: str = REPORTS) -> None:
        """Waits until a service has handled all messages on a subject that were sent before this call."""
        await self.simulator.settled()
        last = await self.deployed.last_sequence(subject)
        left = 0

        async def none_left() -> bool:
            nonlocal left
            left, floor = await self.deployed.consumed(service, subject)
            return not left or floor >= last

        await self.until(none_left, lambda: f"{left:,} messages for {service} left")

    async def plan(self) -> Plan:
        found = await self.deployed.client.read_desired(subjects.blueprint_key(NAME))
        assert found is not None, "a blueprint with a rollout has a plan"
        return plan_in(found[0])


def identities(count: int) -> list[Identity]:
    return [
        Identity(gateway_id=f"gw-{number:07d}", blueprint=NAME, labels={"site": f"site-{number % 100}"})
        for number in range(count)
    ]


async def assemble(
    deployed: Deployment,
    size: int,
    tell: Tell,
    *,
    heartbeat_every_s: float = HEARTBEAT_EVERY_S,
    by_command: int = SAMPLE,
    own_wires: bool = False,
) -> Fleet:
    """Enrols a fleet of `size` gateways on an empty deployment and brings it to release 1.0.0.

    Only the first gateways really update to it, so that the blueprint has a stable release; the others start with it.
    `by_command` gateways enrol by the command, the others are written into the journal of the rollout service.
    `own_wires`: every gateway enrols by the command and has a connection with its own credentials.
    """
    await deployed.start(*SERVICES)
    members = identities(size)
    gateways = [Gateway(identity) for identity in members]
    first, by_command = min(size, FIRST), size if own_wires else min(size, by_command)
    await deployed.operator.apply(stages=STAGES[-1:], gate=_GATE)
    rate, creds = await enrol(deployed, members[:first], tell)
    await everywhere(deployed, first, tell)
    fleet = Fleet(deployed, Simulator(gateways[:first], await deployed.wires(1), deployed.keys), tell, rate)
    await fleet.simulator.start(heartbeat_every_s)
    await release(fleet, "1.0.0")
    await fleet.simulator.stop()
    fleet.rss_before = deployed.rss_bytes(*SERVICES)
    if by_command > first:
        fleet.enrolments_per_s, more = await enrol(deployed, members[first:by_command], tell)
        creds += more
    if rest := members[by_command:]:
        await deployed.stop(*SERVICES)
        await record(deployed, rest, tell)
        await deployed.start(*SERVICES)
    await everywhere(deployed, size, tell)
    await deployed.operator.apply(stages=STAGES, gate=_GATE)
    plan = await fleet.plan()
    for gateway in gateways[first:]:
        gateway.install(plan)
    wires = await _own_wires(deployed, members, creds, tell) if own_wires else await deployed.wires()
    fleet.simulator = Simulator(gateways, wires, deployed.keys)
    await fleet.simulator.start(heartbeat_every_s, plan)
    return fleet


async def _own_wires(deployed: Deployment, members: Sequence[Identity], creds: Sequence[str], tell: Tell) -> list[Wire]:
    wires: list[Wire] = []
    pairs = list(zip(members, creds, strict=True))
    for first in range(0, len(pairs), _CONNECTING):
        some = pairs[first : first + _CONNECTING]
        connecting = (deployed.wire(text, inbox(member.gateway_id), window=16) for member, text in some)
        wires += await asyncio.gather(*connecting)
        tell(f"{len(wires):,} of {len(pairs):,} gateways connected")
    return wires


async def release(fleet: Fleet, version: str) -> str:
    """Rolls a new version out in the blueprint's stages. Returns the rollout's id when it is completed."""
    rollout = await begin(fleet, version)
    await completed(fleet, rollout)
    return rollout


async def begin(fleet: Fleet, version: str, stages: Sequence[Stage] = ()) -> str:
    """Publishes a package and starts its rollout, in the blueprint's stages or other ones. Returns the rollout's id."""
    await fleet.deployed.operator.publish_package(version)
    command = StartRollout(blueprint=NAME, version=version, stages=tuple(stages))
    while True:
        try:
            return (await fleet.deployed.client.request(command)).rollout
        except NotFound:
            fleet.tell(f"the rollout service learns of package {version}")
            await asyncio.sleep(0.05)


async def completed(fleet: Fleet, rollout: str) -> None:
    """Waits until a rollout is completed. Raises `RuntimeError` if it ends in another way."""

    async def ended() -> bool:
        for kind in (RolloutCompleted, RolloutRolledBack, RolloutAborted, RolloutHeld):
            event = await _newest(fleet.deployed, kind)
            if event is not None and event.rollout == rollout:
                if kind is RolloutCompleted:
                    return True
                raise RuntimeError(f"{rollout}: {event!r}")
        return False

    await fleet.until(ended, lambda: f"{rollout}: {_progress(fleet.simulator)}")
    await fleet.handled()


async def _newest(deployed: Deployment, kind: type[RolloutEvent]) -> Any:
    try:
        found = await deployed.client.js.get_msg("EVENTS", subject=kind.type, direct=True)
    except NotFoundError:
        return None
    return kind.model_validate_json(found.data or b"")


def _progress(simulator: Simulator) -> str:
    decided = len(simulator.waves[max(simulator.waves)].at) if simulator.waves else 0
    return f"{decided:,} gateways decided, {simulator.reports:,} reports sent"


class _Counters(NamedTuple):
    """Counted while nothing is under way: a heartbeat in between would look like a lost report."""

    sent: int
    handled: int
    letters: int
    unrecorded: int
    metrics: dict[str, float]


async def _counters(fleet: Fleet) -> _Counters:
    simulator, deployed = fleet.simulator, fleet.deployed
    simulator.updates = False
    await fleet.handled()
    metrics = await deployed.metrics("rollout")
    sent = simulator.reports + simulator.reported_heartbeats
    unrecorded = await not_recorded(deployed, simulator.gateways)
    found = _Counters(sent, round(metrics.get(_DONE, 0)), await deployed.dead_letters(), unrecorded, metrics)
    simulator.updates = True
    return found


async def measure(fleet: Fleet, version: str) -> dict[str, Any]:
    """Rolls a version out in two stages and returns the figures."""
    deployed, simulator, size = fleet.deployed, fleet.simulator, len(fleet.simulator.gateways)
    before = await _counters(fleet)
    cpu, started = deployed.cpu_s("rollout"), time.monotonic()
    rollout = await release(fleet, version)
    seconds, cpu = time.monotonic() - started, deployed.cpu_s("rollout") - cpu
    rss = deployed.rss_bytes(*SERVICES) - fleet.rss_before
    after = await _counters(fleet)
    lost = {
        "not handled": max(0, after.sent - before.sent - (after.handled - before.handled)),
        "dead letters": after.letters - before.letters,
        "not recorded": after.unrecorded,
    }
    sent = after.sent - before.sent
    waves = _waves_of(simulator, rollout)
    raw = await _raw_fan_out(fleet)
    return {
        "gateways": size,
        "rollout_s": round(seconds, 2),
        "connections": len(simulator.wires),
        "writes_per_stage": max(len(waves[stage]) for stage in range(len(STAGES))),
        "decided_p99_s": round(max(w.percentile(0.99, size) for many in waves for w in many), 4),
        "first_decided_s": round(max(min(w.at) - w.signed_at for many in waves for w in many), 4),
        "raw_fanout_p99_s": round(median(wave.percentile(0.99, size) for wave in raw), 4),
        "reports_sent": sent,
        "heartbeats_sent": simulator.heartbeats,
        "reports_lost": sum(lost.values()),
        "reports_lost_by": lost,
        "reports_per_s_in_rollout": round(sent / seconds, 1),
        "cpu_ms_per_report_in_rollout": round(cpu * 1000 / sent, 4),
        "judgements": round(_grown(before, after, f"{_JUDGED}_count{{}}")),
        "judgement_ms": _mean_ms(before, after),
        "hub_bytes_per_gateway": round(rss / size),
        "enrolments_per_s": round(fleet.enrolments_per_s, 1),
        "decided_s": _curve(waves[-1][0]),
        "raw_s": _curve(raw[0]),
    }


def _waves_of(simulator: Simulator, rollout: str) -> list[list[Wave]]:
    """Returns the writes of a rollout's plan by stage."""
    found: list[list[Wave]] = [[] for _ in STAGES]
    for wave in simulator.waves.values():
        candidate = wave.plan.candidate
        if candidate is not None and candidate.rollout == rollout:
            found[candidate.stage].append(wave)
    return found


async def _raw_fan_out(fleet: Fleet) -> list[Wave]:
    """Publishes the newest plan's bytes to the same subscriptions, as a message that the gateways ignore."""
    simulator, waves = fleet.simulator, []
    headers, payload = simulator.newest_document
    subject = subjects.twin(subjects.blueprint_key(NAME))
    filler = RAW.decode() + "." * (len(headers) - len(RAW) - len(_RAW_HEADER))
    for number in range(_RAW_ROUNDS):
        wave = simulator.raw = Wave(None, time.time())
        waves.append(wave)
        await fleet.deployed.client.connection.publish(subject, payload, headers={"Bench": filler})
        await fleet.deployed.client.connection.flush()

        async def arrived(wave: Wave = wave) -> bool:
            return len(wave.at) >= len(simulator.gateways)

        await fleet.until(arrived, lambda number=number: f"raw fan-out {number + 1} of {_RAW_ROUNDS}")  # type: ignore[misc]
    return waves


def _grown(before: _Counters, after: _Counters, name: str) -> float:
    return after.metrics.get(name, 0) - before.metrics.get(name, 0)


def _mean_ms(before: _Counters, after: _Counters) -> float | None:
    """Returns the mean time of a judgement; None if the service has no such metric or made no judgement."""
    count = _grown(before, after, f"{_JUDGED}_count{{}}")
    return round(_grown(before, after, f"{_JUDGED}_sum{{}}") * 1000 / count, 3) if count else None


async def not_recorded(deployed: Deployment, gateways: Sequence[Gateway]) -> int:
    """Returns the number of gateways whose newest report is not the one that the service recorded."""
    found = await asyncio.to_thread(_query, deployed.databases["rollout"], "SELECT gateway_id, sequence FROM gateways")
    known = dict(found)
    return sum(known.get(gateway.identity.gateway_id, 0) != gateway.sequence for gateway in gateways)


async def seen_since(deployed: Deployment, since: float) -> int:
    """Returns the number of gateways that the service saw after that Unix time."""
    query = f"SELECT count(*) FROM sightings WHERE at >= {since}"
    return int((await asyncio.to_thread(_query, deployed.databases["rollout"], query))[0][0])


def _query(url: str, query: str) -> list[Any]:
    engine = create_engine(url)
    try:
        with engine.connect() as connection:
            return [tuple(row) for row in connection.execute(text(query))]
    finally:
        engine.dispose()


def _curve(wave: Wave, points: int = 200) -> list[float]:
    """Returns the seconds after which equal shares of the gateways had a document, for a plot."""
    at = sorted(wave.at)
    return [round(at[min(len(at) - 1, len(at) * k // points)] - wave.signed_at, 4) for k in range(1, points + 1)]
