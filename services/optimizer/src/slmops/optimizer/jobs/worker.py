"""Runs jobs: returns the outcome from the cache, or runs a process that can be cancelled at any time."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any

from slmops.contracts.errors import JobCancelled, NotFound, PermanentError, TemporaryError
from slmops.contracts.jobs import OptimizeJob
from slmops.contracts.model import ModelFile
from slmops.contracts.prompts.evaluation_data import EvaluationData
from slmops.contracts.prompts.golden import parse_golden
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
_POLL_EVERY_S = 1.0


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

    async def run(self, job: OptimizeJob, publisher: JobPublisher) -> Outcome:
        """Runs a job. Raises `JobCancelled`, `NotFound` for files or recipes, `Unreachable`, and what `Workspace.run`
        raises."""
        if (by := await self._board.cancelled(job.id)) is not None:
            raise _cancelled(by)
        if known := await self._results.outcome(job.work):
            return known
        with span("optimize", model=job.model, version=job.version, profile=job.profile.name):
            try:
                return await self._unless_cancelled(job, self._work(job, publisher))
            except PermanentError:
                await asyncio.to_thread(self._workspace.discard, job.work)  # the job will not be redelivered
                raise

    async def _work(self, job: OptimizeJob, publisher: JobPublisher) -> Outcome:
        async with self._workspace.claim(job.work) as claim:
            if known := await self._results.outcome(job.work):  # another worker did it while we waited
                return known
            outcome = await self._make(job, claim, publisher)
            if all(variant.evaluation for variant in outcome.variants):  # a failed recipe may succeed another time
                await self._results.put_outcome(job.work, outcome)
        # Only now, because a restart before this point continues in the folder.
        await asyncio.to_thread(self._workspace.discard, job.work)
        return outcome

    async def _make(self, job: OptimizeJob, claim: Claim, publisher: JobPublisher) -> Outcome:
        spec, source = await self._spec(job, claim.folder / "data"), job.source
        known = [one for one in await self._results.measured(source) if _usable(one, spec)]
        files = await self._fetch(job, claim.folder)
        if job.predecessor:
            before = await self._ancestry.fetch(job.predecessor, claim.folder / "predecessor")
            spec = spec.model_copy(update={"predecessor": before})
        result = await self._workspace.run(files, claim, spec, known, publisher.progress)
        await publisher.progress("upload", len(result.variants), len(result.variants) + 1)
        uploader = ArtifactUploader(self._objects, spec, job.files, claim.folder, known, result, job.data)
        outcome = await uploader.upload()
        for one in uploader.measured:
            await self._results.put_measured(source, one)
        return outcome

    async def _spec(self, job: OptimizeJob, folder: Path) -> JobSpec:
        """Returns the input of the job's process; downloads own texts and tasks to `folder`. Raises `NotFound`."""
        definitions = {recipe.name: recipe for recipe in job.definitions}
        data = job.data or EvaluationData()
        golden = (await self._objects.get_bytes(job.golden.digest)).decode() if job.golden else ""
        return JobSpec(
            recipes=tuple(definitions.get(name) or recipe_named(name) for name in job.recipes),
            profile=job.profile,
            search=job.search,
            golden=parse_golden(golden),
            evaluation_texts=await self._fetch_data(data.texts, folder),
            calibration_texts=await self._fetch_data(data.calibration_texts, folder),
            tasks=await self._fetch_data(data.tasks, folder),
            memory_limit_bytes=self._memory_limit_bytes,
        )

    async def _fetch_data(self, files: Sequence[ModelFile], folder: Path) -> tuple[Path, ...]:
        for file in files:
            try:
                await self._objects.get_file(file.digest, folder / file.path)
            except NotFound as error:
                raise NotFound(
                    f"{file.path} is no longer in the store",
                    where=file.digest,
                    fix="It waited longer than the grace period of a collection: give it to slmops optimize again.",
                ) from error
        return tuple(folder / file.path for file in files)

    async def _fetch(self, job: OptimizeJob, folder: Path) -> Path:
        """Downloads and verifies the version's files; returns the path of the GGUF file or of the directory."""
        source = folder / "source"
        for file in await asyncio.to_thread(lambda: [f for f in job.files if not (source / f.path).exists()]):
            await self._objects.get_file(file.digest, source / file.path)
        return source / job.files[0].path if job.format == "gguf" else source

    async def _unless_cancelled(self, job: OptimizeJob, work: Coroutine[Any, Any, Outcome]) -> Outcome:
        working, watching = asyncio.create_task(work), asyncio.create_task(self._cancellation(job.id))
        try:
            await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                return working.result()
            raise _cancelled(watching.result())
        finally:
            await cancel_and_wait([working, watching])  # returns when the process is dead

    async def _cancellation(self, job: str) -> str:
        """Returns who asked to cancel the job, as soon as somebody does.

        It polls the board, so it does not miss a request that was made while the bus was unreachable.
        """
        while True:
            try:
                if (by := await self._board.cancelled(job)) is not None:
                    return by
            except TemporaryError as error:
                log.warning("cannot check whether %s was cancelled: %s", job, error)
            await asyncio.sleep(_POLL_EVERY_S)


def _usable(known: Measured, spec: JobSpec) -> bool:
    """Returns whether a cached variant can be used: its files are stored, or this profile refuses it and needs none."""
    return known.stored or not judge(known.evaluation, spec.profile).passed


def _cancelled(by: str) -> JobCancelled:
    return JobCancelled(f"cancelled by {by}", fix="Start it again: slmops optimize.")
