"""Runs jobs from the queue: answers from the cache, or runs a process that can be cancelled at any time."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from slmops.contracts.cloudevent import event_id
from slmops.contracts.errors import JobCancelled, PermanentError, TemporaryError
from slmops.contracts.golden import parse_golden
from slmops.contracts.jobs import OptimizeJob
from slmops.kit.cancellation import cancel_and_wait
from slmops.kit.objects.store import Objects
from slmops.kit.tracing import span
from slmops.optimizer.domain.gate import judge
from slmops.optimizer.jobs.board import Board
from slmops.optimizer.jobs.publisher import JobPublisher
from slmops.optimizer.jobs.uploader import ArtifactUploader
from slmops.optimizer.jobs.workspace import Claim, Workspace
from slmops.optimizer.recipes.ancestry import Ancestry
from slmops.optimizer.recipes.library import recipe_named
from slmops.optimizer.recipes.spec import JobSpec
from slmops.optimizer.store import Measured, Outcome, Results

log = logging.getLogger(__name__)
_LOOK_EVERY_S = 1.0


class Worker:
    def __init__(
        self,
        objects: Objects,
        results: Results,
        workspace: Workspace,
        board: Board,
        ancestry: Ancestry,
        memory_limit_bytes: int | None,
    ) -> None:
        self._objects = objects
        self._results = results
        self._workspace = workspace
        self._board = board
        self._ancestry = ancestry
        self._memory_limit_bytes = memory_limit_bytes

    async def do(self, job: OptimizeJob, telling: JobPublisher) -> Outcome:
        """Raises `JobCancelled`, what `Workspace.run` raises, `NotFound` for files or recipes, `Unreachable`."""
        if (by := await self._board.cancelled(job.id)) is not None:
            raise _cancelled(by)
        if known := await self._results.outcome(job.work):
            return known
        with span("optimize", model=job.model, version=job.version, profile=job.profile.name):
            try:
                return await self._unless_cancelled(job, self._work(job, telling))
            except PermanentError:
                self._workspace.discard(job.work)  # nobody will go on with it
                raise

    async def _work(self, job: OptimizeJob, telling: JobPublisher) -> Outcome:
        async with self._workspace.claim(job.work) as claim:
            if known := await self._results.outcome(job.work):  # another worker did it while we waited
                return known
            outcome = await self._made(job, claim, telling)
            if all(variant.evaluation for variant in outcome.variants):  # what failed may work another time
                await self._results.put_outcome(job.work, outcome)
        self._workspace.discard(job.work)  # only now: until here a restart continues in it
        return outcome

    async def _made(self, job: OptimizeJob, claim: Claim, telling: JobPublisher) -> Outcome:
        spec, source = await self._spec(job), event_id(job.digest, job.golden.digest if job.golden else "")
        known = [one for one in await self._results.measured(source) if _usable(one, spec)]
        files = await self._fetch(job, claim.folder)
        if job.predecessor:
            before = await self._ancestry.fetch(job.predecessor, claim.folder / "predecessor")
            spec = spec.model_copy(update={"predecessor": before})
        result = await self._workspace.run(files, claim, spec, known, telling.progress)
        await telling.progress("upload", len(result.variants), len(result.variants) + 1)
        keeper = ArtifactUploader(self._objects, spec, job.files, claim.folder, known, result)
        outcome = await keeper.keep()
        for one in keeper.measured:
            await self._results.put_measured(source, one)
        return outcome

    async def _spec(self, job: OptimizeJob) -> JobSpec:
        meant = {recipe.name: recipe for recipe in job.definitions}
        golden = (await self._objects.get_bytes(job.golden.digest)).decode() if job.golden else ""
        return JobSpec(
            recipes=tuple(meant.get(name) or recipe_named(name) for name in job.recipes),
            profile=job.profile,
            search=job.search,
            golden=parse_golden(golden),
            memory_limit_bytes=self._memory_limit_bytes,
        )

    async def _fetch(self, job: OptimizeJob, folder: Path) -> Path:
        """The version's files on disk, verified: a single GGUF file, or a directory."""
        source = folder / "source"
        for file in job.files:
            target = source / file.path
            if not target.exists():
                await self._objects.get_file(file.digest, target)
        return source / job.files[0].path if job.format == "gguf" else source

    async def _unless_cancelled(self, job: OptimizeJob, work: Coroutine[Any, Any, Outcome]) -> Outcome:
        working, watching = asyncio.create_task(work), asyncio.create_task(self._cancellation(job.id))
        try:
            await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                return working.result()
            raise _cancelled(watching.result())
        finally:
            await cancel_and_wait([working, watching])  # the process is dead before we go on

    async def _cancellation(self, job: str) -> str:
        """By whom, when somebody wants it. Asked and not heard, so that nothing is missed while the bus is away."""
        while True:
            try:
                if (by := await self._board.cancelled(job)) is not None:
                    return by
            except TemporaryError as error:
                log.warning("whether %s is cancelled cannot be known: %s", job, error)
            await asyncio.sleep(_LOOK_EVERY_S)


def _usable(known: Measured, spec: JobSpec) -> bool:
    """Its files are in the store, or this profile refuses it, too."""
    return known.stored or not judge(known.evaluation, spec.profile).passed


def _cancelled(by: str) -> JobCancelled:
    return JobCancelled(f"cancelled by {by}", fix="Ask for it again: slmops optimize.")
