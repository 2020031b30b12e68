"""Streams with a small size limit on the session's real server."""

from __future__ import annotations

from dataclasses import replace

import pytest
from integration.kit_world import World, wipe

from slmops.contracts.errors import DiskFull
from slmops.contracts.subjects import STREAMS, StreamSpec
from slmops.kit.bus import provision as provisioner
from slmops.kit.bus.provision import provision

TINY_BYTES = 16 << 10
_SUBJECTS = {
    "EVENTS": "slmops.model.alias_moved.v1",
    "ENROLMENTS": "slmops.gateway.enrolled.v1.gw-{}",
    "FLEET": "slmops.gateway.moved.v1.gw-{}",
    "REVOCATIONS": "slmops.gateway.revoked.v1.gw-{}.U",
    "WINDOWS": "slmops.cohort.measured.v1",
    "GATEWAYS": "slmops.gateway.reported.v1.gw-{}",
    "PRESENCE": "presence.gw-{}",
    "MEASUREMENTS": "measure.gw-{}",
    "JOBS": "jobs.optimize.edge-small",
    "DLQ": "dlq.measure.gw-{}",
}


def subject_in(stream: str, number: int = 0) -> str:
    return _SUBJECTS[stream].format(number)


async def make_tiny(world: World, monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Makes all streams anew and empty; those in `names` hold only `TINY_BYTES`."""
    tiny: tuple[StreamSpec, ...] = tuple(
        replace(spec, max_bytes=TINY_BYTES) if spec.name in names else spec for spec in STREAMS
    )
    monkeypatch.setattr(provisioner, "STREAMS", tiny)
    await wipe(world.client)
    await provision(world.client.js)


async def fill(world: World, stream: str, messages: int = 60) -> int:
    """Publishes twice what fits into a tiny stream. Returns how many messages the stream accepted."""
    for number in range(messages):
        try:
            await world.client.store(subject_in(stream, number), b"x" * 500, {"Nats-Msg-Id": f"{stream}-{number}"})
        except DiskFull:
            return number
    return messages
