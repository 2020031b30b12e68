"""A million gateways resolve one plan offline in one process: the sizes of the stages, and the seconds."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

from bench.fleet_enrolment import Tell

from slmops.contracts.descriptor import Descriptor
from slmops.contracts.identity import Identity
from slmops.contracts.plan import Candidate, Plan, Release, Side, Stage, resolve

PERCENTS = (5, 10, 25, 50, 100)
_PAGE = 20_000


async def measure(gateways: int, tell: Tell, percents: Sequence[float] = PERCENTS) -> dict[str, Any]:
    """Returns how many gateways each stage gives the candidate, beside its percentage."""
    taken: dict[float, int] = dict.fromkeys(percents, 0)
    plans = {percent: _plan(percents, stage) for stage, percent in enumerate(percents)}
    start = time.perf_counter()
    for first in range(0, gateways, _PAGE):
        tell(f"{first:,} of {gateways:,} gateways resolved {len(percents)} stages each")
        page = range(first, min(first + _PAGE, gateways))
        for percent, count in (await asyncio.to_thread(_count, page, plans)).items():
            taken[percent] += count
    seconds = time.perf_counter() - start
    stages = [
        {
            "percent": percent,
            "gateways": count,
            "off_by_percent": round(abs(count / (gateways * percent / 100) - 1) * 100, 3),
        }
        for percent, count in taken.items()
    ]
    return {
        "gateways": gateways,
        "seconds": round(seconds, 1),
        "resolutions_per_s": round(gateways * len(percents) / seconds),
        "stages": stages,
        "off_by_percent_at_most": max(stage["off_by_percent"] for stage in stages),
    }


def _count(page: range, plans: dict[float, Plan]) -> dict[float, int]:
    found = dict.fromkeys(plans, 0)
    for number in page:
        identity = Identity(gateway_id=f"gw-{number:07d}", blueprint="edge-chat")
        for percent, plan in plans.items():
            found[percent] += resolve(plan, (), identity).side is Side.CANDIDATE
    return found


def _plan(percents: Sequence[float], stage: int) -> Plan:
    """Returns a plan with the stages 0 to `stage` open."""
    stages = tuple(Stage(name=f"stage-{number}", percent=percent) for number, percent in enumerate(percents))
    candidate = Candidate(rollout="edge-chat-2", release=_release("2.0.0"), stages=stages, stage=stage)
    return Plan(blueprint="edge-chat", generation=stage + 1, stable=_release("1.0.0"), candidate=candidate)


def _release(version: str) -> Release:
    manifest = Descriptor.of(version.encode(), "application/vnd.oci.image.manifest.v1+json")
    signature = Descriptor.of(f"signature {version}".encode(), "application/json")
    return Release(revision=1, model="smollm2", version=version, manifest=manifest, signature=signature, size_bytes=1)
