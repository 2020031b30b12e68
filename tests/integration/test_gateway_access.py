"""Access to the gateway's API over a real socket, without a model: foreign hosts and web pages are refused."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from slmops.contracts.errors import InvalidMessage
from slmops.gateway.api.access import Access
from slmops.gateway.api.listen import ApiServer, listen
from slmops.gateway.api.server import create_api
from slmops.gateway.serving.releases import Serving
from slmops.gateway.settings import Settings

CHAT, MODELS = "/v1/chat/completions", "/v1/models"
PATHS = (MODELS, "/healthz", "/metrics", "/nothing")
PAGE = "https://app.example"


@asynccontextmanager
async def api(access: Access | None = None) -> AsyncIterator[httpx.AsyncClient]:
    server, socket = ApiServer(create_api(Serving(), access=access)), listen()
    host, port = socket.getsockname()
    running = asyncio.create_task(server.serve([socket]))
    try:
        async with httpx.AsyncClient(base_url=f"http://{host}:{port}", timeout=30) as client:
            yield client
    finally:
        server.should_exit = True
        await running


def code(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


def settings(tmp_path: Path, **fields: object) -> Settings:
    needed = ("enrol_creds", "enrolment_token", "trusted_key", "trusted_root")
    paths = {name: tmp_path / name for name in needed}
    return Settings.model_validate({"gateway_id": "gw-1", "blueprint": "edge", **paths, **fields})


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8080", "127.0.0.1.evil.example", "localhost.evil", "", "2130706433"]
)
async def test_a_foreign_host_name_is_refused_on_every_path(host: str) -> None:
    async with api() as client:
        for path in PATHS:
            assert code(await client.get(path, headers={"Host": host})) == (403, "host_refused")
        assert code(await client.post(CHAT, headers={"Host": host}, json={})) == (403, "host_refused")


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "LOCALHOST:8080",
        "localhost.",
        "model.localhost",
        "127.0.0.1:1",
        "192.168.1.7",
        "[::1]:8080",
        "[fe80::1]",
    ],
)
async def test_local_names_and_ip_addresses_reach_the_api(host: str) -> None:
    async with api() as client:
        assert (await client.get(MODELS, headers={"Host": host})).status_code == 200


async def test_the_gateways_own_names_and_configured_ones_reach_the_api(tmp_path: Path) -> None:
    async with api(Access.of(settings(tmp_path, api_hosts=("Models.Example",)))) as client:
        for host in ("gw-1:8080", "models.example"):
            assert (await client.get(MODELS, headers={"Host": host})).status_code == 200
        assert (await client.get(MODELS, headers={"Host": "other.example"})).status_code == 403
    async with api(Access.of(settings(tmp_path, api_hosts=("*",)))) as client:
        assert (await client.get(MODELS, headers={"Host": "other.example"})).status_code == 200


@pytest.mark.parametrize("origin", ["https://evil.example", "http://localhost:3000", "null", "http://127.0.0.1"])
async def test_a_web_page_is_refused_unless_its_origin_is_allowed(origin: str) -> None:
    async with api() as client:
        for path in PATHS:
            assert code(await client.get(path, headers={"Origin": origin})) == (403, "origin_refused")
        refused = await client.post(CHAT, headers={"Origin": origin, "Content-Type": "text/plain"}, content="{}")
        assert code(refused) == (403, "origin_refused")
        asked = {"Origin": origin, "Access-Control-Request-Method": "POST"}
        preflight = await client.options(CHAT, headers=asked)
        assert preflight.status_code == 403
        assert not [name for name in preflight.headers if name.startswith("access-control-allow")]


async def test_an_allowed_origin_gets_the_cors_headers_that_browsers_need(tmp_path: Path) -> None:
    async with api(Access.of(settings(tmp_path, api_origins=(f"{PAGE}/",)))) as client:
        asked = {
            "Origin": PAGE,
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization,content-type,x-stainless-lang",
            "Access-Control-Request-Private-Network": "true",
        }
        preflight = await client.options(CHAT, headers=asked)
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == PAGE
        assert "x-stainless-lang" in preflight.headers["access-control-allow-headers"]
        assert preflight.headers["access-control-allow-private-network"] == "true"
        answer = await client.get(MODELS, headers={"Origin": PAGE})
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, PAGE)
        assert answer.headers["access-control-expose-headers"] == "x-request-id"
        assert code(await client.get(MODELS, headers={"Origin": f"{PAGE}.evil"})) == (403, "origin_refused")


async def test_with_api_keys_only_their_holders_may_use_the_model(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("first-key\n\n second-key \n")
    access = Access.of(settings(tmp_path, api_keys=tmp_path / "keys", api_origins=(PAGE,)))
    async with api(access) as client:
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "first-key"},
            {"Authorization": "Bearer"},
        ):
            for path in (MODELS, f"{MODELS}/tiny", "/v1/nothing"):
                assert code(await client.get(path, headers=headers)) == (401, "invalid_api_key")
            assert code(await client.post(CHAT, headers=headers, json={})) == (401, "invalid_api_key")
        for key in ("first-key", "second-key"):
            assert (await client.get(MODELS, headers={"Authorization": f"Bearer {key}"})).status_code == 200
        assert (await client.get("/healthz")).status_code == 200
        assert (await client.get("/metrics")).status_code == 200
        refused = await client.get(MODELS, headers={"Origin": PAGE})
        assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, PAGE)
        asked = {"Origin": PAGE, "Access-Control-Request-Method": "POST"}
        assert (await client.options(CHAT, headers=asked)).status_code == 200, "a preflight cannot send a key"


def test_a_missing_or_empty_key_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n")
    for name in ("missing", "empty"):
        with pytest.raises(InvalidMessage, match="keys"):
            Access.of(settings(tmp_path, api_keys=tmp_path / name))
