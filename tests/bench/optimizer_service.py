"""Measures the optimizer as a service on real servers: the time of a job, and of the same job again."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack
from pathlib import Path

from bench.comparison import Place
from bench.deployment import objects_of
from integration.kit_world import unrestricted
from nats.js.client import JetStreamContext

from slmops.contracts import subjects
from slmops.contracts.cloudevent import MESSAGE_ID_HEADER
from slmops.contracts.events import VariantOptimized
from slmops.contracts.jobs import OptimizeJob
from slmops.contracts.model import ModelFile, files_digest
from slmops.contracts.profile import EDGE_SMALL
from slmops.kit.bus.client import BusClient
from slmops.local.system import System
from slmops.optimizer.recipes.library import recipe_named

_WITHIN_S = 900


async def job_twice(source: Path, place: Place) -> dict[str, float]:
    """Returns the seconds from a queued job to the event of its gated int4 variant: `job`, and `cached_job` for the
    same job under another version."""
    place.step.progress("starting NATS, S3 and the optimizer")
    async with AsyncExitStack() as stack:
        system = await stack.enter_async_context(System(place.scratch / "system", services=("optimizer",), gateways=[]))
        settings = system.bus_settings("optimizer")
        client = await BusClient.connect(settings, name="bench")
        stack.push_async_callback(client.close)
        console = await BusClient.connect(
            system.bus_settings("console", nats_creds=unrestricted(system.layout.keys, "console")), name="bench"
        )
        stack.push_async_callback(console.close)
        done = await console.js.subscribe(VariantOptimized.type, ordered_consumer=True)
        objects = objects_of(system)
        stored = await objects.put_file(source, "application/octet-stream")
        file = ModelFile(path=source.name, digest=stored.digest, size_bytes=stored.size)
        place.step.progress("the job as a service")
        first = await _one(client, done, file, "1.0.0")
        return {"job": first, "cached_job": await _one(client, done, file, "1.0.1")}


async def _one(client: BusClient, done: JetStreamContext.PushSubscription, file: ModelFile, version: str) -> float:
    job = OptimizeJob(
        model="smollm2",
        version=version,
        digest=files_digest([file]),
        format="gguf",
        files=(file,),
        profile=EDGE_SMALL,
        recipes=("int4",),
        definitions=(recipe_named("int4"),),
    )
    start = time.perf_counter()
    headers = {MESSAGE_ID_HEADER: job.id, "content-type": "application/json"}
    await client.store(subjects.optimize_job(job.profile.name), job.model_dump_json(by_alias=True).encode(), headers)
    async with asyncio.timeout(_WITHIN_S):
        while True:
            event = VariantOptimized.model_validate_json((await done.next_msg(timeout=_WITHIN_S)).data)
            if event.version == version:
                return round(time.perf_counter() - start, 2)
