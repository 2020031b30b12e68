"""Presence of gateways with a connection each: how soon the rollout service knows that all of them are there."""

from __future__ import annotations

import time
from typing import Any

from bench.fleet_rollout import Fleet, seen_since


async def measure_presence(fleet: Fleet) -> dict[str, Any]:
    """Every gateway sends a heartbeat at the same moment, as after an outage of the bus."""
    deployed, size = fleet.deployed, len(fleet.simulator.gateways)
    fleet.simulator.updates = False  # no other heartbeats
    began, cpu = time.time(), deployed.cpu_s("rollout")
    await fleet.simulator.beat_once()
    sent = time.time() - began
    seen = 0

    async def all_seen() -> bool:
        nonlocal seen
        seen = await seen_since(deployed, began)
        return seen >= size

    await fleet.until(all_seen, lambda: f"{seen:,} of {size:,} gateways seen")
    seconds = time.time() - began
    return {
        "presence_sent_s": round(sent, 3),
        "presence_seen_s": round(seconds, 3),
        "presence_per_s": round(size / seconds, 1),
        "cpu_ms_per_presence": round((deployed.cpu_s("rollout") - cpu) * 1000 / size, 4),
    }
