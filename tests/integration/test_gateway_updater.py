"""A gateway's updater on real files, a real model and a real runner; only the download is replaced."""

from __future__ import annotations

import json
import shutil
import string
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import pytest
import pytest_asyncio

from slmops.contracts.blueprint import RuntimeSettings, SoakPolicy
from slmops.contracts.descriptor import Descriptor, digest_of
from slmops.contracts.errors import InferenceFailed
from slmops.contracts.manifest import MANIFEST_PATH, MODEL_CONFIG, Manifest
from slmops.contracts.plan import Candidate, Desired, Identity, Plan, Release, Side, Stage
from slmops.gateway.domain import MAX_ATTEMPTS, Phase
from slmops.gateway.handlers import Agent
from slmops.gateway.install.acquire import Acquirer
from slmops.gateway.install.authorization import Authorization
from slmops.gateway.install.slots import Slot, Slots
from slmops.gateway.install.updater import Updater
from slmops.gateway.report.reporter import Reporter
from slmops.gateway.report.spool import Spool
from slmops.gateway.serving.inference import ChatMessage, Done, InferenceRequest
from slmops.gateway.serving.releases import Serving
from slmops.kit.clock import utc_now

ANY_ANSWER = json.dumps({"prompt": "hello", "expect": list(string.ascii_letters), "max_tokens": 24}) + "\n"
IMPOSSIBLE = '{"prompt": "hello", "expect": ["no such answer, ever"], "max_tokens": 4}\n'


class LocalAcquirer(Acquirer):
    """Installs the tiny model for any digest, with the golden prompts of the test."""

    def __init__(self, slots: Slots, model: Path, blobs: Path) -> None:
        trust = Authorization(IDENTITY, lambda: None, blobs / "trust", blobs / "unused.json", utc_now)
        super().__init__("gw-1", lambda: None, slots, blobs, blobs / "unused.pem", trust)
        self.model, self.golden, self.requests = model, ANY_ANSWER, 0

    async def acquire(self, release: Release) -> Slot:
        self.requests += 1
        folder = self._blobs / release.version
        shutil.copytree(self.model, folder, dirs_exist_ok=True)
        (folder / "golden.jsonl").write_text(self.golden)
        config = Descriptor.of(b"{}", MODEL_CONFIG)
        (folder / MANIFEST_PATH).write_bytes(Manifest(config=config, layers=(config,)).encode())
        files = [path for path in folder.rglob("*") if path.is_file()]
        return self._slots.install(release.manifest.digest, [(p, p.relative_to(folder).as_posix()) for p in files])


class World:
    def __init__(self, home: Path, model: Path) -> None:
        self.home, self.model = home, model
        self.start()

    def start(self) -> None:
        """Builds the agent from the files on disk, as a restart of the process does."""
        self.slots, self.serving = Slots(self.home), Serving()
        self.acquirer = LocalAcquirer(self.slots, self.model, self.home / "blobs")
        self.updater = Updater(self.slots, self.acquirer, self.serving, self.home / "releases")
        reporter = Reporter(IDENTITY, Spool(self.home / "spool.db"), self.home / "sequence", utc_now)
        self.agent = Agent(self.slots, self.updater, self.serving, reporter, timedelta(seconds=1))

    async def longest_answer(self) -> int:
        request = InferenceRequest(messages=(ChatMessage(role="user", content="go on"),), max_tokens=64, stream=False)
        done = [item async for _, item in self.serving.generate(request) if isinstance(item, Done)]
        return done[0].completion_tokens

    async def follow(self, release: Release, rollout: str) -> None:
        """Lets the agent follow a plan that names `release` as the candidate of `rollout`."""
        candidate = Candidate(rollout=rollout, release=release, stages=(Stage(name="all"),))
        plan = Plan(blueprint="edge-chat", generation=1, candidate=candidate)
        self.agent.desired_changed(Desired(side=Side.CANDIDATE, release=release, explain={}), plan)
        await self.agent._reconcile()


IDENTITY = Identity(gateway_id="gw-1", blueprint="edge-chat")


def release(version: str, **changes: object) -> Release:
    manifest = Descriptor(media_type="m", digest=digest_of(version.encode()), size=1)
    values = {"revision": 1, "model": "tiny", "version": version, "manifest": manifest, "signature": manifest}
    soak = SoakPolicy(seconds=0.1, golden_every_s=0.05)
    return Release.model_validate({**values, "size_bytes": 1, "soak": soak, **changes})


@pytest_asyncio.fixture
async def world(tmp_path: Path, genai_model: Path) -> AsyncIterator[World]:
    world = World(tmp_path, genai_model)
    yield world
    await world.serving.stop()


async def test_a_release_that_fails_its_probe_leaves_the_old_one_serving(world: World) -> None:
    await world.updater.update(release("1.0.0"), "r1")
    assert (world.updater.phase, world.serving.release and world.serving.release.version) == (Phase.COMMITTED, "1.0.0")
    world.acquirer.golden = IMPOSSIBLE
    with pytest.raises(InferenceFailed, match="0 of 1 golden prompts"):
        await world.updater.update(release("1.0.1"), "r2")
    assert world.serving.release and world.serving.release.version == "1.0.0"
    assert world.slots.active and world.slots.active.digest == digest_of(b"1.0.0")
    assert world.updater.failed_in(digest_of(b"1.0.1")) == "r2"


async def test_a_failed_release_is_retried_only_in_another_rollout(world: World) -> None:
    await world.follow(release("1.0.0"), "r1")
    world.acquirer.golden = IMPOSSIBLE
    await world.follow(release("1.0.1"), "r2")
    await world.follow(release("1.0.1"), "r2")
    assert world.acquirer.requests == 2
    world.acquirer.golden = ANY_ANSWER
    await world.follow(release("1.0.1"), "r3")
    assert (world.acquirer.requests, world.slots.failed) == (3, ())
    assert world.serving.release and world.serving.release.version == "1.0.1"


async def test_other_settings_of_the_same_package_are_served_without_an_update(world: World) -> None:
    await world.follow(release("1.0.0"), "r1")
    assert await world.longest_answer() == 64
    await world.follow(release("1.0.0", revision=2, runtime=RuntimeSettings(max_tokens=5)), "r2")
    assert (await world.longest_answer(), world.acquirer.requests) == (5, 1)


@pytest.mark.parametrize(("expected", "counts"), [(ANY_ANSWER, (1, 0)), (IMPOSSIBLE, (0, 1))])
async def test_new_settings_are_measured_without_any_client_request(
    world: World, expected: str, counts: tuple[int, int]
) -> None:
    await world.follow(release("1.0.0"), "r1")
    world.updater.take_golden()
    world.serving.take_measurements()
    (world.slots.active.path / "golden.jsonl").write_text(expected)
    await world.follow(release("1.0.0", revision=2, runtime=RuntimeSettings(max_tokens=24)), "r2")
    digest = digest_of(b"1.0.0")
    golden = world.updater.take_golden()[digest]
    assert (golden.passed, golden.failed) == counts
    assert world.serving.take_measurements()[digest].requests == 1


async def test_a_release_during_which_the_gateway_crashes_repeatedly_is_marked_as_failed(world: World) -> None:
    await world.updater.update(release("1.0.0"), "r1")
    await world.acquirer.acquire(release("1.0.1"))
    for _ in range(MAX_ATTEMPTS):
        assert digest_of(b"1.0.1") not in world.slots.failed
        world.slots.activate()
        await world.serving.stop()  # the process stops while 1.0.1 soaks
        world.start()
        await world.updater.restore()  # and starts again
        assert world.serving.release and world.serving.release.version == "1.0.0"
    assert digest_of(b"1.0.1") in world.slots.failed
    assert "went down" in world.updater.problems[digest_of(b"1.0.1")].what
