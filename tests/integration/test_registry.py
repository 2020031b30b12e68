"""The registry on real NATS, S3, SQLite and PostgreSQL: pushes, refusals, aliases and lists."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

import pytest
from integration.artifact_world import (
    GOLDEN,
    Operator,
    Optimizer,
    eventually,
    model_file,
    open_store,
    put,
    running,
    settings_of,
)
from integration.kit_world import World, envelope, world_on

from slmops.contracts.commands import BeginUpload, ListVersions, RetireVersion, SetAlias, VersionView
from slmops.contracts.descriptor import digest_of
from slmops.contracts.errors import (
    AlreadyExists,
    DigestMismatch,
    IllegalTransition,
    InvalidMessage,
    NotFound,
    SlmopsError,
)
from slmops.contracts.events import (
    ModelAliasMoved,
    ModelVersionRegistered,
    ModelVersionRetired,
    VariantOptimized,
    VariantStarted,
)
from slmops.kit.objects.store import Objects
from slmops.registry.app import build
from slmops.registry.settings import Settings

if TYPE_CHECKING:
    from servers import S3, NatsServer


@pytest.fixture
async def world(nats_server: NatsServer) -> AsyncIterator[World]:
    async with world_on(nats_server.url, nats_server.creds) as world:
        yield world


@pytest.fixture
def settings(world: World, s3: S3, tmp_path: Path, database_url: str) -> Settings:
    return Settings.model_validate(settings_of(world, s3, "registry", tmp_path, database_url))


@pytest.fixture
async def operator(world: World, settings: Settings) -> AsyncIterator[Operator]:
    """Yields an operator of a running registry."""
    async with running(build(settings)):
        yield Operator(await world.connect("console"))


@pytest.fixture
async def objects(s3: S3) -> Objects:
    return await open_store(s3)


def weights(path: str = "model.gguf") -> dict[str, bytes]:
    """Returns a file whose content is new to the store."""
    return {path: b"GGUF" + uuid4().bytes * 1000}


async def listed(operator: Operator, model: str | None = None) -> list[VersionView]:
    return list((await operator.client.request(ListVersions(model=model))).versions)


async def wait_for_events(world: World, kind: type[ModelVersionRegistered], count: int) -> list[ModelVersionRegistered]:
    async def look() -> list[ModelVersionRegistered] | None:
        stored = [kind.model_validate_json(m.data) for m in await world.stored("EVENTS") if m.subject == kind.type]
        return stored if len(stored) >= count else None

    return await eventually(look)


async def test_a_pushed_version_is_listed_announced_and_stored(
    operator: Operator, world: World, objects: Objects
) -> None:
    content = weights() | {"tokenizer/vocab.json": b"{}"}
    others = await objects.keys("uploads/")
    view = await operator.push("1.0.0", content, GOLDEN)
    assert (view.state, view.stage, view.size_bytes) == ("registered", "registered", sum(map(len, content.values())))
    assert await listed(operator) == [view]
    [event] = await wait_for_events(world, ModelVersionRegistered, 1)
    assert event.digest == view.digest
    assert {f.path: await objects.get_bytes(f.digest) for f in event.files} == content
    assert event.golden and await objects.get_bytes(event.golden.digest) == GOLDEN
    assert await objects.keys("uploads/") == others


async def test_an_upload_without_a_registration_is_not_listed_or_announced(operator: Operator, world: World) -> None:
    await operator.upload("1.0.0", weights())
    assert await listed(operator) == []
    assert await world.stored("EVENTS") == []


async def test_only_files_that_the_store_does_not_have_get_an_upload_url(operator: Operator) -> None:
    first, second = weights(), weights()
    shared = {"tokenizer.json": uuid4().bytes, "copy-of-tokenizer.json": b""}
    shared["copy-of-tokenizer.json"] = shared["tokenizer.json"]
    ticket = await operator.begin("1.0.0", first | shared)
    assert set(ticket.urls) == {digest_of(data) for data in (first | shared).values()}
    await operator.push("1.0.0", first | shared)
    again = await operator.begin("1.0.1", second | shared)
    assert set(again.urls) == {digest_of(data) for data in second.values()}
    assert len({ticket.upload, again.upload}) == 2


async def test_repeating_a_push_gives_the_same_answer_and_publishes_no_event(operator: Operator, world: World) -> None:
    content = weights()
    first = await operator.push("1.0.0", content, GOLDEN)
    assert (await operator.begin("1.0.0", content | {"golden.jsonl": GOLDEN})).urls == {}
    assert await operator.push("1.0.0", content, GOLDEN) == first
    assert await operator.push("1.0.0", content) == first
    await operator.push("1.0.1", weights())
    assert [e.version for e in await wait_for_events(world, ModelVersionRegistered, 2)] == ["1.0.0", "1.0.1"]


async def test_a_version_with_other_content_is_refused_before_the_upload(operator: Operator) -> None:
    first = await operator.push("1.0.0", weights())
    other = weights()
    with pytest.raises(AlreadyExists, match="choose a new version"):
        await operator.begin("1.0.0", other)
    upload = await operator.upload("1.0.1", other)
    with pytest.raises(AlreadyExists, match="choose a new version"):
        await operator.client.request(operator.registration("1.0.0", upload, other))
    assert await listed(operator) == [first]


async def test_uploaded_content_with_a_wrong_digest_is_refused_and_deleted(
    operator: Operator, world: World, objects: Objects
) -> None:
    announced, sent = weights(), weights()
    digest = digest_of(announced["model.gguf"])
    ticket = await operator.begin("1.0.0", announced)
    await put(ticket.urls[digest], sent["model.gguf"])
    with pytest.raises(DigestMismatch, match="Push again"):
        await operator.client.request(operator.registration("1.0.0", ticket.upload, announced))
    assert await listed(operator) == []
    assert await world.stored("EVENTS") == []
    assert not await objects.exists(digest)
    assert await objects.keys(f"uploads/{ticket.upload}") == []
    assert (await operator.push("1.0.0", announced)).version == "1.0.0"


async def test_the_error_for_a_missing_upload_names_the_file(operator: Operator) -> None:
    content = weights() | weights("second.gguf")
    ticket = await operator.begin("1.0.0", content)
    with pytest.raises(NotFound, match="was not uploaded") as refusal:
        await operator.client.request(operator.registration("1.0.0", ticket.upload, content))
    assert "gguf" in refusal.value.what
    assert await listed(operator) == []


@pytest.mark.parametrize("upload", ["", "../blobs", "f" * 31, "F" * 32])
async def test_an_invalid_upload_id_is_refused(upload: str, operator: Operator) -> None:
    with pytest.raises(InvalidMessage, match="the upload id is not valid"):
        await operator.client.request(operator.registration("1.0.0", upload, weights()))


@pytest.mark.parametrize("golden", [b"{}\n", b"not json\n", b"\xff\xfe\n", b"\n", b""])
async def test_invalid_golden_prompts_are_refused(golden: bytes, operator: Operator) -> None:
    with pytest.raises(InvalidMessage, match=r"golden"):
        await operator.push("1.0.0", weights(), golden)
    assert await listed(operator) == []


async def test_a_version_without_golden_prompts_inherits_those_of_the_previous_version(
    operator: Operator, world: World
) -> None:
    for version, golden in (("1.0.0", GOLDEN), ("1.0.1", None)):
        await operator.push(version, weights(), golden)
    events = await wait_for_events(world, ModelVersionRegistered, 2)
    assert [e.golden and e.golden.digest for e in events] == [digest_of(GOLDEN)] * 2


async def test_exactly_one_of_several_concurrent_registrations_of_a_version_succeeds(
    operator: Operator, world: World, settings: Settings
) -> None:
    async with running(build(settings)):  # another process of the service, on the same database
        contents = [weights() for _ in range(6)]
        uploads = [await operator.upload("1.0.0", content) for content in contents]
        commands = [operator.registration("1.0.0", u, c) for u, c in zip(uploads, contents, strict=True)]
        clients = [await world.connect("console") for _ in commands]
        answers = await asyncio.gather(
            *(c.request(command) for c, command in zip(clients, commands, strict=True)), return_exceptions=True
        )
        registered = [answer for answer in answers if isinstance(answer, VersionView)]
        assert len(registered) == 1
        assert [type(a) for a in answers if not isinstance(a, VersionView)] == [AlreadyExists] * 5
        assert [view.digest for view in await listed(operator)] == [registered[0].digest]
        assert len(await wait_for_events(world, ModelVersionRegistered, 1)) == 1


async def test_concurrent_repetitions_of_a_registration_get_the_same_answer(
    operator: Operator, world: World, settings: Settings
) -> None:
    async with running(build(settings)):
        content = weights()
        command = operator.registration("1.0.0", await operator.upload("1.0.0", content), content)
        clients = [await world.connect("console") for _ in range(6)]
        answers = await asyncio.gather(*(client.request(command) for client in clients))
        assert answers == [answers[0]] * 6
        assert len(await wait_for_events(world, ModelVersionRegistered, 1)) == 1


async def test_an_alias_can_be_moved_but_not_to_a_retired_version(operator: Operator, world: World) -> None:
    for version in ("1.0.0", "1.0.1"):
        await operator.push(version, weights())
    client = operator.client
    stable = SetAlias(model="smollm2", alias="stable", version="1.0.0")
    assert (await client.request(stable)).aliases == ("stable",)
    with pytest.raises(IllegalTransition, match="Move the alias"):
        await client.request(RetireVersion(model="smollm2", version="1.0.0"))
    await client.request(stable.model_copy(update={"version": "1.0.1"}))
    assert (await client.request(RetireVersion(model="smollm2", version="1.0.0", reason="old"))).state == "retired"
    with pytest.raises(IllegalTransition, match="retired"):
        await client.request(stable)
    with pytest.raises(NotFound, match=r"1\.0\.1"):
        await client.request(stable.model_copy(update={"version": "3.0.0"}))
    shown = [(v.version, v.state, v.aliases) for v in await listed(operator, "smollm2")]
    assert shown == [("1.0.0", "retired", ()), ("1.0.1", "registered", ("stable",))]
    assert await listed(operator, "other") == []

    async def all_events() -> list[str] | None:
        found = [message.subject for message in await world.stored("EVENTS")]
        return found if len(found) >= 5 else None

    kinds = [ModelVersionRegistered, ModelVersionRegistered, ModelAliasMoved, ModelAliasMoved, ModelVersionRetired]
    assert await eventually(all_events) == [kind.type for kind in kinds]


async def test_a_list_shows_the_variants_and_the_progress_of_a_version(
    operator: Operator, world: World, objects: Objects
) -> None:
    await operator.push("1.0.0", weights())
    optimizer = Optimizer(world, objects)
    variant = await optimizer.variant(weights("model.onnx"))
    client = await world.connect("optimizer")
    fields = variant.model_dump(include={"job", "model", "version", "profile", "at"})
    started = VariantStarted(**fields, recipes=("int8", "int4"))
    await client.publish(started, envelope(started))
    # The same event is stored twice, as when the second copy arrives after JetStream's dedupe window.
    for message_id in ("a", "b"):
        headers = envelope(variant).headers() | {"Nats-Msg-Id": message_id}
        await client.store(VariantOptimized.type, variant.model_dump_json().encode(), headers)

    async def chosen() -> VersionView | None:
        [view] = await listed(operator)
        return view if view.variants and view.stage == "optimizing" else None

    view = await eventually(chosen)
    assert [(v.recipe, v.gate, v.chosen, v.evaluation) for v in view.variants] == [
        ("int4", "passed", True, variant.evaluation)
    ]
    assert view.progress == "edge-small: int4 chosen, being packaged"


async def test_two_files_with_conflicting_paths_are_refused_before_the_upload(operator: Operator) -> None:
    files = (model_file("a", b"1"), model_file("a/b", b"2"))
    with pytest.raises(SlmopsError, match="cannot be in one folder"):
        await operator.client.request(BeginUpload(model="smollm2", version="1.0.0", files=files))
