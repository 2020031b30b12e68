"""`slmops chat` with a real gateway API on a real, tiny model."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from integration.console_cli import Cli
from integration.kit_world import World, world_on
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from slmops.console.commands.chat import ask
from slmops.contracts.errors import InvalidMessage, NotReady, PermanentError
from slmops.gateway.api.access import Access
from slmops.gateway.api.listen import ApiServer, listen
from slmops.gateway.api.server import create_api
from slmops.gateway.serving.releases import Serving, ServingLimits
from slmops.gateway.serving.runner import ProcessRunner

if TYPE_CHECKING:
    from servers import NatsServer


QUESTION = "Capital of France?"


@pytest.fixture
async def world(nats_server: NatsServer) -> AsyncIterator[World]:
    async with world_on(nats_server.url, nats_server.creds) as world:
        yield world


async def serve(serving: Serving, access: Access | None = None) -> AsyncIterator[str]:
    async for address in serve_app(create_api(serving, access=access)):
        yield address


async def serve_app(app: Starlette) -> AsyncIterator[str]:
    server, socket = ApiServer(app), listen()
    host, port = socket.getsockname()
    serving_api = asyncio.create_task(server.serve([socket]))
    yield f"http://{host}:{port}"
    server.should_exit = True
    await serving_api


@pytest.fixture
async def url(make_runner: Callable[..., ProcessRunner]) -> AsyncIterator[str]:
    serving, runner = Serving(ServingLimits(drain=timedelta(seconds=5))), make_runner(context_tokens=512)
    await runner.start()
    await serving.swap(runner)
    async for address in serve(serving):
        yield address
    await serving.stop()


@pytest.fixture
async def protected_url() -> AsyncIterator[str]:
    """Yields the URL of a gateway that requires a key and has no release yet."""
    async for address in serve(Serving(ServingLimits()), Access(keys=(b"the-key",))):
        yield address


@pytest.fixture
async def empty_url() -> AsyncIterator[str]:
    """Yields the URL of a gateway that has no release yet."""
    async for address in serve(Serving(ServingLimits())):
        yield address


async def test_a_line_separator_in_an_answer_does_not_end_an_event() -> None:
    """Neither our gateway nor other servers escape U+2028."""
    text = "one\u2028two\x85three"
    chunk = json.dumps({"choices": [{"delta": {"content": text}}]}, ensure_ascii=False)
    events = f"data: {chunk}\r\n\r\ndata: [DONE]\n\n".encode()
    pieces = [events[at : at + 7] for at in range(0, len(events), 7)]  # splits characters, too

    async def answer(request: Request) -> Response:
        return StreamingResponse(iter(pieces), media_type="text/event-stream")

    app = Starlette(routes=[Route("/v1/chat/completions", answer, methods=["POST"])])
    async for address in serve_app(app):
        assert (await ask(address, "?")).text == text


async def test_an_answer_is_printed_whole_or_streamed_and_with_its_figures(
    world: World, url: str, tmp_path: Path
) -> None:
    client = {"nats_url": world.url, "gateways": {"gw-1": "http://127.0.0.1:1", "gw-2": url}}
    (tmp_path / "client.json").write_text(json.dumps(client))
    slmops = Cli(world, SLMOPS_DATA=str(tmp_path))
    answer = (await slmops("chat", "gw-2", QUESTION, "--max-tokens", "12", "--json")).json
    assert (answer["model"], answer["completion_tokens"]) == ("tiny", 12)
    assert answer["release"].startswith("sha256:")
    assert answer["tokens_per_s"] > 0
    assert answer["ttft_s"] > 0
    streamed = await slmops("chat", "--url", url, QUESTION, "--max-tokens", "12", "--stream")
    whole = await slmops("chat", "gw-2", QUESTION, "--max-tokens", "12")
    assert streamed.out == whole.out
    assert "12 tokens, " in whole.err
    unknown = await slmops("chat", "gw-3", QUESTION, "--json")
    assert (unknown.exit_code, unknown.problem["fix"]) == (1, "Use one of: gw-1, gw-2; or use --url.")
    gone = await slmops("chat", QUESTION, "--json")  # the first gateway, whose port is closed
    assert (gone.exit_code, gone.problem["code"]) == (75, "unreachable")


async def test_a_streamed_answer_calls_on_text_for_each_piece(url: str) -> None:
    pieces: list[str] = []
    answer = await ask(url, QUESTION, max_tokens=12, on_text=pieces.append)
    assert len(pieces) > 1
    assert "".join(pieces) == answer.text


async def test_a_gateway_without_a_model_is_not_ready(empty_url: str) -> None:
    with pytest.raises(NotReady):
        await ask(empty_url, QUESTION)


async def test_the_api_key_is_read_from_a_key_file(world: World, protected_url: str, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("the-key\nanother\n")
    slmops = Cli(world)
    asked = ("chat", "--url", protected_url, QUESTION, "--json")
    assert (await slmops(*asked)).problem["code"] == "permanent"
    assert (await slmops(*asked, "--key-file", str(tmp_path / "key"))).problem["code"] == "not_ready"
    assert (await slmops(*asked, "--key-file", str(tmp_path / "none"))).problem["code"] == "invalid_message"


async def test_a_prompt_longer_than_the_context_raises_the_error_of_the_gateway(url: str) -> None:
    with pytest.raises(PermanentError, match="maximum context length"):
        await ask(url, "word " * 2000)


async def test_an_answer_that_is_not_a_chat_completion_is_an_error(url: str) -> None:
    with pytest.raises(PermanentError):
        await ask(f"{url}/metrics", QUESTION)
    server = await asyncio.start_server(_serve_html, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(InvalidMessage, match="not a chat completion"):
            await ask(f"http://127.0.0.1:{port}", QUESTION)


async def _serve_html(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 13\r\nconnection: close\r\n\r\ndata: <html>\n")
    await writer.drain()
    writer.close()
