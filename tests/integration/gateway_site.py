"""A gateway's connection and folder, a real packager, and the keyholders of the trust root."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest
from integration.artifact_world import (
    Optimizer,
    Rollout,
    eventually,
    open_store,
    published,
    release,
    running,
    settings_of,
)
from integration.kit_world import world_on
from trust_world import everything_below
from unit.packager.packager_examples import Keys, new_keys

from slmops.contracts import subjects
from slmops.contracts.errors import NotReady, TrustRefused
from slmops.contracts.plan import Identity, Release
from slmops.gateway.install.acquire import Acquirer
from slmops.gateway.install.authorization import Authorization
from slmops.gateway.install.slots import Slot, Slots
from slmops.kit.clock import utc_now
from slmops.kit.trust import ceremony
from slmops.kit.trust.folder import Folder
from slmops.kit.trust.keys import read_keys
from slmops.packager.app import build
from slmops.packager.settings import Settings

if TYPE_CHECKING:
    from servers import S3, NatsServer


IDENTITY = Identity(gateway_id="gw-1", blueprint="edge-chat")


class Site:
    """A gateway's connection and folder, a packager that a test can stop, and the keyholders' folder."""

    def __init__(
        self, home: Path, rollout: Rollout, optimizer: Optimizer, settings: dict[str, Any], keys: Keys
    ) -> None:
        self.home, self.rollout, self.optimizer, self.keys = home, rollout, optimizer, keys
        self.folder = Folder(home / "tuf")
        ceremony.ceremony(self.folder, utc_now()).apply()
        own = {"signing_key": keys.private, "trust_keys": self.folder.online, "trust_metadata": self.folder.metadata}
        self.settings = settings | own | {"trust_renew_every": "PT0.2S"}
        self.packager, self.slots = AsyncExitStack(), Slots(home)

    async def start(self) -> None:
        await self.packager.enter_async_context(running(build(Settings.model_validate(self.settings))))
        self.bus = await self.rollout.enrol("gw-1")
        self.trust = Authorization(IDENTITY, lambda: self.bus, self.home / "trust", self.folder.first_root, utc_now)
        self.acquirer = Acquirer(
            "gw-1", lambda: self.bus, self.slots, self.home / "blobs", self.keys.public, self.trust
        )

    async def publish(self, version: str, model: str = "smollm2", content: dict[str, bytes] | None = None) -> Release:
        before = len(await published(self.rollout.world, 0))
        content = content or {"model.onnx": uuid4().bytes, "genai_config.json": random.Random().randbytes(500)}
        await self.optimizer.announce(await self.optimizer.variant(content, version=version, model=model))
        return release((await published(self.rollout.world, before + 1))[-1])

    async def install(self, wanted: Release) -> Slot:
        """Installs `wanted` by a plan. Retries until the packager has received the enrolment of the gateway."""
        await self.rollout.plan(wanted)
        await self.trust.plan(await self.written())

        async def acquired() -> Slot | None:
            try:
                return await self.acquirer.acquire(wanted)
            except NotReady:
                return None

        return await eventually(acquired)

    async def written(self) -> bytes:
        found = await self.bus.read_desired(subjects.blueprint_key(IDENTITY.blueprint))
        assert found is not None
        return found[0]

    def holders(self) -> dict[str, Any]:
        return read_keys(self.folder.offline.glob("*.pem"))

    async def refused(self, wanted: Release) -> str:
        """Asserts that `wanted` is refused, with nothing installed, trusted or downloaded. Returns the named attack."""
        kept = self.slots.state.releases, everything_below(self.home / "trust" / "current")
        blobs = sorted(path.name for path in (self.home / "blobs").glob("*"))
        with pytest.raises(TrustRefused) as error:
            await self.acquirer.acquire(wanted)
        assert (self.slots.state.releases, everything_below(self.home / "trust" / "current")) == kept
        assert sorted(path.name for path in (self.home / "blobs").glob("*")) == blobs
        return error.value.attack


@asynccontextmanager
async def site_on(nats_server: NatsServer, s3: S3, home: Path, **settings: Any) -> AsyncIterator[Site]:
    """Yields a site; `settings` are additional settings of the packager."""
    async with world_on(nats_server.url, nats_server.creds) as world:
        optimizer = Optimizer(world, await open_store(s3))
        rollout = Rollout(world, nats_server, home / "tuf/rollout/plan.pem")
        packager = settings_of(world, s3, "packager", home) | settings
        site = Site(home, rollout, optimizer, packager, new_keys(home / "keys"))
        async with site.packager:
            await site.start()
            yield site
