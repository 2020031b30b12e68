"""Watches how full the streams are and whether a service's consumers have gaps. Every service runs it.

Fill rates of the streams that refuse: per optimized version and device profile EVENTS stores one registration, one
start, about fifty steps, a variant for each recipe and a package with its deltas. These are some 60 messages of 0.5 to
2.5 kB, so 1 GiB holds about 15,000 optimizations. A rollout adds a dozen messages of 1 kB. ENROLMENTS stores 0.7 kB
once per gateway, so 256 MiB hold some 350,000 gateways. JOBS holds waiting jobs: 128 MiB hold tens of thousands. The
first warning comes with 30% left, which lasts for weeks at any of these rates.
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
from slmops.kit.bus.gaps import Durable, answering, check_for_gap
from slmops.kit.sizes import size_text

log = logging.getLogger("slmops.streams")
EVERY = timedelta(minutes=1)
LEVELS = (0.7, 0.9)
"""Shares of `max_bytes` at which a warning is logged for a stream that refuses."""
FILL = Gauge("slmops_stream_fill_ratio", "Stored bytes divided by the stream's limit (0: no limit)", ["stream"])


def ratio(info: StreamInfo) -> float:
    """Returns the stored bytes divided by the limit; 0 without a limit."""
    limit = info.config.max_bytes or 0
    return info.state.bytes / limit if limit > 0 else 0.0


def level(share: float) -> int:
    """Returns how many of `LEVELS` are reached."""
    return sum(share >= limit for limit in LEVELS)


class FillWatch:
    """Warns once when a level is reached, and again only after the stream was below it."""

    def __init__(self) -> None:
        self._levels: dict[str, int] = {}

    async def check(self, client: BusClient) -> None:
        """Checks all streams. Raises `Unreachable`, `NotReady`."""
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
    """Checks all consumers. Raises `Unreachable`, `NotReady`."""
    for durable in durables:
        await check_for_gap(client, durable)


async def watch_streams(client: BusClient, durables: Sequence[Durable]) -> None:
    """Runs until cancelled. If a stream or consumer cannot be checked, the others still are."""
    steps: list[Callable[[], Awaitable[object]]] = [
        partial(FillWatch().check, client),
        *(partial(check_for_gap, client, durable) for durable in durables),
    ]
    while True:
        for step in steps:
            try:
                await step()
            except TemporaryError as error:
                log.warning("could not check a stream, retrying: %s", error)
        await asyncio.sleep(EVERY.total_seconds())
