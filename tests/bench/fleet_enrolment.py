"""Enrols simulated gateways: some thousands by the real command, the rest directly in the service's journal."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from datetime import timedelta

from bench.fleet_deployment import Deployment

from slmops.contracts.commands import EnrolGateway
from slmops.contracts.events import GatewayEnrolled
from slmops.contracts.identity import Identity
from slmops.contracts.permissions import ENROL_USER
from slmops.kit.bus.client import BusClient
from slmops.kit.bus.nats_auth import creds_text, new_user_seed, public_key
from slmops.kit.clock import utc_now
from slmops.kit.journal import Journal, UnitOfWork
from slmops.kit.settings import BusSettings
from slmops.rollout import membership_rows
from slmops.rollout.domain.membership import Membership
from slmops.rollout.store import MIGRATIONS, project, schema

Tell = Callable[[str], None]
_AT_ONCE, _IN_A_TRANSACTION = 16, 500
_CREDENTIAL_LIFE = timedelta(days=30)
ENROLLED = f"{GatewayEnrolled.type}.*"


async def enrol(deployed: Deployment, identities: Sequence[Identity], tell: Tell) -> tuple[float, list[str]]:
    """Enrols gateways by the command. Returns enrolments per second and the text of each one's credentials."""
    seeds = [new_user_seed() for _ in identities]
    token = deployed.layout.enrolment_token.read_text()
    commands = [
        EnrolGateway(**identity.model_dump(), public_key=public_key(seed), token=token)
        for identity, seed in zip(identities, seeds, strict=True)
    ]
    settings = BusSettings(nats_url=deployed.url, nats_creds=deployed.layout.creds(ENROL_USER))
    inbox = f"_INBOX_{ENROL_USER}".encode()
    client = await BusClient.connect(settings, name="bench", patient=False, inbox_prefix=inbox)
    jwts: dict[str, str] = {}

    async def send(numbers: range) -> None:
        for number in numbers:
            answer = await client.request(commands[number])
            jwts[answer.gateway_id] = answer.jwt
            tell(f"{len(jwts):,} of {len(commands):,} gateways enrolled by the command")

    start = time.perf_counter()
    try:
        await asyncio.gather(*(send(range(first, len(commands), _AT_ONCE)) for first in range(_AT_ONCE)))
    finally:
        await client.close()
    rate = len(commands) / (time.perf_counter() - start)
    return rate, [creds_text(jwts[i.gateway_id], seed) for i, seed in zip(identities, seeds, strict=True)]


async def record(deployed: Deployment, identities: Sequence[Identity], tell: Tell) -> None:
    """Writes enrolments into the journal of the rollout service, which must not run, with its own functions."""
    journal = Journal(
        deployed.databases["rollout"], service="rollout", metadata=schema(), migrations=MIGRATIONS, project=project
    )
    await journal.open()
    try:
        for first in range(0, len(identities), _IN_A_TRANSACTION):
            page = identities[first : first + _IN_A_TRANSACTION]
            tell(f"{first:,} of {len(identities):,} enrolments written into the journal")
            events = await asyncio.to_thread(lambda page=page: [_enrolled(identity) for identity in page])  # type: ignore[misc]
            await journal.transact(lambda unit, events=events: _commit(unit, events))  # type: ignore[misc]
    finally:
        await journal.close()


def _enrolled(identity: Identity) -> GatewayEnrolled:
    now = utc_now()
    key = public_key(new_user_seed())
    return GatewayEnrolled(**identity.model_dump(), public_key=key, at=now, expires_at=now + _CREDENTIAL_LIFE)


def _commit(unit: UnitOfWork, events: Sequence[GatewayEnrolled]) -> None:
    for event in events:
        membership_rows.commit(unit, Membership(event.gateway_id), [event])


async def everywhere(deployed: Deployment, count: int, tell: Tell) -> None:
    """Waits until `count` enrolments are on the bus and the telemetry service has recorded them."""
    while True:
        stored = int((await deployed.client.js.stream_info("ENROLMENTS")).state.messages)
        behind = await deployed.unhandled("telemetry", ENROLLED)
        if stored >= count and not behind:
            return
        tell(f"{stored:,} of {count:,} enrolments published, telemetry is {behind:,} behind")
        await asyncio.sleep(0.2)
