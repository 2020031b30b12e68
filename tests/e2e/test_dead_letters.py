"""Invalid messages on every consumed subject are dead-lettered, listed and replayable, and harm no service."""

from __future__ import annotations

import asyncio
import json
import signal
import uuid
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tiny_model import make_gguf
from up import Up, until

from slmops.console.settings import find
from slmops.contracts import subjects
from slmops.contracts.cloudevent import MESSAGE_ID_HEADER, Envelope
from slmops.contracts.commands import COMMANDS
from slmops.contracts.descriptor import Descriptor, digest_of
from slmops.contracts.errors import Denied
from slmops.contracts.events import EVENTS, GatewayRevoked, VariantOptimized
from slmops.contracts.model import ModelFile
from slmops.kit.bus.client import PROBLEM_HEADER, BusClient
from slmops.kit.objects.store import Objects
from slmops.kit.settings import ObjectSettings
from slmops.local.layout import Layout
from slmops.local.servers import BUCKET

GOLDEN = Path(__file__).parents[1] / "contract" / "golden"
GARBAGE = (b"{garbage", b'["another", "shape"]', b"\xff\xfe\x00")
INVALID = "invalid_message"


class Letter(NamedTuple):
    subject: str
    consumer: str
    code: str


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    up = Up(tmp_path_factory.mktemp("letters") / "data", gateways=1)
    try:
        up.start()
        yield up
    finally:
        up.stop(signal.SIGKILL)  # its child processes are killed with it


async def console(up: Up) -> BusClient:
    """Connects with the credentials of the command line."""
    return await BusClient.connect(find(up.data), name="test")


def letters(up: Up) -> list[dict[str, Any]]:
    return list(up.json("dlq", "ls", "--limit", "100000")["dead_letters"])


def listed(up: Up) -> Counter[Letter]:
    return Counter(Letter(letter["subject"], letter["consumer"], letter["code"]) for letter in letters(up))


def assert_healthy(up: Up) -> None:
    """Asserts that every process is healthy, was never restarted, and that its service answers."""
    names = [name for name in up.processes() if name not in ("nats", "s3")]
    assert {name: up.health(name) for name in names} == dict.fromkeys(names, 200)
    assert {state["restarts"] for state in up.processes().values()} == {0}
    for words in ("model ls", "rollout ls", "gateway ls", "blueprint ls"):
        up.json(*words.split())


def example_subject(pattern: str) -> str:
    """Returns one subject that matches the filter of a consumer."""
    if pattern == f"{GatewayRevoked.type}.*.*":
        return f"{GatewayRevoked.type}.gw-1.U{'A' * 55}"
    return pattern.replace("*", "edge-small" if pattern.startswith("jobs.") else "gw-1")


async def consumers(client: BusClient) -> list[tuple[str, str]]:
    """Returns (filter subject, service) of every consumer on the server."""
    found = []
    for stream in subjects.STREAMS:
        for info in await client.js.consumers_info(stream.name):
            service = str(info.config.durable_name).partition("-")[0]
            found.append((str(info.config.filter_subject), service))
    return found


def attributes(subject: str) -> dict[str, str]:
    """Returns valid headers for a message on `subject`."""
    kind = next((name for name in EVENTS if subject.startswith(name)), None)
    identity = str(uuid.uuid4())
    if kind is None:
        return {MESSAGE_ID_HEADER: identity}
    return Envelope(id=identity, source="slmops/test", type=kind, time=datetime.now(UTC)).headers()


def valid_payload(pattern: str) -> bytes:
    name = pattern.replace(".*", "") + ".json"
    return json.dumps(json.loads((GOLDEN / name).read_text())["data"]).encode()


async def publish_garbage(up: Up) -> Counter[Letter]:
    """Publishes garbage on every consumed subject of every stream. Returns the expected dead letters."""
    client, expected = await console(up), Counter[Letter]()
    read = await consumers(client)
    for pattern in dict(read):
        subject = example_subject(pattern)
        messages = [(payload, attributes(subject)) for payload in garbage_for(subject)]
        # The last one is valid, but no CloudEvent. Presence is none, so its last one is garbage as well.
        last = GARBAGE[0] if pattern == subjects.presence("*") else valid_payload(pattern)
        for payload, headers in [*messages, (last, {})]:
            await client.js.publish(subject, payload, headers=headers)
    for pattern, service in read:
        subject = example_subject(pattern)
        expected[Letter(subject, f"{service}/{subjects.template(subject)}", INVALID)] = len(garbage_for(subject)) + 1
    await client.close()
    return expected


def garbage_for(subject: str) -> tuple[bytes, ...]:
    """Empty for a stream that keeps one message per subject: a newer message may replace it before it is consumed."""
    spec = subjects.spec_of(subjects.stream_of(subject) or "")
    return () if spec and spec.per_subject == 1 else GARBAGE


async def send_garbage(up: Up) -> Counter[Letter]:
    """Sends garbage as every command, with and without a reply subject. Returns the expected dead letters."""
    client, expected = await console(up), Counter[Letter]()
    for template, kind in COMMANDS.items():
        if kind.anonymous:  # only new gateways may send it
            continue
        subject = kind.model_construct(gateway_id="gw-1").sent_by(client.sender)
        for payload in GARBAGE:
            answer = await client.connection.request(subject, payload, timeout=10)
            assert (answer.headers or {})[PROBLEM_HEADER] == INVALID
            await client.connection.publish(subject, payload)
        expected[Letter(subject, f"{kind.service}/{template}", INVALID)] = len(GARBAGE)
        expected[Letter(subject, f"{kind.service}/{template}", Denied.code)] = len(
            GARBAGE
        )  # the command without a reply subject
    await client.connection.flush()
    await client.close()
    return expected


def test_garbage_on_every_subject_is_dead_lettered_and_every_service_stays_healthy(up: Up) -> None:
    stored = asyncio.run(publish_garbage(up))
    assert {letter.subject.split(".")[0] for letter in stored} == {"slmops", "measure", "presence", "jobs"}
    asked = asyncio.run(send_garbage(up))
    assert len(asked) == 2 * sum(not kind.anonymous for kind in COMMANDS.values()) >= 32
    expected = stored + asked
    until(lambda: len(letters(up)) >= expected.total(), within_s=30)
    assert listed(up) == expected
    assert all(letter["reason"] for letter in letters(up))
    assert_healthy(up)


def replay(up: Up, sequence: int) -> tuple[int, dict[str, Any]]:
    """Replays a dead letter. Returns the exit code and the first row of the answer."""
    done = up("dlq", "replay", str(sequence), "--yes", "--json")
    return done.exit_code, done.json["replayed"][0]


@pytest.mark.parametrize(("prefix", "exit_code"), [("slmops.variant.started", 0), ("cmd.registry.retire", 65)])
def test_replaying_a_message_that_is_still_invalid_makes_a_new_dead_letter(up: Up, prefix: str, exit_code: int) -> None:
    before = letters(up)
    letter = next(letter for letter in before if letter["subject"].startswith(prefix))
    code, row = replay(up, letter["sequence"])
    assert (code, (row["problem"] or {}).get("code")) == (exit_code, INVALID if exit_code else None)
    until(lambda: len(letters(up)) == len(before))
    after = letters(up)
    assert letter["sequence"] not in [other["sequence"] for other in after]
    again = max(after, key=lambda other: int(other["sequence"]))
    assert again["sequence"] > max(other["sequence"] for other in before)
    same = ("subject", "consumer", "code", "reason", "size_bytes")
    assert [again[key] for key in same] == [letter[key] for key in same]


WEIGHTS, REPORT = b"weights", b'{"kl": 0.1}'


def optimized(model: str) -> VariantOptimized:
    """Returns the event of a chosen variant whose files are not in the object store."""
    golden = VariantOptimized.model_validate_json(valid_payload(VariantOptimized.type))
    files = (ModelFile(path="model.onnx", digest=digest_of(WEIGHTS), size_bytes=len(WEIGHTS)),)
    report = Descriptor(media_type="application/json", digest=digest_of(REPORT), size=len(REPORT))
    return golden.model_copy(
        update={"model": model, "version": "1.0.0", "files": files, "report": report, "golden": None}
    )


async def announce(up: Up, variant: VariantOptimized) -> None:
    client = await console(up)
    await client.store(variant.subject, variant.model_dump_json().encode(), attributes(variant.subject))
    await client.close()


async def restore_files(up: Up) -> None:
    credentials = Layout(up.data).s3_credentials()
    objects = Objects(
        ObjectSettings(
            s3_endpoint=f"127.0.0.1:{up.port('s3.api')}",
            s3_access_key=credentials.access_key,
            s3_secret_key=credentials.secret_key,
            s3_bucket=BUCKET,
            tls_ca=Layout(up.data).certificates.trusted,
        )
    )
    for data in (WEIGHTS, REPORT):
        await objects.put_bytes(data, "application/octet-stream")


def test_a_replayed_event_is_processed_after_its_missing_files_are_restored(up: Up, tmp_path: Path) -> None:
    """The packager dead-letters a variant whose files are missing, and packages it when they are restored."""
    with up.frozen("optimizer"):  # only the incomplete variant of this test is announced
        up.json("model", "push", make_gguf(tmp_path / "m.gguf"), "--name", "lost", "--version", "1.0.0")
        asyncio.run(announce(up, optimized("lost")))
        missing = Letter(VariantOptimized.type, f"packager/{VariantOptimized.type}", "not_found")
        until(lambda: listed(up)[missing] == 1)
        letter = next(letter for letter in letters(up) if letter["code"] == "not_found")
        asyncio.run(restore_files(up))
        assert replay(up, letter["sequence"]) == (
            0,
            {"sequence": letter["sequence"], "subject": VariantOptimized.type, "problem": None},
        )
        until(lambda: up.json("model", "show", "lost:1.0.0")["packages"])
        shown = up.json("model", "show", "lost:1.0.0")
        assert len(shown["packages"]) == 1
        assert [v["recipe"] for v in shown["variants"] if v["gate"] == "passed"] == ["int4"], "the registry saw it once"
        assert listed(up)[missing] == 0
    assert_healthy(up)
