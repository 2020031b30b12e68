"""Publishes the events of one job and keeps its state on the job board."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Mapping
from functools import partial
from typing import Any

from slmops.contracts.cloudevent import Envelope, event_id
from slmops.contracts.errors import DiskFull, JobCancelled, PermanentError, Problem, TemporaryError
from slmops.contracts.events import Event, VariantOptimized, VariantProgressed, VariantRejected, VariantStarted
from slmops.contracts.jobs import JobState, JobView, OptimizeJob
from slmops.kit.bus.refusals import until_stored
from slmops.kit.bus.service_bus import Bus
from slmops.kit.clock import Clock
from slmops.kit.tracing import traceparent
from slmops.optimizer.jobs.board import Board
from slmops.optimizer.store import Outcome, VariantOutcome

log = logging.getLogger(__name__)


def queued(job: OptimizeJob, clock: Clock) -> JobView:
    """Returns the job as the board shows it before a worker takes it."""
    return JobView(
        job=job.id,
        work=job.work,
        model=job.model,
        version=job.version,
        profile=job.profile.name,
        recipes=job.recipes,
        search=job.search,
        state=JobState.QUEUED,
        queued_at=clock(),
        at=clock(),
    )


class JobPublisher:
    """Publishes for one job, in the worker that runs it. Every method except `progress` raises `Unreachable`."""

    def __init__(self, bus: Bus, board: Board, clock: Clock, job: OptimizeJob) -> None:
        self._bus, self._board, self._clock, self._job = bus, board, clock, job
        self._view = queued(job, clock)

    async def started(self) -> None:
        self._view = await self._board.find(self._job.id) or self._view
        await self._publish(
            VariantStarted(**self._of, recipes=self._job.recipes, data=self._job.data, at=self._clock()), "started"
        )
        worker = f"{socket.gethostname()}/{os.getpid()}"
        await self._change(state=JobState.RUNNING, worker=worker, reason="", problem=None)

    async def progress(self, step: str, done: int, of: int) -> None:
        """Reports progress, or skips the report while the bus is unreachable: a job of hours must not fail for it."""
        log.info("%s:%s: %s (%d of %d)", self._job.model, self._job.version, step, done, of)
        try:
            event = VariantProgressed(**self._of, step=step, done=done, of=of, at=self._clock())
            await self._publish_once(event, f"progressed/{step}/{done}")
            await self._change(step=step, done=done, of=of)
        except TemporaryError as error:
            log.warning("could not report the progress of %s: %s", self._job.id, error)

    async def finished(self, outcome: Outcome) -> None:
        """Publishes all variants: the chosen one first, then others that passed, then the rejected ones.

        In this order no reader ever sees a job with rejected variants only although one passed.
        """
        for variant in sorted(outcome.variants, key=lambda v: (not v.chosen, not v.passed)):
            await self._publish(self._event(variant, outcome), variant.recipe)
        passed = any(variant.passed for variant in outcome.variants)
        state = JobState.DONE if passed else JobState.REFUSED
        await self._change(state=state, reason=outcome.reason, report=outcome.report, done=self._view.of)

    async def failed(self, error: PermanentError) -> None:
        """Rejects every recipe for the same reason."""
        problem = Problem.of(error)
        for recipe in self._job.recipes:
            rejected = VariantRejected(**self._of, recipe=recipe, problem=problem, reason=error.what, at=self._clock())
            await self._publish(rejected, recipe)
        state = JobState.CANCELLED if isinstance(error, JobCancelled) else JobState.FAILED
        await self._change(state=state, reason=error.what, problem=problem)

    async def requeued(self, error: TemporaryError) -> None:
        """Shows the job as queued, because it will be delivered again."""
        await self._change(state=JobState.QUEUED, reason=error.what)

    def _event(self, variant: VariantOutcome, outcome: Outcome) -> Event:
        common: Mapping[str, Any] = {
            **self._of,
            "recipe": variant.recipe,
            "digest": variant.digest,
            "evaluation": variant.evaluation,
            "report": variant.report,
            "job_report": outcome.report,
            "reason": variant.reason,
            "at": self._clock(),
        }
        if not variant.passed:
            return VariantRejected(**common)
        return VariantOptimized(**common, files=variant.files, golden=self._job.golden, chosen=variant.chosen)

    async def _change(self, **fields: object) -> None:
        self._view = self._view.model_copy(update={**fields, "at": self._clock()})
        await self._board.put(self._view)

    async def _publish(self, event: Event, what: str) -> None:
        """Publishes an event; waits while the stream is full, because giving up would lose the result of hours."""
        await until_stored(partial(self._publish_once, event, what), self._show_waiting)

    async def _show_waiting(self, error: DiskFull) -> None:
        await self._change(reason=error.what)

    async def _publish_once(self, event: Event, what: str) -> None:
        """Publishes an event whose id is derived from the job, so that a repeated step repeats the same event."""
        envelope = Envelope(
            id=event_id(self._job.id, what),
            source="slmops/optimizer",
            type=event.type,
            time=self._clock(),
            subject=event.key,
            traceparent=traceparent(),
            actor=self._job.actor or None,
        )
        await self._bus.client.publish(event, envelope)

    @property
    def _of(self) -> dict[str, Any]:
        job = self._job
        return {"job": job.id, "model": job.model, "version": job.version, "profile": job.profile.name}
