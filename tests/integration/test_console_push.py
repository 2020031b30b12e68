"""A push against the real registry and a real object store."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import numpy as np
import pytest
from integration.console_cli import Cli, ended
from integration.kit_world import AT, World, world_on
from safetensors.numpy import save_file
from tiny_model import make_gguf, make_tiny_llama

from slmops.console.commands import upload as engine
from slmops.console.commands.push import push
from slmops.console.commands.upload import Source
from slmops.contracts.commands import ListVersions, VersionView
from slmops.contracts.descriptor import digest_of
from slmops.contracts.errors import AlreadyExists, DigestMismatch, NotFound, OptimizationFailed, Unreachable
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
        spec = service_spec(layout, choose_ports(layout.ports_file, ["registry.http"]), "registry")
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


async def test_a_push_registers_a_version_and_a_repetition_changes_nothing(world: World, tmp_path: Path) -> None:
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


async def test_whatever_ends_a_push_early_leaves_nothing_that_a_list_shows(world: World, tmp_path: Path) -> None:
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


async def test_a_base_that_the_store_has_is_not_sent_again_with_its_adapter(world: World, tmp_path: Path) -> None:
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


async def test_wait_tells_the_progress_and_fails_when_every_variant_is_refused(world: World, tmp_path: Path) -> None:
    path = make_gguf(tmp_path / "tiny.gguf")
    arguments = ("model", "push", str(path), "--name", "waited", "--version", "1.0.0", "--wait")
    process = await Cli(world).start(*arguments)
    while not await listed(world, "waited"):  # noqa: ASYNC110 - another process does it
        await asyncio.sleep(0.05)
    job = {"job": "j", "model": "waited", "version": "1.0.0", "profile": "edge-small", "at": AT}
    await world.publish(VariantStarted(**job, recipes=("int4",)))
    await world.publish(VariantProgressed(**job, step="evaluating int4", done=3, of=8))
    assert process.stderr
    told = b""
    while b"evaluating int4 3/8" not in told:
        told += await asyncio.wait_for(process.stderr.readline(), 10)
    await world.publish(VariantRejected(**job, recipe="int4", reason="KL 0.9 is over 0.5"))
    done = await ended(process)
    assert done.exit_code == OptimizationFailed.exit_code
    assert "error [optimization_failed]: no variant passed its gate. int4: KL 0.9 is over 0.5" in done.err


# ---- one file to an object store that is not well ---------------------------------------------------------


@asynccontextmanager
async def store(*statuses: int) -> AsyncIterator[tuple[str, list[bytes]]]:
    """An HTTP server that answers PUTs with these, and what it got."""
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


async def test_an_upload_that_fails_for_a_moment_is_tried_again_from_its_beginning(source: Source) -> None:
    sent: list[int] = []
    async with store(503, 200) as (url, bodies), httpx.AsyncClient() as http:
        await engine._put(http, url, source, sent.append)
    assert bodies == [source.path.read_bytes()] * 2
    assert sent == [4 << 20, 8 << 20, 10_000_000] * 2


async def test_an_upload_that_keeps_failing_is_unreachable_without_the_signature(source: Source) -> None:
    async with store(503, 503, 503) as (url, bodies), httpx.AsyncClient() as http:
        with pytest.raises(Unreachable, match="3 attempts: the object store answered 503") as caught:
            await engine._put(http, url, source, lambda _: None)
    assert len(bodies) == 3
    assert "secret" not in str(caught.value)
    async with httpx.AsyncClient() as http:
        with pytest.raises(Unreachable, match="ConnectError"):
            await engine._put(http, url, source, lambda _: None)


@pytest.mark.parametrize("change_bytes", [-1, 1])
async def test_a_file_that_has_another_size_by_now_is_not_sent(source: Source, change_bytes: int) -> None:
    hashed = source.file.model_copy(update={"size_bytes": source.file.size_bytes + change_bytes})
    async with store() as (url, bodies), httpx.AsyncClient() as http:
        with pytest.raises(DigestMismatch, match="changed during the push"):
            await engine._put(http, url, Source(source.path, hashed), lambda _: None)
    assert bodies == []


async def test_a_refused_upload_is_not_tried_again(source: Source) -> None:
    async with store(403) as (url, bodies), httpx.AsyncClient() as http:
        with pytest.raises(Unreachable, match="refused weights with status 403"):
            await engine._put(http, url, source, lambda _: None)
    assert len(bodies) == 1


async def test_the_list_of_versions_is_json_that_a_script_can_read(world: World) -> None:
    done = await Cli(world)("model", "ls", "--json")
    assert set(json.loads(done.out)) == {"versions"}
