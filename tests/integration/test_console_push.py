"""Pushes to a real registry and a real object store."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import numpy as np
import pytest
from integration.console_cli import Cli, wait_for_exit
from integration.kit_world import AT, World, world_on
from safetensors.numpy import save_file
from tiny_model import make_gguf, make_tiny_llama

from slmops.console.commands import uploading as engine
from slmops.console.commands.push import push
from slmops.console.commands.uploading import Source, StoreWait
from slmops.contracts.commands import ListVersions, VersionView
from slmops.contracts.descriptor import digest_of
from slmops.contracts.errors import (
    AlreadyExists,
    DigestMismatch,
    NotFound,
    OptimizationFailed,
    StoreUnreachable,
    Unreachable,
)
from slmops.contracts.events import VariantProgressed, VariantRejected, VariantStarted
from slmops.contracts.model import ModelFile, files_digest
from slmops.local.environment import service_spec
from slmops.local.layout import Layout
from slmops.local.ports import choose_ports

if TYPE_CHECKING:
    from servers import S3, NatsServer


GOLDEN = '{"prompt": "Capital of France?", "expect": ["Paris"]}\n'


@pytest.fixture
async def world(nats_server: NatsServer, s3: S3, layout: Layout) -> AsyncIterator[World]:
    async with world_on(nats_server.url, nats_server.creds) as world:
        spec = service_spec(layout, choose_ports(layout.ports_file, ["registry.http"]), "registry", tls=False)
        with spec.log_path.open("ab") as log:
            registry = await asyncio.create_subprocess_exec(*spec.argv, env=dict(spec.env), stdout=log, stderr=log)
        try:
            assert spec.ready
            while not await spec.ready():
                assert registry.returncode is None, spec.log_path.read_text()
                await asyncio.sleep(0.05)
            yield world
        finally:
            if registry.returncode is None:
                registry.terminate()
            await registry.wait()


async def listed(world: World, model: str) -> list[VersionView]:
    return list((await world.client.request(ListVersions(model=model))).versions)


async def test_a_push_registers_a_version_and_repeating_it_changes_nothing(world: World, tmp_path: Path) -> None:
    slmops, path, golden = Cli(world), make_gguf(tmp_path / "tiny.gguf"), tmp_path / "golden.jsonl"
    golden.write_text(GOLDEN)
    arguments = ("model", "push", str(path), "--name", "pushed", "--version", "1.0.0", "--golden", str(golden))
    first = await slmops(*arguments, "--json")
    assert (first.exit_code, first.err) == (0, "")
    view = VersionView.model_validate(first.json)
    file = ModelFile(path="tiny.gguf", digest=digest_of(path.read_bytes()), size_bytes=path.stat().st_size)
    assert (view.digest, view.format, view.architecture) == (files_digest([file]), "gguf", "llama")
    assert (await slmops(*arguments, "--json")).json == first.json
    assert await listed(world, "pushed") == [view]

    shown = await slmops("model", "show", "pushed:1.0.0")
    assert view.digest in shown.out
    assert (await slmops("model", "ls", "--json")).json["versions"] == [first.json]
    assert (await slmops("variant", "ls", "pushed", "--json")).json == {"variants": []}
    unknown = await slmops("model", "show", "pushed:2.0.0", "--json")
    assert (unknown.exit_code, unknown.problem["code"]) == (1, NotFound.code)

    make_gguf(path, rows=401)
    other = await slmops(*arguments, "--json")
    assert (other.exit_code, other.problem["code"]) == (1, AlreadyExists.code)
    assert await listed(world, "pushed") == [view]

    newer = await slmops("model", "push", str(path), "--name", "pushed", "--version", "1.1.0")
    assert newer.exit_code == 0
    size = f"{path.stat().st_size / 1000:.1f} kB"
    assert f"hash {size}\nupload {size}\nverify {size}" in newer.err
    assert "slmops model show pushed:1.1.0" in newer.err


async def test_an_interrupted_or_failed_push_registers_no_version(world: World, tmp_path: Path) -> None:
    path = make_gguf(tmp_path / "tiny.gguf", rows=410)

    def interrupt(step: str, done: int, of: int) -> None:
        if step == "upload":
            raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        await push(world.client, path, "early", "1.0.0", on_progress=interrupt)
    assert await listed(world, "early") == []

    def grow(step: str, done: int, of: int) -> None:
        if step == "hash":
            make_gguf(path, rows=500)

    with pytest.raises(DigestMismatch):
        await push(world.client, path, "early", "1.0.0", on_progress=grow)
    assert await listed(world, "early") == []

    assert (await push(world.client, path, "early", "1.0.0")).version == "1.0.0"
    assert len(await listed(world, "early")) == 1


async def test_an_adapter_is_pushed_without_uploading_its_base_again(world: World, tmp_path: Path) -> None:
    base, adapter = make_tiny_llama(tmp_path / "base"), tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "target_modules": ["o_proj"]}')
    layer = "base_model.model.model.layers.0.self_attn.o_proj"
    down, up = np.ones((2, 64), np.float32), np.ones((64, 2), np.float32)
    save_file({f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}, adapter / "adapter_model.safetensors")
    slmops = Cli(world)
    assert (await slmops("model", "push", str(base), "--name", "base", "--version", "1.0.0")).exit_code == 0

    alone = await slmops("model", "push", str(adapter), "--name", "adapted", "--version", "1.0.0", "--json")
    assert alone.problem["code"] == "invalid_model"
    assert "--base" in alone.problem["fix"]

    sent: list[int] = []
    view = await push(
        world.client,
        adapter,
        "adapted",
        "1.0.0",
        base=base,
        on_progress=lambda step, done, of: sent.append(of * (step == "upload")),
    )
    assert max(sent) == sum(path.stat().st_size for path in adapter.iterdir())
    assert (view.format, view.architecture) == ("adapter", "llama")
    arguments = (
        "model",
        "push",
        str(adapter),
        "--base",
        str(base),
        "--name",
        "adapted",
        "--version",
        "1.0.0",
        "--json",
    )
    assert (await slmops(*arguments)).json == json.loads(view.model_dump_json())


async def test_push_wait_prints_the_progress_and_fails_when_every_variant_is_rejected(
    world: World, tmp_path: Path
) -> None:
    path = make_gguf(tmp_path / "tiny.gguf")
    arguments = ("model", "push", str(path), "--name", "waited", "--version", "1.0.0", "--wait")
    process = await Cli(world).start(*arguments)
    while not await listed(world, "waited"):  # noqa: ASYNC110 - another process does it
        await asyncio.sleep(0.05)
    job = {"job": "j", "model": "waited", "version": "1.0.0", "profile": "edge-small", "at": AT}
    await world.publish(VariantStarted(**job, recipes=("int4",)))
    await world.publish(VariantProgressed(**job, step="evaluating int4", done=3, of=8))
    assert process.stderr
    stderr = b""
    while b"evaluating int4 3/8" not in stderr:
        stderr += await asyncio.wait_for(process.stderr.readline(), 10)
    await world.publish(VariantRejected(**job, recipe="int4", reason="KL 0.9 is over 0.5"))
    done = await wait_for_exit(process)
    assert done.exit_code == OptimizationFailed.exit_code
    assert "error [optimization_failed]: no variant passed its gate. int4: KL 0.9 is over 0.5" in done.err


# ---- an object store that hangs ---------------------------------------------------------------------------


async def test_a_push_waits_for_a_store_that_hangs_says_so_and_goes_on(world: World, s3: S3, tmp_path: Path) -> None:
    path = make_gguf(tmp_path / "tiny.gguf", rows=420)
    arguments = ("model", "push", str(path), "--name", "hung", "--version", "1.0.0")
    with s3.hanging() as go_on:
        process = await Cli(world).start(*arguments)
        assert process.stderr
        said = b""
        while b"waiting for the object store: no answer for " not in said:
            said += await asyncio.wait_for(process.stderr.readline(), 60)
        assert process.returncode is None
        go_on()
        done = await wait_for_exit(process)
    assert done.exit_code == 0, done.err
    assert len(await listed(world, "hung")) == 1


async def test_a_push_gives_up_after_its_patience_and_can_be_repeated(world: World, s3: S3, tmp_path: Path) -> None:
    path = make_gguf(tmp_path / "tiny.gguf", rows=430)
    arguments = ("model", "push", str(path), "--name", "gave-up", "--version", "1.0.0", "--json")
    with s3.hanging():
        done = await Cli(world, SLMOPS_UPLOAD_PATIENCE="PT1S")(*arguments)
    assert (done.exit_code, done.problem["code"]) == (StoreUnreachable.exit_code, "store_unreachable")
    assert "SLMOPS_UPLOAD_PATIENCE" in done.problem["fix"]
    assert await listed(world, "gave-up") == []
    assert (await Cli(world)(*arguments)).exit_code == 0


async def test_a_store_that_hangs_during_an_upload_is_waited_for(
    world: World, s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "_SAY_AFTER_S", 0.3)
    path, said = make_gguf(tmp_path / "tiny.gguf", rows=440), []
    waits: list[Callable[[], None]] = []
    with ExitStack() as stack:

        def hang(step: str, done: int, of: int) -> None:
            if step == "upload" and not waits:
                waits.append(stack.enter_context(s3.hanging()))

        def say(text: str) -> None:
            said.append(text)
            waits[0]()

        view = await push(world.client, path, "slow", "1.0.0", on_progress=hang, store=StoreWait(say=say))
    assert said
    assert view.version == "1.0.0"


def test_the_wait_is_said_each_time_it_doubles_and_starts_anew_with_every_progress() -> None:
    now, said = [0.0], []
    store = StoreWait(timedelta(seconds=60), said.append, lambda: now[0])
    for second in range(50):
        now[0] = float(second)
        store.check()
    assert [line.partition("for ")[2].partition(",")[0] for line in said] == [
        "the object store: no answer for 5 s",
        "the object store: no answer for 10 s",
        "the object store: no answer for 20 s",
        "the object store: no answer for 40 s",
    ]
    store.progressed()
    now[0] = 108.0
    store.check()
    now[0] = 109.0
    with pytest.raises(StoreUnreachable, match="has not answered for 60 s"):
        store.check("s3")


# ---- one file to an object store that is not well ---------------------------------------------------------


@asynccontextmanager
async def store(*statuses: int) -> AsyncIterator[tuple[str, list[bytes]]]:
    """Yields the URL of an HTTP server that answers PUTs with `statuses`, and the bodies that it receives."""
    bodies: list[bytes] = []
    answers = list(statuses)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        length = int(head.partition("content-length: ")[2].partition("\r\n")[0])
        try:
            bodies.append(await reader.readexactly(length))
        except asyncio.IncompleteReadError:
            writer.close()
            return
        writer.write(f"HTTP/1.1 {answers.pop(0)} x\r\ncontent-length: 0\r\nconnection: close\r\n\r\n".encode())
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}/upload?X-Amz-Signature=secret", bodies


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Source:
    monkeypatch.setattr(engine, "_RETRY_AFTER_S", 0.01)
    path = tmp_path / "weights"
    path.write_bytes(b"w" * 10_000_000)
    return Source(path, ModelFile(path="weights", digest=digest_of(path.read_bytes()), size_bytes=10_000_000))


async def test_an_upload_that_fails_once_is_retried_from_its_beginning(source: Source) -> None:
    sent: list[int] = []
    async with store(503, 200) as (url, bodies), httpx.AsyncClient() as http:
        await engine.put_file(http, url, source, sent.append, StoreWait())
    assert bodies == [source.path.read_bytes()] * 2
    assert sent == [4 << 20, 8 << 20, 10_000_000] * 2


async def test_an_upload_that_keeps_failing_is_unreachable_and_the_error_hides_the_signature(source: Source) -> None:
    async with store(503, 503, 503) as (url, bodies), httpx.AsyncClient() as http:
        with pytest.raises(Unreachable, match="3 attempts: the object store answered 503") as caught:
            await engine.put_file(http, url, source, lambda _: None, StoreWait())
    assert len(bodies) == 3
    assert "secret" not in str(caught.value)
    async with httpx.AsyncClient() as http:
        with pytest.raises(Unreachable, match="ConnectError"):
            await engine.put_file(http, url, source, lambda _: None, StoreWait())


@pytest.mark.parametrize("change_bytes", [-1, 1])
async def test_a_file_whose_size_changed_after_hashing_is_not_sent(source: Source, change_bytes: int) -> None:
    hashed = source.file.model_copy(update={"size_bytes": source.file.size_bytes + change_bytes})
    async with store() as (url, bodies), httpx.AsyncClient() as http:
        with pytest.raises(DigestMismatch, match="changed during the push"):
            await engine.put_file(http, url, Source(source.path, hashed), lambda _: None, StoreWait())
    assert bodies == []


async def test_a_refused_upload_is_not_retried(source: Source) -> None:
    async with store(403) as (url, bodies), httpx.AsyncClient() as http:
        with pytest.raises(Unreachable, match="refused weights with status 403"):
            await engine.put_file(http, url, source, lambda _: None, StoreWait())
    assert len(bodies) == 1


async def test_model_ls_prints_json(world: World) -> None:
    done = await Cli(world)("model", "ls", "--json")
    assert set(json.loads(done.out)) == {"cursor", "versions"}
