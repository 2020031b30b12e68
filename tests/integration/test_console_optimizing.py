"""`slmops optimize`, `job`, `recipe` and `eval` with a fake optimizer on a real bus."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml
from integration.artifact_world import open_store
from integration.console_cli import Cli
from integration.kit_world import World, world_on
from unit.console.test_console_render_optimizer import FOUND, PASS, RECIPE, job, whole_report

from slmops.contracts.commands import (
    CancelJob,
    EvaluationFiles,
    FetchEvaluation,
    JobList,
    ListJobs,
    ListRecipes,
    Optimize,
    RecipeList,
    VerifyEvaluation,
)
from slmops.contracts.descriptor import Descriptor
from slmops.contracts.errors import JobCancelled, NotFound, OptimizationFailed, Problem
from slmops.contracts.evaluation import Verification
from slmops.contracts.jobs import JobState, JobView
from slmops.contracts.manifest import PackageFile
from slmops.contracts.recipe import Recipe
from slmops.contracts.search import SearchSpec
from slmops.kit.bus.service_bus import Bus

if TYPE_CHECKING:
    from servers import S3, NatsServer


@pytest.fixture
async def world(nats_server: NatsServer) -> AsyncIterator[World]:
    async with world_on(nats_server.url, nats_server.creds) as world:
        yield world


@pytest.fixture
def slmops(world: World) -> Cli:
    return Cli(world)


class Optimizer:
    """A fake optimizer. Each query about jobs gets the next view of `views`; the last one is repeated."""

    def __init__(self, *views: JobView, files: EvaluationFiles | None = None, found: Verification = FOUND) -> None:
        self.views, self.files, self.found = list(views) or [job()], files, found
        self.received: list[object] = []

    async def optimize(self, command: Optimize) -> JobView:
        self.received.append(command)
        return self.views[0]

    async def jobs(self, query: ListJobs) -> JobList:
        return JobList(jobs=(self.views[0] if len(self.views) == 1 else self.views.pop(0),))

    async def cancel(self, command: CancelJob) -> JobView:
        self.received.append(command)
        return self.views[0].model_copy(update={"state": JobState.CANCELLING})

    async def recipes(self, _: ListRecipes) -> RecipeList:
        return RecipeList(recipes=(RECIPE,), passes=(PASS,))

    async def fetch(self, command: FetchEvaluation) -> EvaluationFiles:
        self.received.append(command)
        assert self.files
        return self.files

    async def verify(self, command: VerifyEvaluation) -> Verification:
        self.received.append(command)
        return self.found

    def declare(self, bus: Bus) -> None:
        bus.serve(Optimize, self.optimize)
        bus.serve(ListJobs, self.jobs)
        bus.serve(CancelJob, self.cancel)
        bus.serve(ListRecipes, self.recipes)
        bus.serve(FetchEvaluation, self.fetch)
        bus.serve(VerifyEvaluation, self.verify)


async def test_optimize_sends_recipes_and_a_search_and_prints_the_progress_while_it_waits(
    world: World, slmops: Cli, tmp_path: Path
) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text(yaml.safe_dump(RECIPE.model_dump(mode="json")))
    waiting, running = job(JobState.QUEUED, step="", reason=""), job()
    optimizer = Optimizer(waiting, running, job(JobState.DONE))
    await world.service("optimizer", optimizer.declare)
    search = ("--search", "--budget", "1.5h", "--prefer", "fastest", "--max-trials", "5")
    recipes = ("--recipe", "int8", "--recipe", str(mine), "--profile", "edge-small")
    done = await slmops("optimize", "smollm2:1.0.0", *recipes, *search, "--wait")
    assert done.exit_code == 0, done.err
    assert optimizer.received == [
        Optimize(
            model="smollm2",
            version="1.0.0",
            profile="edge-small",
            recipes=("int8",),
            definitions=(RECIPE,),
            search=SearchSpec(budget=timedelta(hours=1.5), prefer="fastest", max_trials=5),
        )
    ]
    assert "best so far: int4" in done.err
    assert "smallest of 2 that pass" in done.out


@pytest.mark.parametrize(
    ("last", "code"),
    [
        (job(JobState.REFUSED, reason="nothing passes edge-small"), OptimizationFailed.code),
        (job(JobState.CANCELLED, problem=Problem(code="job_cancelled", what="cancelled by bob")), JobCancelled.code),
    ],
)
async def test_waiting_for_a_refused_or_cancelled_job_is_an_error(
    world: World, slmops: Cli, last: JobView, code: str
) -> None:
    await world.service("optimizer", Optimizer(job(), last).declare)
    done = await slmops("optimize", "smollm2:1.0.0", "--wait", "--json")
    assert (done.exit_code, done.problem["code"]) == (1, code)


async def test_a_job_may_be_named_by_a_prefix_of_its_id(world: World, slmops: Cli) -> None:
    optimizer = Optimizer()
    await world.service("optimizer", optimizer.declare)
    listed = await slmops("job", "ls", "--json")
    assert JobList.model_validate(listed.json) == JobList(jobs=(job(),))
    done = await slmops("job", "cancel", "5f0c", "--json")
    assert JobView.model_validate(done.json).state is JobState.CANCELLING
    assert optimizer.received == [
        CancelJob(job=job().job, by=f"person:{(await slmops('whoami', '--json')).json['user']}")
    ]
    other = await slmops("job", "cancel", "ffff", "--json")
    assert (other.exit_code, other.problem["code"]) == (1, NotFound.code)


async def test_recipes_and_passes_are_listed_and_shown(world: World, slmops: Cli) -> None:
    await world.service("optimizer", Optimizer().declare)
    assert Recipe.model_validate((await slmops("recipe", "show", "mine", "--json")).json) == RECIPE
    text = (await slmops("recipe", "show", "mine")).out
    assert Recipe.model_validate(yaml.safe_load(text), extra="forbid") == RECIPE
    assert (await slmops("recipe", "ls", "--json")).json["recipes"][0]["name"] == "mine"
    assert (await slmops("recipe", "passes", "--json")).json["passes"][0]["parameters"][0]["default"] == 4
    missing = await slmops("recipe", "show", "int3", "--json")
    assert (missing.exit_code, missing.problem["fix"]) == (1, "Use one of: mine.")


async def test_an_evaluation_is_fetched_verified_and_saved(world: World, slmops: Cli, s3: S3, tmp_path: Path) -> None:
    import json

    objects = await open_store(s3)

    async def stored(path: str, data: bytes) -> PackageFile:
        blob = await objects.put_bytes(data, "application/octet-stream")
        return PackageFile(path=path, descriptor=blob, url=await objects.presigned_get(blob.digest))

    report = json.dumps(whole_report()).encode()
    files = EvaluationFiles(report=await stored("job.json", report), pictures=(await stored("front.png", b"picture"),))
    optimizer = Optimizer(files=files)
    await world.service("optimizer", optimizer.declare)
    done = await slmops("eval", "show", "5f0c9d5e", "--save", str(tmp_path / "front"), "--json")
    assert done.json["report"] == whole_report()
    assert (tmp_path / "front" / "job.json").read_bytes() == report
    assert (tmp_path / "front" / "front.png").read_bytes() == b"picture"
    assert optimizer.received == [FetchEvaluation(job=job().job)]

    wrong_digest = files.report.model_copy(update={"descriptor": Descriptor.of(b"other", "application/json")})
    optimizer.files = EvaluationFiles(report=wrong_digest)
    refused = await slmops("eval", "show", "smollm2:1.0.0:int4", "--json")
    assert refused.problem["code"] == "digest_mismatch"


async def test_the_exit_code_of_verify_says_whether_the_figures_are_reproduced(world: World, slmops: Cli) -> None:
    optimizer = Optimizer()
    await world.service("optimizer", optimizer.declare)
    done = await slmops("eval", "verify", "smollm2:1.0.0:int4", "--json")
    assert (done.exit_code, Verification.model_validate(done.json)) == (1, FOUND)
    optimizer.found = FOUND.model_copy(update={"agrees": True})
    digest = "sha256:" + "ab" * 32
    assert (await slmops("eval", "verify", digest)).exit_code == 0
    assert optimizer.received == [
        VerifyEvaluation(model="smollm2", version="1.0.0", recipe="int4"),
        VerifyEvaluation(report=digest),
    ]
