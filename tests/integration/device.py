"""A device from the factory: a folder with a package of the tiny model, and a gateway without any network."""

from __future__ import annotations

import asyncio
import json
import os
import string
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import forked
import httpx
from forked import Forked
from trust_world import TrustWorld
from unit.packager.packager_examples import Keys, new_keys, write_package

from slmops.console.image.factory import Factory, read
from slmops.contracts.blueprint import Blueprint, RuntimeSettings, SoakPolicy
from slmops.local.ports import choose_ports

ANY_ANSWER = json.dumps({"prompt": "hello", "expect": list(string.ascii_letters), "max_tokens": 24}).encode() + b"\n"
BLUEPRINT = Blueprint(
    name="edge-chat",
    model="smollm2",
    soak=SoakPolicy(seconds=0.1, golden_every_s=0.05),
    runtime=RuntimeSettings(max_tokens=7),
)
HELLO = {"messages": [{"role": "user", "content": "hello"}], "temperature": 0}


def tiny_package(folder: Path, model: Path, questions: bytes = ANY_ANSWER) -> tuple[Path, Keys]:
    """Returns the folder of a signed package of `model`, and the keys that signed it."""
    keys = new_keys(folder / "keys")
    content = {path.relative_to(model).as_posix(): path.read_bytes() for path in model.rglob("*") if path.is_file()}
    write_package(folder / "package", keys, content, questions)
    return folder / "package", keys


def new_root(folder: Path) -> Path:
    return TrustWorld(folder / "trust").folder.first_root


def lay_out(factory: Factory, folder: Path) -> Path:
    """Writes the files that an image has at /opt/factory."""
    for path, content in factory.files().items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content if isinstance(content, bytes) else content.read_bytes())
    return folder


def new_device(folder: Path, model: Path, questions: bytes = ANY_ANSWER) -> Device:
    package, keys = tiny_package(folder, model, questions)
    return Device(folder, lay_out(read(package, keys.public, new_root(folder), BLUEPRINT), folder / "factory"))


@dataclass
class Device:
    """A gateway as its own process, without a NATS server and without an enrolment token."""

    root: Path
    factory: Path
    settings: dict[str, str] = field(default_factory=dict)

    @asynccontextmanager
    async def on(self) -> AsyncIterator[httpx.AsyncClient]:
        """Runs the device during the block. Yields a client of its API; health is answered on another port."""
        self.ports = choose_ports(self.root / "ports.json", ["api", "health"])
        environment = os.environ | {
            "SLMOPS_GATEWAY_ID": "gw-1",
            "SLMOPS_BLUEPRINT": "edge-chat",
            "SLMOPS_NATS_URL": "nats://127.0.0.1:1",
            "SLMOPS_ENROL_CREDS": str(self.root / "no.creds"),
            "SLMOPS_ENROLMENT_TOKEN": str(self.root / "no-token"),
            "SLMOPS_TRUSTED_KEY": str(self.factory / "trusted.pem"),
            "SLMOPS_TRUSTED_ROOT": str(self.factory / "trusted-root.json"),
            "SLMOPS_DATA_DIR": str(self.root / "data"),
            "SLMOPS_API_PORT": str(self.ports["api"]),
            "SLMOPS_HTTP_PORT": str(self.ports["health"]),
            **({"SLMOPS_FACTORY": str(self.factory)} if (self.factory / "release.json").exists() else {}),
            **self.settings,
        }
        process = self._start(environment)
        try:
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{self.ports['api']}", timeout=30) as api:
                await self._wait_until_healthy(process)
                yield api
        finally:
            process.terminate()
            process.wait(timeout=20)

    def _start(self, environment: dict[str, str]) -> Forked:
        with (self.root / "log").open("ab") as log:
            return forked.start("slmops.gateway.app", env=environment, stderr=log)

    async def _wait_until_healthy(self, process: Forked) -> None:
        async with asyncio.timeout(40), httpx.AsyncClient() as http:
            while True:
                assert process.poll() is None, self.log
                try:
                    if (await http.get(f"http://127.0.0.1:{self.ports['health']}/health")).status_code == 200:
                        return
                except httpx.TransportError:
                    pass
                await asyncio.sleep(0.05)

    @property
    def log(self) -> str:
        return (self.root / "log").read_text()
