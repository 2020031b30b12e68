"""Event or command → job → worker → events. One job makes every variant of one version for one device profile."""

from __future__ import annotations

import logging
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
from slmops.contracts.recipe import Recipe
from slmops.kit.bus.refusals import until_stored
from slmops.kit.bus.service_bus import Bus, MessageContext
from slmops.kit.clock import Clock
from slmops.kit.objects.store import Objects
from slmops.kit.tracing import traceparent
from slmops.optimizer.jobs.board import Board
from slmops.optimizer.jobs.publisher import JobPublisher, queued
from slmops.optimizer.jobs.uploader import JobReport
from slmops.optimizer.jobs.verification import verified
from slmops.optimizer.jobs.worker import Worker
from slmops.optimizer.recipes.ancestry import Ancestry
from slmops.optimizer.recipes.catalogue import catalogue
from slmops.optimizer.recipes.library import bundled, check, recipe_named

log = logging.getLogger(__name__)
DELIVERIES = 20
"""Of a job. Generous, because a search of hours outlives many a restart; finite, because a job may kill its worker."""


class Handlers:
    """`profiles` by name; each version is made for those in `made_for`. `new_id` tells requests apart."""

    def __init__(
        self,
        bus: Bus,
        objects: Objects,
        board: Board,
        worker: Worker,
        profiles: Mapping[str, DeviceProfile],
        made_for: Sequence[str],
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
        self._made_for = tuple(made_for)
        self._recipes = tuple(recipes)
        self._ancestry = ancestry
        self._home = home
        self._clock = clock
        self._new_id = new_id

    # ---- events and jobs ----------------------------------------------------------------------------------

    async def version_registered(self, event: ModelVersionRegistered, delivered: MessageContext) -> None:
        """Queue one job per device profile, waiting while the queue is full.

        Queued twice is queued once: the job's id is its message id.
        """
        for name in self._made_for:
            job = OptimizeJob(
                model=event.model,
                version=event.version,
                digest=event.digest,
                format=event.format,
                files=event.files,
                golden=event.golden,
                profile=self._profiles[name],
                recipes=self._recipes,
                definitions=tuple(map(recipe_named, self._recipes)),
            )
            anchored = await self._ancestry.anchored(job)
            async with delivered.kept_alive():
                await until_stored(partial(self._queue, anchored))

    async def optimize(self, job: OptimizeJob, delivered: MessageContext) -> None:
        """Do one job. A permanent failure is an outcome (every recipe rejected); a temporary one is redelivered."""
        telling = JobPublisher(self._bus, self._board, self._clock, job)
        async with delivered.kept_alive():
            await telling.started()
            try:
                if delivered.attempt >= DELIVERIES:
                    raise InternalError(f"it was begun {delivered.attempt - 1} times and never ended", where=job.id)
                await telling.ended(await self._worker.do(job, telling))
            except PermanentError as error:
                log.warning("%s:%s cannot be optimized: %s", job.model, job.version, error)
                await telling.failed(error)
            except TemporaryError as error:
                await telling.waits(error)
                raise

    async def _queue(self, job: OptimizeJob) -> JobView:
        """Raises `Unreachable`, `DiskFull`; then the board shows no job that nobody would ever do."""
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
        """Raises `NotFound`, `InvalidRecipe`, `IllegalTransition` for a retired version, `DiskFull`."""
        recipes = self._asked(command)
        profile = self._profile(command.profile or next(iter(self._made_for or self._profiles)))
        version = await self._version(command.model, command.version)
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
            asked=self._new_id(),
        )
        if not (command.recipes or command.definitions or command.search):
            job = await self._ancestry.anchored(job)
        for view in await self._board.all():
            if not view.state.ended and (view.work, view.model, view.version) == (job.work, job.model, job.version):
                return view
        return await self._queue(job)

    async def cancel(self, command: CancelJob) -> JobView:
        """Raises `NotFound`, `IllegalTransition` for a job that has ended."""
        view = await self._job(command.job)
        if view.state.ended:
            raise IllegalTransition(f"the job is {view.state} already", where=command.job)
        await self._board.cancel(command.job, command.by)
        return await self._job(command.job)

    async def list_jobs(self, query: ListJobs) -> JobList:
        if query.job is not None:
            return JobList(jobs=(await self._job(query.job),))
        views = [view for view in await self._board.all() if query.model in (None, view.model)]
        return JobList(jobs=tuple(views))

    async def list_recipes(self, _: ListRecipes) -> RecipeList:
        return catalogue()

    async def fetch_evaluation(self, command: FetchEvaluation) -> EvaluationFiles:
        """Raises `NotFound`, `InvalidMessage`."""
        if command.job is None:
            return EvaluationFiles(report=await self._file("evaluation.json", await self._report(command)))
        report = (await self._job(command.job)).report
        if report is None:
            raise NotFound("the job has no report yet", where=command.job, fix="Wait until it is done.")
        found = JobReport.model_validate_json(await self._objects.get_bytes(report.digest))
        pictures = [await self._file(picture.annotations[FILE_PATH], picture) for picture in found.pictures]
        return EvaluationFiles(report=await self._file("job.json", report), pictures=tuple(pictures))

    async def verify(self, command: VerifyEvaluation) -> Verification:
        """Raises `NotFound`, `InvalidMessage`, `OptimizationFailed`."""
        digest = command.report or (await self._report(command)).digest
        return await verified(digest, self._objects, self._home / "verifications")

    # ---- steps --------------------------------------------------------------------------------------------

    def _asked(self, command: Optimize) -> dict[str, Recipe]:
        """By name, in the order in which they are tried. Raises `NotFound`, `InvalidRecipe`."""
        own = {recipe.name: recipe for recipe in command.definitions}
        for recipe in command.definitions:
            check(recipe)
            if recipe != own[recipe.name] or recipe.digest != bundled().get(recipe.name, recipe).digest:
                raise InvalidRecipe(
                    f"the name {recipe.name!r} means something else already", fix="Give the recipe another name."
                )
        names = command.recipes or (() if own else self._recipes)
        return {name: recipe_named(name) for name in names} | own

    def _profile(self, name: str) -> DeviceProfile:
        if name not in self._profiles:
            raise NotFound(f"there is no device profile {name!r}", fix=f"Use one of: {', '.join(self._profiles)}.")
        return self._profiles[name]

    async def _version(self, model: str, version: str, *, retired: bool = False) -> VersionView:
        found = (await self._bus.client.request(ListVersions(model=model, version=version))).versions
        if not found:
            raise NotFound(f"there is no {model}:{version}", fix="List what there is: slmops model ls.")
        if found[0].state == "retired" and not retired:
            raise IllegalTransition(f"{model}:{version} is retired", fix="Push another version.")
        return found[0]

    async def _report(self, of: FetchEvaluation | VerifyEvaluation) -> Descriptor:
        """Of a variant by its names."""
        if of.model is None or of.version is None:
            raise InvalidMessage("it is not said whose evaluation", fix="Name a model and a version, or a report.")
        variants = (await self._version(of.model, of.version, retired=True)).variants
        chosen = [v for v in variants if of.profile in (None, v.profile) and _meant(v, of.recipe)]
        if not chosen or chosen[0].report is None:
            what = f"{of.model}:{of.version}" + (f" by {of.recipe}" if of.recipe else "")
            raise NotFound(f"{what} was not evaluated", fix=f"See slmops variant ls {of.model}:{of.version}.")
        return chosen[0].report

    async def _file(self, path: str, of: Descriptor) -> PackageFile:
        return PackageFile(path=path, descriptor=of, url=await self._objects.presigned_get(of.digest))

    async def _job(self, job: str) -> JobView:
        view = await self._board.find(job)
        if view is None:
            raise NotFound(f"there is no job {job}", fix="List them: slmops job ls.")
        return view


def _meant(variant: VariantView, recipe: str | None) -> bool:
    return variant.recipe == recipe if recipe else variant.chosen


def routes(bus: Bus, handlers: Handlers) -> None:
    bus.on(ModelVersionRegistered, handlers.version_registered)
    bus.consume(subjects.optimize_job("*"), OptimizeJob, handlers.optimize, max_deliver=DELIVERIES)
    bus.serve(Optimize, handlers.request)
    bus.serve(CancelJob, handlers.cancel)
    bus.serve(ListJobs, handlers.list_jobs)
    bus.serve(ListRecipes, handlers.list_recipes)
    bus.serve(FetchEvaluation, handlers.fetch_evaluation)
    bus.serve(VerifyEvaluation, handlers.verify)
