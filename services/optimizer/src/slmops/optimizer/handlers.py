"""Handles events and commands: queues jobs, runs them, answers questions about jobs, recipes and evaluations.

One job makes all variants of one version for one device profile.
"""

from __future__ import annotations

import asyncio
import logging
import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from slmops.contracts import subjects
from slmops.contracts.cloudevent import MESSAGE_ID_HEADER
from slmops.contracts.commands import (
    CancelJob,
    EvaluationFiles,
    FetchEvaluation,
    JobList,
    ListJobs,
    ListRecipes,
    ListVersions,
    Optimize,
    RecipeList,
    UploadData,
    UploadTicket,
    VariantView,
    VerifyEvaluation,
    VersionView,
)
from slmops.contracts.descriptor import Descriptor
from slmops.contracts.errors import (
    IllegalTransition,
    InternalError,
    InvalidMessage,
    InvalidRecipe,
    NotFound,
    PermanentError,
    TemporaryError,
)
from slmops.contracts.evaluation import Verification
from slmops.contracts.events import ModelVersionRegistered
from slmops.contracts.jobs import JobView, OptimizeJob
from slmops.contracts.manifest import FILE_PATH, PackageFile
from slmops.contracts.profile import DeviceProfile
from slmops.contracts.prompts.evaluation_data import EvaluationData, check_data, check_sizes
from slmops.contracts.recipe import Recipe
from slmops.kit.acting import current_actor
from slmops.kit.bus.pages import cursor, fitting, position
from slmops.kit.bus.refusals import until_stored
from slmops.kit.bus.service_bus import Bus, MessageContext
from slmops.kit.clock import Clock
from slmops.kit.objects.store import Objects
from slmops.kit.tracing import traceparent
from slmops.optimizer.jobs.board import Board
from slmops.optimizer.jobs.publisher import JobPublisher, queued
from slmops.optimizer.jobs.uploader import JobReport
from slmops.optimizer.jobs.verification import verify_report
from slmops.optimizer.jobs.worker import Worker
from slmops.optimizer.recipes.ancestry import Ancestry
from slmops.optimizer.recipes.catalogue import catalogue
from slmops.optimizer.recipes.library import bundled, check, recipe_named

log = logging.getLogger(__name__)
_JOBS = "jobs"
UPLOAD_ID = re.compile(r"[0-9a-f]{32}")
DELIVERIES = 20
"""How often a job is delivered: often, because a search of hours may see many restarts; not forever, because a job may
kill its worker."""


class Handlers:
    """The handlers of the optimizer.

    `profiles` are all profiles by name; `enabled` are those for which every version is optimized. `new_id` makes the
    ids that distinguish requests.
    """

    def __init__(
        self,
        bus: Bus,
        objects: Objects,
        board: Board,
        worker: Worker,
        profiles: Mapping[str, DeviceProfile],
        enabled: Sequence[str],
        recipes: Sequence[str],
        ancestry: Ancestry,
        home: Path,
        clock: Clock,
        new_id: Callable[[], str] = lambda: str(uuid.uuid4()),
    ) -> None:
        self._bus = bus
        self._objects = objects
        self._board = board
        self._worker = worker
        self._profiles = profiles
        self._enabled = tuple(enabled)
        self._recipes = tuple(recipes)
        self._ancestry = ancestry
        self._home = home
        self._clock = clock
        self._new_id = new_id

    # ---- events and jobs ----------------------------------------------------------------------------------

    async def version_registered(self, event: ModelVersionRegistered, delivered: MessageContext) -> None:
        """Queues one job per enabled device profile; waits while the queue is full.

        Queuing a job twice has no effect: its id is the message id, so the server drops the duplicate.
        """
        for name in self._enabled:
            job = OptimizeJob(
                model=event.model,
                version=event.version,
                digest=event.digest,
                format=event.format,
                files=event.files,
                golden=event.golden,
                data=event.data,
                profile=self._profiles[name],
                recipes=self._recipes,
                definitions=tuple(map(recipe_named, self._recipes)),
            )
            job = await self._ancestry.anchored(job)
            async with delivered.kept_alive():
                await until_stored(partial(self._queue, job))

    async def optimize(self, job: OptimizeJob, delivered: MessageContext) -> None:
        """Runs one job. A permanent error rejects every recipe; after a temporary error the job is redelivered."""
        publisher = JobPublisher(self._bus, self._board, self._clock, job)
        async with delivered.kept_alive():
            await publisher.started()
            try:
                if delivered.attempt >= DELIVERIES:
                    raise InternalError(
                        f"the job was started {delivered.attempt - 1} times and never finished", where=job.id
                    )
                await publisher.finished(await self._worker.run(job, publisher))
            except PermanentError as error:
                log.warning("cannot optimize %s:%s: %s", job.model, job.version, error)
                await publisher.failed(error)
            except TemporaryError as error:
                await publisher.requeued(error)
                raise

    async def _queue(self, job: OptimizeJob) -> JobView:
        """Stores the job in the queue, then shows it on the board. Raises `Unreachable`, `DiskFull`.

        In this order the board never shows a job that is not in the queue.
        """
        headers = {MESSAGE_ID_HEADER: job.id, "content-type": "application/json"}
        if parent := traceparent():
            headers["traceparent"] = parent
        payload = job.model_dump_json(by_alias=True).encode()
        await self._bus.client.store(subjects.optimize_job(job.profile.name), payload, headers)
        view = queued(job, self._clock)
        await self._board.queue(view)
        return view

    # ---- commands -----------------------------------------------------------------------------------------

    async def request(self, command: Optimize) -> JobView:
        """Queues a job on request, or returns the running job that does the same work.

        Raises `NotFound`, `InvalidRecipe`, `IllegalTransition` for a retired version, `DiskFull`, and `InvalidMessage`
        and `DigestMismatch` for own texts and tasks.
        """
        recipes = self._requested_recipes(command)
        profile = self._profile(command.profile or next(iter(self._enabled or self._profiles)))
        version = await self._version(command.model, command.version)
        data = (version.data or EvaluationData()).replaced_by(await self._adopted(command))
        job = OptimizeJob(
            model=version.model,
            version=version.version,
            digest=version.digest,
            format=version.format,
            files=version.files,
            golden=version.golden,
            profile=profile,
            recipes=tuple(recipes),
            definitions=tuple(recipes.values()),
            search=command.search,
            data=data if data.files else None,
            asked=self._new_id(),
            actor=str(current_actor() or ""),
        )
        if not (command.recipes or command.definitions or command.search):
            job = await self._ancestry.anchored(job)
        for view in await self._board.all():
            if not view.state.ended and (view.work, view.model, view.version) == (job.work, job.model, job.version):
                return view
        return await self._queue(job)

    async def upload_data(self, command: UploadData) -> UploadTicket:
        """Returns upload URLs for the texts and tasks that the store lacks. Raises `InvalidMessage`."""
        upload = uuid.uuid4().hex
        missing = [file.digest for file in command.files if not await self._objects.keep(file.digest)]
        urls = {digest: await self._objects.presigned_upload(upload, digest) for digest in dict.fromkeys(missing)}
        return UploadTicket(upload=upload, urls=urls)

    async def cancel(self, command: CancelJob) -> JobView:
        """Cancels a job. Raises `NotFound`, `IllegalTransition` for a job that has ended."""
        view = await self._job(command.job)
        if view.state.ended:
            raise IllegalTransition(f"the job is {view.state} already", where=command.job)
        await self._board.cancel(command.job, str(current_actor() or command.by))
        return await self._job(command.job)

    async def list_jobs(self, query: ListJobs) -> JobList:
        """Raises `NotFound`, `InvalidCursor`. Growth: reads the jobs of three months for each page."""
        if query.job is not None:
            return JobList(jobs=(await self._job(query.job),))
        before = position(_JOBS, query.cursor, float, str) if query.cursor else None
        wanted = [view for view in await self._board.all() if query.model in (None, view.model)]
        found = sorted((view for view in wanted if before is None or _queued(view) < before), key=_queued, reverse=True)
        views = fitting(found[: query.limit])
        more = cursor(_JOBS, *_queued(views[-1])) if len(found) > len(views) else None
        return JobList(jobs=tuple(reversed(views)), cursor=more)

    async def list_recipes(self, _: ListRecipes) -> RecipeList:
        return catalogue()

    async def fetch_evaluation(self, command: FetchEvaluation) -> EvaluationFiles:
        """Returns presigned URLs of a variant's report, or of a job's report and pictures.

        Raises `NotFound`, `InvalidMessage`.
        """
        if command.job is None:
            return EvaluationFiles(report=await self._file("evaluation.json", await self._report(command)))
        report = (await self._job(command.job)).report
        if report is None:
            raise NotFound("the job has no report yet", where=command.job, fix="Wait until the job is done.")
        found = JobReport.model_validate_json(await self._objects.get_bytes(report.digest))
        pictures = [await self._file(picture.annotations[FILE_PATH], picture) for picture in found.pictures]
        return EvaluationFiles(report=await self._file("job.json", report), pictures=tuple(pictures))

    async def verify(self, command: VerifyEvaluation) -> Verification:
        """Measures a variant again and compares. Raises `NotFound`, `InvalidMessage`, `OptimizationFailed`."""
        digest = command.report or (await self._report(command)).digest
        return await verify_report(digest, self._objects, self._home / "verifications")

    # ---- steps --------------------------------------------------------------------------------------------

    def _requested_recipes(self, command: Optimize) -> dict[str, Recipe]:
        """Returns the recipes by name, in the order in which they are tried. Raises `NotFound`, `InvalidRecipe`."""
        own = {recipe.name: recipe for recipe in command.definitions}
        for recipe in command.definitions:
            check(recipe)
            if recipe != own[recipe.name] or recipe.digest != bundled().get(recipe.name, recipe).digest:
                raise InvalidRecipe(
                    f"another recipe already has the name {recipe.name!r}", fix="Give your recipe another name."
                )
        names = command.recipes or (() if own else self._recipes)
        return {name: recipe_named(name) for name in names} | own

    async def _adopted(self, command: Optimize) -> EvaluationData | None:
        """Verifies the uploaded texts and tasks of a command and makes them blobs."""
        data = command.data
        if data is None or not data.files:
            return None
        check_sizes(data)
        if not UPLOAD_ID.fullmatch(command.upload):
            raise InvalidMessage("the upload id is not valid", where="upload", fix="Upload the texts and tasks first.")
        contents = {}
        for file in data.files:
            if not await self._objects.keep(file.digest):
                await self._objects.adopt(command.upload, file.digest, file.size_bytes)
            contents[file.path] = await self._objects.get_bytes(file.digest, file.size_bytes)
        await asyncio.to_thread(check_data, data, contents)
        return data

    def _profile(self, name: str) -> DeviceProfile:
        if name not in self._profiles:
            raise NotFound(f"there is no device profile {name!r}", fix=f"Use one of: {', '.join(self._profiles)}.")
        return self._profiles[name]

    async def _version(self, model: str, version: str, *, retired: bool = False) -> VersionView:
        found = (await self._bus.client.request(ListVersions(model=model, version=version))).versions
        if not found:
            raise NotFound(f"there is no {model}:{version}", fix="List the versions: slmops model ls.")
        if found[0].state == "retired" and not retired:
            raise IllegalTransition(f"{model}:{version} is retired", fix="Push another version.")
        return found[0]

    async def _report(self, of: FetchEvaluation | VerifyEvaluation) -> Descriptor:
        """Returns the report of the chosen variant, or of the variant of a recipe."""
        if of.model is None or of.version is None:
            raise InvalidMessage(
                "the command does not say which evaluation", fix="Specify a model and a version, or a report."
            )
        variants = (await self._version(of.model, of.version, retired=True)).variants
        matching = [v for v in variants if of.profile in (None, v.profile) and _matches(v, of.recipe)]
        if not matching or matching[0].report is None:
            what = f"{of.model}:{of.version}" + (f" by {of.recipe}" if of.recipe else "")
            raise NotFound(
                f"{what} was not evaluated", fix=f"List its variants: slmops variant ls {of.model}:{of.version}."
            )
        return matching[0].report

    async def _file(self, path: str, of: Descriptor) -> PackageFile:
        return PackageFile(path=path, descriptor=of, url=await self._objects.presigned_get(of.digest))

    async def _job(self, job: str) -> JobView:
        view = await self._board.find(job)
        if view is None:
            raise NotFound(f"there is no job {job}", fix="List the jobs: slmops job ls.")
        return view


def _queued(view: JobView) -> tuple[float, str]:
    return view.queued_at.timestamp(), view.job


def _matches(variant: VariantView, recipe: str | None) -> bool:
    return variant.recipe == recipe if recipe else variant.chosen


def routes(bus: Bus, handlers: Handlers) -> None:
    bus.on(ModelVersionRegistered, handlers.version_registered)
    bus.consume(subjects.optimize_job("*"), OptimizeJob, handlers.optimize, max_deliver=DELIVERIES)
    bus.serve(UploadData, handlers.upload_data)
    bus.serve(Optimize, handlers.request, at_once=1)  # it looks for the same work before it queues a job
    bus.serve(CancelJob, handlers.cancel)
    bus.serve(ListJobs, handlers.list_jobs)
    bus.serve(ListRecipes, handlers.list_recipes)
    bus.serve(FetchEvaluation, handlers.fetch_evaluation)
    bus.serve(VerifyEvaluation, handlers.verify, at_once=1)  # each runs a model
