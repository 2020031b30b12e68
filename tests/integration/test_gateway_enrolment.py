"""A gateway whose credentials are refused by the bus enrols again with the same key and keeps serving."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import forked
import httpx
import pytest
from forked import Forked
from rollout_world import NAME, System, eventually, open_system

from slmops.contracts.commands import GatewayView, ListGateways
from slmops.contracts.events import GatewayReported
from slmops.gateway.identity import own_seed
from slmops.kit.bus.client import BusClient
from slmops.kit.bus.nats_auth import gateway_jwt, public_key
from slmops.local.ports import choose_ports


@pytest.fixture
async def system(tmp_path: Path) -> AsyncIterator[System]:
    async with AsyncExitStack() as stack:
        system = await open_system(tmp_path, stack)
        await system.start("rollout")
        yield system


def gateway(system: System, home: Path) -> Forked:
    ports = choose_ports(home.parent / "gateway-ports.json", ["api", "http"])
    layout = system.layout
    settings = {
        "GATEWAY_ID": "gw-1",
        "BLUEPRINT": NAME,
        "LABELS": json.dumps({"ring": "canary"}),
        "NATS_URL": system.url,
        "ENROL_CREDS": str(layout.creds("enrol")),
        "ENROLMENT_TOKEN": str(layout.enrolment_token),
        "TRUSTED_KEY": str(layout.trusted_key),
        "TRUSTED_ROOT": str(layout.trusted_root),
        "DATA_DIR": str(home),
        "API_PORT": str(ports["api"]),
        "HTTP_PORT": str(ports["http"]),
    }
    env = os.environ | {f"SLMOPS_{key}": value for key, value in settings.items()}
    with (home.parent / "gateway.log").open("ab") as log:
        return forked.start("slmops.gateway.app", env=env, stdout=log, stderr=log)


async def wait_until_enrolled(operator: BusClient) -> GatewayView:
    """Waits until the rollout service knows gw-1, and returns its view."""

    async def look() -> list[GatewayView]:
        return list((await operator.request(ListGateways(gateway_id="gw-1"))).gateways)

    return (await eventually(look, bool, "gw-1"))[0]


async def reported(operator: BusClient) -> GatewayReported | None:
    return await operator.latest(GatewayReported, "gw-1")


async def test_a_gateway_with_credentials_of_an_older_release_enrols_again(system: System, tmp_path: Path) -> None:
    home = tmp_path / "gw-1"
    seed = own_seed(home)
    # As in releases without a separate account for gateways: signed by the same key for the services' account.
    authority = system.layout.authority()
    old = gateway_jwt(f"{authority.gateways}\n{public_key(authority.account)}", public_key(seed), "gw-1", NAME)
    (home / "user.jwt").write_text(old)
    operator = await system.connect("console")
    process = gateway(system, home)
    try:
        assert (await wait_until_enrolled(operator)).labels == {"ring": "canary"}
        await eventually(lambda: reported(operator), bool, "its first report")
        assert (home / "user.jwt").read_text() != old
        assert own_seed(home) == seed
        log = (tmp_path / "gateway.log").read_text()
        assert "asking for new ones" in log
    finally:
        process.terminate()
        process.wait(timeout=20)
        await operator.close()


async def test_a_gateway_whose_new_enrolment_is_refused_keeps_running(system: System, tmp_path: Path) -> None:
    home = tmp_path / "gw-1"
    seed = own_seed(home)
    authority = system.layout.authority()
    old = gateway_jwt(f"{authority.gateways}\n{public_key(authority.account)}", public_key(seed), "gw-1", NAME)
    (home / "user.jwt").write_text(old)
    system.layout.enrolment_token.write_text("another token than the rollout service has")
    process = gateway(system, home)
    try:
        log = tmp_path / "gateway.log"

        async def refused() -> bool:
            return log.exists() and "the enrolment token of gw-1 is wrong" in log.read_text()

        await eventually(refused, bool, "the refusal")
        assert process.poll() is None
        port = json.loads((tmp_path / "gateway-ports.json").read_text())["http"]
        async with httpx.AsyncClient() as http:
            assert (await http.get(f"http://127.0.0.1:{port}/health")).json()["healthy"]
        assert (home / "user.jwt").read_text() == old
    finally:
        process.terminate()
        process.wait(timeout=20)
