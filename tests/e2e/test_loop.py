"""From a model folder to three gateways that answer: a tiny model on real servers and real processes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import nats
import pytest
from fleet import MODEL, Operator, connect_to_all_subjects, write_golden
from nats.aio.msg import Msg
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from servers import QUICK
from tiny_model import make_tiny_llama

from slmops.contracts.commands import ListVersions
from slmops.kit.objects.store import Objects
from slmops.kit.settings import ObjectSettings
from slmops.kit.tracing import span
from slmops.local.demo.traces import summarize
from slmops.local.servers import BUCKET
from slmops.local.system import System

SECRET = "my-secret-5d0c1f4e9b7a42d68e3f"
"""A constant, because a random model answers some prompts with an end-of-text token only."""


@pytest.fixture
async def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[System]:
    for name, value in QUICK.items():
        monkeypatch.setenv(name, value)
    async with System(tmp_path / "data") as system:
        yield system


async def capture_everything(system: System, seen: list[bytes]) -> nats.NATS:
    connection = await connect_to_all_subjects(system)

    async def keep(message: Msg) -> None:
        seen.append(message.subject.encode() + repr(message.headers).encode() + bytes(message.data))

    await connection.subscribe(">", cb=keep)
    return connection


async def all_objects(system: System) -> dict[str, bytes]:
    credentials = system.layout.s3_credentials()
    settings = ObjectSettings(
        s3_endpoint=system.s3_endpoint,
        s3_access_key=credentials.access_key,
        s3_secret_key=credentials.secret_key,
        s3_bucket=BUCKET,
        tls_ca=system.certificates.trusted,
    )
    objects = Objects(settings)
    return {key: await objects.get_object(key) or b"" for key in await objects.keys()}


async def refuse_a_bad_version(operator: Operator, source: Path, tmp_path: Path) -> None:
    """The golden prompt of 1.0.1 always fails: the canary refuses the version and goes on serving 1.0.0."""
    impossible = tmp_path / "impossible.jsonl"
    impossible.write_text('{"prompt": "hello", "expect": ["no such answer, ever"], "max_tokens": 4}\n')
    await operator.push(source, "1.0.1", impossible)
    bad = (await operator.wait_until_packaged("1.0.1")).packages[0].manifest.digest
    started = await operator.start_rollout("1.0.1")
    ended = await operator.wait_until_ended(started.rollout)
    assert ended.state == "rolled_back"
    assert "golden" in ended.reason
    canary, *others = sorted(await operator.wait_until_fleet_runs("1.0.0"), key=lambda view: view.gateway_id)
    assert await operator.ask(canary.gateway_id, "still there?")
    home = operator.system.layout.home
    release = f"releases/{bad.removeprefix('sha256:')}.json"
    assert (home(canary.gateway_id) / release).exists()
    assert not [view for view in others if (home(view.gateway_id) / release).exists()]


async def test_a_good_version_is_rolled_out_a_bad_one_is_rolled_back_and_prompts_stay_on_the_gateway(
    system: System, tmp_path: Path
) -> None:
    trace.set_tracer_provider(TracerProvider())
    traffic: list[bytes] = []
    connection = await capture_everything(system, traffic)
    operator = await Operator.connect(system)
    source = await asyncio.to_thread(make_tiny_llama, tmp_path / "tiny")

    with span("test") as root:
        trace_id = f"{root.get_span_context().trace_id:032x}"
        pushed = await operator.push(source, "1.0.0", write_golden(tmp_path / "golden.jsonl"))
        packaged = await operator.wait_until_packaged("1.0.0")
        assert {v.recipe for v in packaged.variants} == {"int8", "int4"}
        assert [v.chosen for v in packaged.variants].count(True) == 1
        assert len(packaged.packages) == 1
        await operator.apply_blueprint()
        started = await operator.start_rollout("1.0.0")
        ended = await operator.wait_until_ended(started.rollout)
        assert ended.state == "completed", ended
        await operator.wait_until_fleet_runs("1.0.0")

    for gateway in ("gw-1", "gw-2", "gw-3"):
        assert await operator.ask(gateway, f"please keep {SECRET}")
    again = await operator.push(source, "1.0.0", None)
    assert again.digest == pushed.digest
    assert len((await operator.client.request(ListVersions(model=MODEL))).versions) == 1

    await refuse_a_bad_version(operator, source, tmp_path)

    await asyncio.sleep(2)  # until the measurements of the questions and the last spans are written
    summary = summarize(system.layout.traces, trace_id)
    assert set(summary.services) >= {"registry", "optimizer", "packager", "rollout", "telemetry", "gateway"}
    assert summary.spans >= 20
    assert any(b"measure.gw-1" in message for message in traffic), "the capture received no messages"
    assert not [message for message in traffic if SECRET.encode() in message]
    assert not [key for key, data in (await all_objects(system)).items() if SECRET.encode() in data]
    await connection.close()
    await operator.client.close()
