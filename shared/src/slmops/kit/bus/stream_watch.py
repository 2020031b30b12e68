"""Watches the streams from inside every service: how full they are, and whether our consumers have gaps.

How fast a stream that refuses fills. Per optimized version and device profile EVENTS stores one registration, one
start, about fifty steps, a variant for each recipe and a package with its deltas: some 60 messages of 0.5 to 2.5 kB, so
1 GiB is about 15,000 optimizations. A rollout adds a dozen messages of 1 kB. ENROLMENTS stores 0.7 kB per gateway once,
so 256 MiB are some 350,000 gateways. JOBS holds what waits: 128 MiB are tens of thousands of jobs. The first warning
comes with 30% left: weeks, at any of these rates.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from datetime import timedelta
from functools import partial

from nats.js.api import StreamInfo
from prometheus_client import Gauge

from slmops.contracts.errors import TemporaryError
from slmops.contracts.subjects import STREAMS, StreamSpec
from slmops.kit.bus.client import BusClient
from slmops.kit.bus.gaps import Durable, answering, look
from slmops.kit.sizes import size_text

log = logging.getLogger("slmops.streams")
EVERY = timedelta(minutes=1)
LEVELS = (0.7, 0.9)
"""Shares of `max_bytes` at which a stream that refuses is worth a warning."""
FILL = Gauge("slmops_stream_fill_ratio", "Stored bytes by the stream's limit (0: it has none)", ["stream"])


def ratio(info: StreamInfo) -> float:
    """Stored bytes by the limit; 0 without one."""
    limit = info.config.max_bytes or 0
    return info.state.bytes / limit if limit > 0 else 0.0


def level(share: float) -> int:
    """How many of `LEVELS` are reached."""
    return sum(share >= limit for limit in LEVELS)


class FillWatch:
    """Warns once when a level is reached, and again only after the stream was below it."""

    def __init__(self) -> None:
        self._levels: dict[str, int] = {}

    async def look(self, client: BusClient) -> None:
        """Raises `Unreachable`, `NotReady`."""
        for spec in STREAMS:
            with answering(Durable(spec.name, "")):
                self.note(spec, await client.js.stream_info(spec.name))

    def note(self, spec: StreamSpec, info: StreamInfo) -> None:
        share = ratio(info)
        FILL.labels(spec.name).set(share)
        if spec.refuses and level(share) > self._levels.get(spec.name, 0):
            larger = size_text(2 * int(info.config.max_bytes or 0))
            log.warning(
                "the stream %s is %.0f%% full; at its limit it refuses new messages. "
                "Enlarge it: slmops stream resize %s %s.",
                *(spec.name, 100 * share, spec.name, larger),
            )
        self._levels[spec.name] = level(share)


async def look_for_gaps(client: BusClient, durables: Sequence[Durable]) -> None:
    """Raises `Unreachable`, `NotReady`."""
    for durable in durables:
        await look(client, durable)


async def watch_streams(client: BusClient, durables: Sequence[Durable]) -> None:
    """Runs until cancelled. A stream or consumer that cannot be looked at keeps no other from being looked at."""
    steps: list[Callable[[], Awaitable[object]]] = [
        partial(FillWatch().look, client),
        *(partial(look, client, durable) for durable in durables),
    ]
    while True:
        for step in steps:
            try:
                await step()
            except TemporaryError as error:
                log.warning("could not check a stream, retrying: %s", error)
        await asyncio.sleep(EVERY.total_seconds())
