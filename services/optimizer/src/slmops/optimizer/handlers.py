"""Event → job → engine → events. One job makes every variant of one version for one device profile."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from slmops.contracts import subjects
from slmops.contracts.cloudevent import MESSAGE_ID_HEADER, Envelope, event_id
from slmops.contracts.errors import PermanentError, Problem
from slmops.contracts.events import (
    Event,
    ModelVersionRegistered,
    VariantOptimized,
    VariantProgressed,
    VariantRejected,
    VariantStarted,
)
from slmops.contracts.jobs import OptimizeJob
from slmops.contracts.profile import DeviceProfile
from slmops.kit.bus import Bus, Delivered
from slmops.kit.clock import Clock
from slmops.kit.objects import Objects
from slmops.kit.tracing import span, traceparent
from slmops.optimizer.engine import Engine
from slmops.optimizer.store import Outcome, Results, VariantOutcome

log = logging.getLogger(__name__)


class Handlers:
    """`engine` turns local files into an outcome; everything that crosses the wire is here."""

    def __init__(
        self,
        bus: Bus,
        objects: Objects,
        results: Results,
        engine: Engine,
        profiles: Sequence[DeviceProfile],
        recipes: Sequence[str],
        clock: Clock,
    ) -> None:
        self._bus = bus
        self._objects = objects
        self._results = results
        self._engine = engine
        self._profiles = profiles
        self._recipes = tuple(recipes)
        self._clock = clock

    async def version_registered(self, event: ModelVersionRegistered, delivered: Delivered) -> None:
        """Queue one job per device profile. Queued twice is queued once: the job's id is its message id."""
        for profile in self._profiles:
            job = OptimizeJob(
                model=event.model,
                version=event.version,
                digest=event.digest,
                format=event.format,
                files=event.files,
                golden=event.golden,
                profile=profile,
                recipes=self._recipes,
            )
            headers = {MESSAGE_ID_HEADER: job.id, "content-type": "application/json"}
            if parent := traceparent():
                headers["traceparent"] = parent
            await self._bus.client.store(subjects.optimize_job(profile.name), job.model_dump_json().encode(), headers)

    async def optimize(self, job: OptimizeJob, delivered: Delivered) -> None:
        """Do one job. A permanent failure is an outcome (every recipe rejected); a temporary one is redelivered."""
        async with delivered.kept_alive():
            await self._publish(VariantStarted(**_of(job), recipes=job.recipes, at=self._clock()), job, "started")
            outcome = await self._results.get(job.work)
            try:
                if outcome is None:
                    with span("optimize", model=job.model, version=job.version, profile=job.profile.name):
                        outcome = await self._work(job)
                    await self._results.put(job.work, outcome)
            except PermanentError as error:
                log.warning("%s:%s cannot be optimized: %s", job.model, job.version, error)
                await self._reject_all(job, error)
                return
            for variant in outcome.variants:
                await self._publish(self._event(job, variant), job, variant.recipe)

    async def _work(self, job: OptimizeJob) -> Outcome:
        async def progress(step: str, done: int, of: int) -> None:
            event = VariantProgressed(**_of(job), step=step, done=done, of=of, at=self._clock())
            await self._publish(event, job, f"progressed/{step}/{done}")

        folder = self._engine.folder(job.work)
        source = await self._fetch(job, folder)
        made = await self._engine.run(source, folder, job.recipes, job.profile, progress)
        await progress("upload", 0, 1)
        variants = [await self._engine.keep(variant, self._objects) for variant in made]
        shutil.rmtree(folder, ignore_errors=True)  # only now: until here a restart continues in it
        return Outcome(variants=tuple(variants))

    async def _fetch(self, job: OptimizeJob, folder: Path) -> Path:
        """The version's files on disk, verified: a single GGUF file, or a directory."""
        source = folder / "source"
        for file in job.files:
            target = source / file.path
            if not target.exists():
                await self._objects.get_file(file.digest, target)
        return source / job.files[0].path if job.format == "gguf" else source

    def _event(self, job: OptimizeJob, variant: VariantOutcome) -> Event:
        common: Mapping[str, Any] = {
            **_of(job),
            "recipe": variant.recipe,
            "digest": variant.digest,
            "evaluation": variant.evaluation,
            "report": variant.report,
            "reason": variant.reason,
            "at": self._clock(),
        }
        if not variant.passed:
            return VariantRejected(**common)
        return VariantOptimized(**common, files=variant.files, golden=job.golden, chosen=variant.chosen)

    async def _reject_all(self, job: OptimizeJob, error: PermanentError) -> None:
        for recipe in job.recipes:
            rejected = VariantRejected(
                **_of(job), recipe=recipe, problem=Problem.of(error), reason=error.what, at=self._clock()
            )
            await self._publish(rejected, job, recipe)

    async def _publish(self, event: Event, job: OptimizeJob, what: str) -> None:
        """An id that follows from the job: a worker that repeats a step repeats its event."""
        envelope = Envelope(
            id=event_id(job.id, what),
            source="slmops/optimizer",
            type=event.type,
            time=self._clock(),
            subject=event.key,
            traceparent=traceparent(),
        )
        await self._bus.client.publish(event, envelope)


def _of(job: OptimizeJob) -> dict[str, Any]:
    return {"job": job.id, "model": job.model, "version": job.version, "profile": job.profile.name}


def routes(bus: Bus, handlers: Handlers) -> None:
    bus.on(ModelVersionRegistered, handlers.version_registered)
    bus.consume(subjects.optimize_job("*"), OptimizeJob, handlers.optimize)
