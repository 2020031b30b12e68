"""One simulated gateway: it resolves plans, goes through the gateway's own table of phases, and sends its messages."""

from __future__ import annotations

import secrets
import uuid
from collections.abc import Iterator, Mapping
from datetime import timedelta

from bench.fleet_wire import Wire

from slmops.contracts import subjects
from slmops.contracts.clocks import SENT_AT_HEADER
from slmops.contracts.cloudevent import MESSAGE_ID_HEADER, Envelope, event_id
from slmops.contracts.events import GatewayReported, UpdatePhase
from slmops.contracts.freshness import PRESENCE, GatewayPresence
from slmops.contracts.measurement import MeasurementBatch
from slmops.contracts.plan import Identity, Plan, Release, resolve
from slmops.gateway.domain import Event, next_phase, should_update
from slmops.kit.clock import utc_now

UPDATE = (
    Event.UPDATE_WANTED,
    Event.INSTALL_SUCCEEDED,
    Event.LOAD_SUCCEEDED,
    Event.PROBE_PASSED,
    Event.SWAPPED,
    Event.SOAK_PASSED,
)
"""The events of an update that succeeds. The gateway reports after each of them."""
HEARTBEAT_EVERY_S = 0.75 * PRESENCE.total_seconds()
"""The mean time between two heartbeats of a gateway."""
Message = tuple[str, Mapping[str, str], bytes]
_INTERVAL = timedelta(seconds=60)
_TOKENS, _TOKENS_PER_S, _TTFT_S = 40, 50, 0.1


class Gateway:
    """The state of one simulated gateway. `enrolment` is that of its credential."""

    __slots__ = (
        "boot",
        "enrolment",
        "generation",
        "identity",
        "measured",
        "phase",
        "running",
        "sequence",
        "wanted",
        "wire",
    )

    def __init__(self, identity: Identity) -> None:
        self.identity = identity
        self.wire: Wire | None = None
        self.enrolment = 1
        self.phase = UpdatePhase.IDLE
        self.running: Release | None = None
        self.wanted: Release | None = None
        self.boot = secrets.token_hex(8)
        self.sequence, self.measured = 0, 0
        self.generation = 0

    def install(self, plan: Plan) -> None:
        """Begins with the stable release of a plan, as a gateway that was installed with it."""
        self.running = self.wanted = plan.stable
        self.phase, self.generation = UpdatePhase.COMMITTED, plan.generation

    def decide(self, plan: Plan) -> bool:
        """Resolves a plan. Returns whether an update begins."""
        self.generation = plan.generation
        self.wanted = resolve(plan, (), self.identity).release
        return should_update(
            desired=self.wanted and self.wanted.manifest.digest,
            active=self.running and self.running.manifest.digest,
            failed=(),
            phase=self.phase,
        )

    def update(self) -> Iterator[None]:
        """Goes through the phases of an update, and yields after each one."""
        for event in UPDATE:
            self.phase = next_phase(self.phase, event)
            if event is Event.SWAPPED:
                self.running = self.wanted
            yield


def report(gateway: Gateway) -> Message:
    """Returns the gateway's next report."""
    gateway.sequence += 1
    running, now = gateway.running, utc_now()
    event = GatewayReported(
        gateway_id=gateway.identity.gateway_id,
        blueprint=gateway.identity.blueprint,
        enrolment=gateway.enrolment,
        sequence=gateway.sequence,
        boot=gateway.boot,
        labels=gateway.identity.labels,
        phase=gateway.phase,
        running=running.manifest.digest if running else None,
        running_version=running.version if running else None,
        target=gateway.wanted.manifest.digest if gateway.wanted else None,
        plan_generation=gateway.generation,
        at=now,
    )
    envelope = Envelope(
        id=event_id(event.gateway_id, "reported", str(event.sequence)),
        source=f"slmops/gateway/{event.gateway_id}",
        type=event.type,
        time=now,
        subject=event.key,
    )
    headers = envelope.headers() | {SENT_AT_HEADER: now.isoformat()}
    return event.subject, headers, event.model_dump_json().encode()


def heartbeat(gateway: Gateway) -> Message:
    """Returns what the gateway sends although nothing changed."""
    presence = GatewayPresence(enrolment=gateway.enrolment, sequence=gateway.sequence)
    headers = {SENT_AT_HEADER: utc_now().isoformat()}
    return subjects.presence(gateway.identity.gateway_id), headers, presence.model_dump_json().encode()


def measurement(gateway: Gateway, requests: int) -> Message:
    """Returns a batch of measurements of the release that the gateway runs."""
    assert gateway.running is not None, "a gateway without a release serves no requests"
    now, identity = utc_now(), str(uuid.uuid4())
    gateway.measured += 1
    batch = MeasurementBatch(
        boot=gateway.boot,
        sequence=gateway.measured,
        batch_id=identity,
        gateway_id=gateway.identity.gateway_id,
        blueprint=gateway.identity.blueprint,
        release=gateway.running.manifest.digest,
        version=gateway.running.version,
        started_at=now - _INTERVAL,
        ended_at=now,
        requests=requests,
        failed_requests=0,
        golden_passed=1,
        prompt_tokens=20 * requests,
        completion_tokens=_TOKENS * requests,
        decode_seconds=requests * _TOKENS / _TOKENS_PER_S,
        ttft_seconds=requests * _TTFT_S,
    )
    headers = {MESSAGE_ID_HEADER: identity, "content-type": "application/json", SENT_AT_HEADER: now.isoformat()}
    return subjects.measurements(batch.gateway_id), headers, batch.model_dump_json().encode()
