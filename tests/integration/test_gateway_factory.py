"""A gateway with a factory release: it serves without a network, and verifies it like any other release."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import pytest
import pytest_asyncio
from integration.device import ANY_ANSWER, BLUEPRINT, HELLO, Device, lay_out, new_device, new_root, tiny_package

from slmops.console.image.factory import read
from slmops.contracts.blueprint import RuntimeSettings
from slmops.contracts.plan import Desired, Identity, Plan, Release, Side
from slmops.gateway.domain import Phase
from slmops.gateway.handlers import Agent
from slmops.gateway.install.acquire import Acquirer
from slmops.gateway.install.authorization import Authorization
from slmops.gateway.install.factory import Factory
from slmops.gateway.install.slots import Slots
from slmops.gateway.install.updater import Updater
from slmops.gateway.report.reporter import Reporter
from slmops.gateway.report.spool import Spool
from slmops.gateway.serving.inference import ChatMessage, Done, InferenceRequest
from slmops.gateway.serving.releases import Serving
from slmops.kit.clock import utc_now


async def test_a_device_without_a_network_serves_its_factory_release_also_after_a_restart(
    tmp_path: Path, genai_model: Path
) -> None:
    device = new_device(tmp_path, genai_model)
    async with device.on() as api:  # healthy only when it serves
        answer = (await api.post("/v1/chat/completions", json=HELLO)).raise_for_status().json()
        assert answer["model"] == "smollm2"
        assert answer["usage"]["completion_tokens"] == BLUEPRINT.runtime.max_tokens
        assert Factory.open(device.factory).release.manifest.digest == answer["system_fingerprint"]
    assert "there is no enrolment token yet" in device.log
    shutil.rmtree(device.factory / "package")  # what is installed is a copy
    async with device.on() as api:
        (await api.post("/v1/chat/completions", json=HELLO)).raise_for_status()


async def test_a_factory_package_that_was_changed_on_the_device_is_not_served(
    tmp_path: Path, genai_model: Path
) -> None:
    device = new_device(tmp_path, genai_model)
    weights = device.factory / "package" / "model.onnx.data"
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    async with device.on() as api:
        assert (await api.post("/v1/chat/completions", json=HELLO)).status_code == 503
    assert "model.onnx.data is sha256:" in device.log


async def test_a_device_with_a_damaged_factory_folder_starts_and_logs_the_error(
    tmp_path: Path, genai_model: Path
) -> None:
    device = new_device(tmp_path, genai_model)
    (device.factory / "release.json").write_text('{"revision": 0}')
    async with device.on() as api:
        assert (await api.post("/v1/chat/completions", json=HELLO)).status_code == 503
    assert "the factory release document is not valid" in device.log


# ---- factory releases and plans ---------------------------------------------------------------------------


class World:
    """The agent of a device in this process, without a network."""

    def __init__(self, folder: Path, factory: Path) -> None:
        self.folder, self.factory = folder, Factory.open(factory)
        self.start()

    def start(self) -> None:
        """Builds the agent from the files on disk, as a restart does."""
        self.slots, self.serving = Slots(self.folder / "data"), Serving()
        key = self.factory.package.parent / "trusted.pem"
        identity = Identity(gateway_id="gw-1", blueprint="edge-chat")
        trust = Authorization(identity, lambda: None, self.folder / "data" / "trust", key, utc_now)
        acquirer = Acquirer("gw-1", lambda: None, self.slots, self.folder / "data" / "blobs", key, trust, self.factory)
        self.updater = Updater(self.slots, acquirer, self.serving, self.folder / "data" / "releases")
        reporter = Reporter(identity, Spool(self.folder / "spool.db"), self.folder / "sequence", utc_now)
        release = self.factory.release
        self.agent = Agent(self.slots, self.updater, self.serving, reporter, timedelta(seconds=1), release)

    async def run_until_started(self) -> None:
        run = asyncio.create_task(self.agent.run())
        async with asyncio.timeout(30):
            await self.agent._started.wait()
        run.cancel()
        await asyncio.gather(run, return_exceptions=True)

    def plan(self, release: Release | None) -> None:
        side = Side.STABLE if release else Side.NONE
        plan = Plan(blueprint="edge-chat", generation=1, stable=release)
        self.agent.desired_changed(Desired(side=side, release=release, explain={}), plan)

    async def longest_answer(self) -> int:
        request = InferenceRequest(messages=(ChatMessage(role="user", content="go on"),), max_tokens=64, stream=False)
        done = [item async for _, item in self.serving.generate(request) if isinstance(item, Done)]
        return done[0].completion_tokens


@pytest_asyncio.fixture
async def world(tmp_path: Path, genai_model: Path) -> AsyncIterator[World]:
    world = World(tmp_path, new_device(tmp_path, genai_model).factory)
    yield world
    await world.serving.stop()


async def test_newer_settings_for_the_factory_package_are_kept_over_an_offline_restart(world: World) -> None:
    await world.run_until_started()
    assert (await world.longest_answer(), world.updater.phase) == (7, Phase.COMMITTED)
    later = world.factory.release.model_copy(update={"revision": 2, "runtime": RuntimeSettings(max_tokens=3)})
    world.plan(later)
    await world.agent._reconcile()
    assert await world.longest_answer() == 3
    await world.serving.stop()
    world.start()
    await world.run_until_started()
    assert await world.longest_answer() == 3


async def test_a_plan_without_a_release_leaves_the_device_serving(world: World) -> None:
    world.plan(None)
    await world.run_until_started()
    assert await world.longest_answer() == 7


async def test_an_installed_release_is_not_replaced_by_the_factory_release_of_another_image(
    world: World, tmp_path: Path, genai_model: Path
) -> None:
    await world.run_until_started()
    installed = world.factory.release.manifest.digest
    await world.serving.stop()
    package, keys = tiny_package(tmp_path / "newer", genai_model, ANY_ANSWER * 2)
    world.factory = Factory.open(
        lay_out(read(package, keys.public, new_root(tmp_path / "newer"), BLUEPRINT), tmp_path / "newer" / "factory")
    )
    world.start()
    await world.run_until_started()
    assert world.factory.release.manifest.digest != installed
    assert world.slots.active
    assert world.slots.active.digest == installed


async def test_a_factory_release_that_fails_its_probe_is_reported_and_not_retried(
    tmp_path: Path, genai_model: Path
) -> None:
    device = new_device(
        tmp_path, genai_model, b'{"prompt": "hi", "expect": ["no such answer, ever"], "max_tokens": 4}\n'
    )
    world = World(tmp_path, device.factory)
    for _ in range(2):
        await world.run_until_started()
        assert world.serving.release is None
        assert world.slots.failed == (world.factory.release.manifest.digest,)
        assert world.agent._status().phase is Phase.FAILED
        world.start()


def test_a_symlink_in_the_factory_folder_is_refused(tmp_path: Path, genai_model: Path) -> None:
    device: Device = new_device(tmp_path, genai_model)
    (device.factory / "package" / "more").symlink_to("/etc/passwd")
    with pytest.raises(Exception, match="not a regular file"):
        Slots(tmp_path / "data").install("sha256:" + "0" * 64, Factory.open(device.factory).files())
