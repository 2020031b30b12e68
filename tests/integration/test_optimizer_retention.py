"""What earlier jobs left is removed after its time, and nothing that somebody uses: with a moved clock."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

import pytest
from integration.kit_world import World, world_on
from integration.test_kit_objects import settings_of
from nats.js.errors import KeyNotFoundError

from slmops.contracts.descriptor import digest_of
from slmops.contracts.subjects import JOB_BUCKET, job_key
from slmops.kit.bus import provision as provisioner
from slmops.kit.bus.provision import JOB_STATES_FOR, provision
from slmops.kit.objects.store import Objects
from slmops.optimizer.jobs.retention import Retention
from slmops.optimizer.jobs.workspace import Workspace
from slmops.optimizer.store import Outcome, Results

if TYPE_CHECKING:
    from servers import S3, NatsServer

CACHE, WORK = timedelta(days=90), timedelta(days=7)


async def test_results_that_nobody_used_and_folders_that_nobody_continued_are_removed(s3: S3, tmp_path: Path) -> None:
    objects = Objects(settings_of(s3, s3_bucket=f"cache-{uuid4().hex}"))
    await objects.open()
    outcome = Outcome(variants=(), reason="none", report=await objects.put_bytes(b"report", "application/json"))
    results, workspace = Results(objects, lambda: digest_of(b"here")), Workspace(tmp_path, timedelta(hours=1))
    now = [datetime.now(UTC)]
    retention = Retention(results, workspace, CACHE, WORK, lambda: now[0])
    await results.put_outcome("used", outcome)
    async with workspace.claim("interrupted") as claim:
        (claim.folder / "source").write_bytes(b"gigabytes")
    killed = tmp_path / "verifications" / "verify-x"
    killed.mkdir(parents=True)
    began = now[0]

    async with workspace.claim("running"):
        now[0] = began + WORK - timedelta(minutes=1)
        await retention.enforce()
        assert len(list((tmp_path / "jobs").iterdir())) == 2
        now[0] = began + WORK + timedelta(minutes=1)
        await retention.enforce()
        assert [path.name for path in (tmp_path / "jobs").iterdir()] == ["running"]
        assert not killed.exists()

    now[0] = began + CACHE - timedelta(minutes=1)
    await retention.enforce()
    assert await results.outcome("used") == outcome
    now[0] = began + CACHE + timedelta(minutes=1)
    await retention.enforce()
    assert await results.outcome("used") is None
    assert await objects.exists(outcome.report.digest), "blobs are the registry's"


async def test_a_result_that_is_used_counts_as_new(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    objects = Objects(settings_of(s3, s3_bucket=f"cache-{uuid4().hex}"))
    await objects.open()
    outcome = Outcome(variants=(), reason="none", report=await objects.put_bytes(b"report", "application/json"))
    results, written = Results(objects, lambda: digest_of(b"here")), []
    await results.put_outcome("work", outcome)
    put = objects.put_object

    async def noted(key: str, data: bytes) -> None:
        written.append(key)
        await put(key, data)

    monkeypatch.setattr(objects, "put_object", noted)
    assert await results.outcome("work") == outcome
    assert written == await objects.keys("cache/")


async def test_states_of_jobs_expire_also_in_a_bucket_that_kept_them_for_ever(
    nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world_on(nats_server.url, nats_server.creds) as world:
        js = world.client.js
        info = await js.stream_info(f"KV_{JOB_BUCKET}")
        assert info.config.max_age == JOB_STATES_FOR.total_seconds()
        await js.update_stream(info.config.evolve(max_age=0))
        [board] = [one for one in provisioner._BUCKETS if one.bucket == JOB_BUCKET]
        monkeypatch.setattr(provisioner, "_BUCKETS", (board,))
        await provision(js)
        assert (await js.stream_info(f"KV_{JOB_BUCKET}")).config.max_age == JOB_STATES_FOR.total_seconds()
        await expires(world)


async def expires(world: World) -> None:
    """The server forgets values when their time is over: here after a second instead of 90 days."""
    js = world.client.js
    bucket = await js.key_value(JOB_BUCKET)
    await bucket.put(job_key("old"), b"{}")
    config = (await js.stream_info(f"KV_{JOB_BUCKET}")).config
    await js.update_stream(config.evolve(max_age=1, duplicate_window=1))
    try:
        while True:
            await bucket.get(job_key("old"))
    except KeyNotFoundError:
        return
    finally:
        await js.update_stream(config)
