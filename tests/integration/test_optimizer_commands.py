"""Variants and measurements are reused, whichever job requests them; and the optimizer's commands on real servers."""

from __future__ import annotations

import json
import random
from collections.abc import AsyncIterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from integration.artifact_world import eventually
from integration.kit_world import World, world_on
from integration.optimizer_world import Factory, factory_on

from slmops.console.commands.evaluation_data import read_data, upload_data
from slmops.console.commands.uploading import StoreWait
from slmops.contracts.commands import FetchEvaluation, ListRecipes, ListVersions, UploadData, VerifyEvaluation
from slmops.contracts.descriptor import digest_of
from slmops.contracts.errors import IllegalTransition, InvalidMessage, InvalidRecipe, NotFound
from slmops.contracts.events import VariantOptimized, VariantProgressed, VariantRejected, VariantStarted
from slmops.contracts.jobs import JobState
from slmops.contracts.model import ModelFile
from slmops.contracts.permissions import ANSWER_WITHIN
from slmops.contracts.prompts.evaluation_data import EvaluationData
from slmops.contracts.recipe import PassSpec, Recipe
from slmops.contracts.search import SearchSpec
from slmops.registry.domain.live_blobs import named

if TYPE_CHECKING:
    from servers import S3, NatsServer

pytestmark = pytest.mark.timeout(400)
GOLDEN = b'{"prompt": "What is the capital of France?", "expect": ["Paris"]}\n'


@pytest.fixture
async def world(nats_server: NatsServer) -> AsyncIterator[World]:
    async with world_on(nats_server.url, nats_server.creds) as world:
        yield world


@pytest.fixture
async def factory(world: World, s3: S3, tmp_path: Path) -> AsyncIterator[Factory]:
    async with factory_on(world, s3, tmp_path) as factory:
        yield factory


async def made(factory: Factory, job: str, recipe: str = "int8") -> VariantOptimized:
    await factory.reached(job, JobState.DONE)
    [found] = [e for e in await factory.events(VariantOptimized, job) if e.recipe == recipe]
    return found


async def steps(factory: Factory, job: str) -> set[str]:
    return {event.step for event in await factory.events(VariantProgressed, job)}


async def test_a_second_job_with_the_same_work_reuses_the_variants_and_measurements(factory: Factory) -> None:
    await factory.start("one")
    await factory.push("1.0.0", seed=140)
    first = await made(factory, (await factory.job_of("1.0.0")).job)

    assert await steps(factory, first.job) >= {"read", "export", "int8: evaluate"}
    assert "int8: evaluate" in factory.workers["one"].log()

    again = await made(factory, (await factory.ask(recipes=("int8",))).job)
    assert await steps(factory, again.job) == set(), "nothing is made or measured again"
    assert (again.job != first.job, again.files, again.evaluation) == (True, first.files, first.evaluation)

    await factory.push("2.0.0", seed=140, model="other")  # the same weights under another name
    view = await factory.job_of("2.0.0", "other")
    other = await made(factory, view.job)
    assert await steps(factory, view.job) == set()
    assert (other.model, other.files, other.evaluation) == ("other", first.files, first.evaluation)

    more = await factory.ask(recipes=("int8", "int4"))  # int8 is reused
    assert (await made(factory, more.job)).evaluation == first.evaluation
    assert (await made(factory, more.job, "int4")).digest != first.digest


@pytest.mark.slow
async def test_a_push_with_golden_prompts_measures_the_same_variant_again(factory: Factory) -> None:
    await factory.start("one")
    await factory.push("1.0.0", seed=142)
    first = await made(factory, (await factory.job_of("1.0.0")).job)
    await factory.push("1.0.1", seed=142, golden=GOLDEN)
    asked = await made(factory, (await factory.job_of("1.0.1")).job)
    assert asked.evaluation.golden_total == 1
    assert {file.path: file.digest for file in asked.files} == {file.path: file.digest for file in first.files}
    assert asked.digest == first.digest


@pytest.mark.slow
async def test_a_report_can_be_fetched_and_verified(factory: Factory) -> None:
    (text := factory.folder / "shop.txt").write_text(prose(1))
    await factory.start("one")
    await factory.push("1.0.0", seed=141, own=read_data([text], None, None))  # measured again on the same text
    job = (await factory.job_of("1.0.0")).job
    variant = await made(factory, job)
    client = factory.world.client

    found = await client.request(FetchEvaluation(model="tiny", version="1.0.0"))
    assert found.report.descriptor == variant.report
    async with httpx.AsyncClient() as http:
        report = (await http.get(found.report.url)).json()
        whole = (await http.get((await client.request(FetchEvaluation(job=job))).report.url)).json()
    assert report["recipe"]["name"] == "int8"
    assert whole["choice"]["recipe"] == "int8"

    verified = await client.request(VerifyEvaluation(report=variant.report.digest), timeout=ANSWER_WITHIN)
    assert verified.agrees, verified
    assert {"kl", "top1", "ppl"} <= {figure.name for figure in verified.figures}
    with pytest.raises(NotFound, match="not evaluated"):
        await client.request(VerifyEvaluation(model="tiny", version="1.0.0", recipe="int4"))


@pytest.mark.slow
async def test_a_search_ends_with_a_pareto_front_and_its_picture_and_is_reused(factory: Factory) -> None:
    await factory.start("one")
    await factory.push("1.0.0", seed=143)
    await made(factory, (await factory.job_of("1.0.0")).job)
    search = SearchSpec(budget=timedelta(minutes=3), max_trials=4)
    job = (await factory.ask(recipes=("int8", "int4"), search=search)).job
    view = await factory.reached(job, JobState.DONE)
    client = factory.world.client

    optimized = await factory.events(VariantOptimized, job)
    rejected = await factory.events(VariantRejected, job)
    assert 2 <= len(optimized) + len(rejected) <= 4
    [chosen] = [event for event in optimized if event.chosen]
    assert chosen.reason == view.reason
    assert all(event.reason for event in rejected)
    files = await client.request(FetchEvaluation(job=job))
    assert [picture.path for picture in files.pictures] == ["front.png", "front.svg"]
    async with httpx.AsyncClient() as http:
        assert (await http.get(files.pictures[0].url)).content.startswith(b"\x89PNG")
        report = (await http.get(files.report.url)).json()
    assert {event.recipe for event in optimized} <= {one["recipe"] for one in report["variants"]}
    [first] = await factory.events(VariantOptimized, (await factory.job_of("1.0.0")).job)
    [known] = [one for one in report["variants"] if one["recipe"] == "int8"]
    assert known["evaluation"]["tokens_per_s"] == first.evaluation.tokens_per_s  # not measured again

    again = (await factory.ask(recipes=("int8", "int4"), search=search)).job
    await made(factory, again, chosen.recipe)
    assert await steps(factory, again) == set(), "nothing is searched again"


async def test_an_invalid_request_is_refused_before_a_job_is_queued(factory: Factory) -> None:
    await factory.start("one", recipes=json.dumps(["stock-int4"]))
    await factory.push("1.0.0", seed=142)
    mine = Recipe(name="mine", passes=(PassSpec(pass_="quantize", params={"bits": 4}),))
    for asked, kind, words in (
        ({"recipes": ("int3",)}, NotFound, "no recipe 'int3'"),
        ({"profile": "mainframe"}, NotFound, "no device profile"),
        ({"definitions": (mine,)}, InvalidRecipe, "ends in a coded model"),
        ({"definitions": (mine.model_copy(update={"name": "int4"}),)}, InvalidRecipe, "."),
        ({"version": "9.0.0"}, NotFound, "no tiny:9.0.0"),
    ):
        with pytest.raises(kind, match=words):
            await factory.ask(**asked)
    with pytest.raises(NotFound):
        await factory.cancel("00000000-0000-0000-0000-000000000000")

    job = await factory.job_of("1.0.0")
    same = await factory.ask()  # the running job
    assert same.job == job.job
    await factory.cancel(job.job)
    await factory.reached(job.job, JobState.CANCELLED)
    with pytest.raises(IllegalTransition, match="cancelled already"):
        await factory.cancel(job.job)
    assert {"int8", "int4"} <= {recipe.name for recipe in (await factory.world.client.request(ListRecipes())).recipes}
    [view] = (await factory.world.client.request(ListVersions(model="tiny"))).versions
    assert view.stage == "refused"
    assert view.variants[0].reason.startswith("cancelled by person:")


WORDS = ("shop", "till", "price", "open", "closed", "return", "repair", "order", "parcel", "delivery", "voucher")


def prose(seed: int, words: int = 900) -> str:
    chosen = random.Random(seed)
    return " ".join(chosen.choice(WORDS) for _ in range(words))


async def test_own_texts_and_tasks_are_measured_named_in_the_report_and_kept(factory: Factory) -> None:
    """The version's own data is used by its first job; a request may replace a kind of it. Neither is garbage."""
    folder, client = factory.folder, factory.world.client
    for name, content in {
        "shop.txt": prose(1),
        "mails.jsonl": "".join(json.dumps({"text": prose(seed)}) + "\n" for seed in (2, 3)),
        "till.jsonl": '{"question": "Is the till open?", "choices": ["yes", "no"], "answer": 0}\n',
    }.items():
        (folder / name).write_text(content)
    version = read_data([folder / "shop.txt"], None, [folder / "till.jsonl"])
    request = read_data([folder / "mails.jsonl"], None, None)
    assert version
    assert request
    await factory.start("one")
    pushed = await factory.push("1.0.0", seed=143, own=version)
    assert pushed.data == version.data
    first = await made(factory, (await factory.job_of("1.0.0")).job)
    assert first.evaluation.tasks.keys() == {"till"}
    report = await report_of(factory, "shop.txt")
    assert report["evaluation_text"]["files"] == [f.model_dump() for f in version.data.texts]
    assert report["evaluation_text"]["texts"] == 1
    assert report["evaluation_text"]["tokens"] > 256
    assert report["tasks"][0]["files"] == [f.model_dump() for f in version.data.tasks]

    upload = await upload_data(client, request, lambda *_: None, StoreWait())
    second = await made(factory, (await factory.ask(data=request.data, upload=upload)).job)
    assert second.evaluation.kl != first.evaluation.kl, "the same variant, measured on another text"
    assert second.digest == first.digest
    assert second.evaluation.tasks.keys() == {"till"}, "the version's tasks stay"
    report = await report_of(factory, "mails.jsonl")
    assert report["evaluation_text"]["texts"] == 2

    [started] = await factory.events(VariantStarted, second.job)
    assert started.data == version.data.replaced_by(request.data)
    kept = {reference.digest for event in [started] for reference in named(event)}
    assert kept == {file.digest for file in (*request.data.files, *version.data.tasks)}


async def report_of(factory: Factory, text: str) -> dict[str, Any]:
    """Returns the report measured on `text` as soon as the registry, which lists it, has read the event."""

    async def look() -> dict[str, Any] | None:
        with suppress(NotFound):
            found = await factory.world.client.request(FetchEvaluation(model="tiny", version="1.0.0"))
            async with httpx.AsyncClient() as http:
                report = dict((await http.get(found.report.url)).json())
            return report if report["evaluation_text"]["name"] == text else None
        return None

    return await eventually(look)


async def test_own_texts_that_cannot_be_used_are_refused_before_a_job(factory: Factory) -> None:
    await factory.start("one", profiles="[]")
    await factory.push("1.0.0", seed=144)
    bad = b'{"prompt": "Which?", "anwser": "a"}'
    file = ModelFile(path="tasks/a.jsonl", digest=digest_of(bad), size_bytes=len(bad))
    data, client = EvaluationData(tasks=(file,)), factory.world.client
    with pytest.raises(InvalidMessage, match="upload id"):
        await factory.ask(data=data, upload="../blobs")
    ticket = await client.request(UploadData(files=data.files))
    with pytest.raises(NotFound):
        await factory.ask(data=data, upload=ticket.upload)
    async with httpx.AsyncClient() as http:
        (await http.put(ticket.urls[file.digest], content=bad)).raise_for_status()
    with pytest.raises(InvalidMessage, match="answer: Field required") as refusal:
        await factory.ask(data=data, upload=ticket.upload)
    assert refusal.value.where == "tasks/a.jsonl line 1"
    assert await factory.jobs() == []
