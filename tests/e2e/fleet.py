"""An operator's actions on the whole system with a tiny random model."""

from __future__ import annotations

import asyncio
import json
import string
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import httpx
import nats

from slmops.console.commands.push import push
from slmops.contracts.blueprint import Blueprint, SoakPolicy, TelemetryPolicy
from slmops.contracts.commands import (
    ApplyBlueprint,
    GatewayView,
    ListGateways,
    ListRollouts,
    ListVersions,
    RolloutView,
    StartRollout,
    VersionView,
)
from slmops.contracts.errors import NotFound, TemporaryError
from slmops.contracts.permissions import Permissions
from slmops.kit.bus.client import BusClient
from slmops.local.system import System

T = TypeVar("T")
MODEL = "tiny"
BLUEPRINT = "edge-chat"
WITHIN_S = 90


def write_golden(path: Path, prompt: str = "hello") -> Path:
    """Writes a golden prompt that accepts any answer with a letter in it, because a random model answers at random."""
    path.write_text(json.dumps({"prompt": prompt, "expect": list(string.ascii_letters), "max_tokens": 24}) + "\n")
    return path


async def connect_to_all_subjects(system: System) -> nats.NATS:
    """Returns a connection that may subscribe to every subject; only the holder of the account's keys can make one."""
    path = system.layout.root / "everything.creds"
    path.write_text(system.layout.authority().user_creds("listener", Permissions((">",), (">",))))
    return await nats.connect(
        system.nats_url,
        user_credentials=str(path),
        reconnect_time_wait=0.1,
        tls=system.verify,
        tls_handshake_first=True,
    )


class Operator:
    """A user with the console's credentials."""

    def __init__(self, system: System, client: BusClient) -> None:
        self.system = system
        self.client = client

    @classmethod
    async def connect(cls, system: System) -> Operator:
        return cls(system, await BusClient.connect(system.bus_settings("console"), name="operator"))

    async def push(self, source: Path, version: str, golden: Path | None) -> VersionView:
        return await self.retry(lambda: push(self.client, source, name=MODEL, version=version, golden=golden))

    async def wait_until_packaged(self, version: str) -> VersionView:
        async def look() -> VersionView | None:
            found = await self.client.request(ListVersions(model=MODEL, version=version))
            view = found.versions[0] if found.versions else None
            return view if view and view.stage in ("packaged", "refused") else None

        view = await self.until(look)
        assert view.stage == "packaged", view
        return view

    async def apply_blueprint(self) -> None:
        spec = Blueprint(
            name=BLUEPRINT,
            model=MODEL,
            soak=SoakPolicy(seconds=0.5, golden_every_s=0.1),
            telemetry=TelemetryPolicy(every_s=0.5),
        )
        await self.retry(lambda: self.client.request(ApplyBlueprint(spec=spec)))

    async def start_rollout(self, version: str) -> RolloutView:
        return await self.retry(lambda: self.client.request(StartRollout(blueprint=BLUEPRINT, version=version)))

    async def wait_until_ended(self, rollout: str) -> RolloutView:
        async def look() -> RolloutView | None:
            rollouts = (await self.client.request(ListRollouts(blueprint=BLUEPRINT))).rollouts
            view = next(r for r in rollouts if r.rollout == rollout)
            return view if view.ended_at else None

        return await self.until(look)

    async def wait_until_fleet_runs(self, version: str) -> list[GatewayView]:
        async def look() -> list[GatewayView] | None:
            views = list((await self.client.request(ListGateways())).gateways)
            return views if views and all(view.running_version == version for view in views) else None

        return await self.until(look)

    async def ask(self, gateway: str, text: str) -> str:
        body = {"messages": [{"role": "user", "content": text}], "max_tokens": 8, "temperature": 0}
        async with httpx.AsyncClient(timeout=30) as http:
            answer = await http.post(f"{self.system.api_url(gateway)}/v1/chat/completions", json=body)
        answer.raise_for_status()
        return str(answer.json()["choices"][0]["message"]["content"])

    async def until(self, look: Callable[[], Awaitable[T | None]], within_s: float = WITHIN_S) -> T:
        """Calls `look` until it returns a value. Temporary errors count as no value: a service may be restarting."""
        async with asyncio.timeout(within_s):
            while True:
                try:
                    if (found := await look()) is not None:
                        return found
                except TemporaryError:
                    pass
                await asyncio.sleep(0.1)

    async def retry(self, work: Callable[[], Awaitable[T]], within_s: float = WITHIN_S) -> T:
        """Repeats a command until its service runs and has read the events that were published before."""

        async def attempt() -> T | None:
            try:
                return await work()
            except NotFound:
                return None

        return await self.until(attempt, within_s)
