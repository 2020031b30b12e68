"""`slmops stream` and `slmops attention` on a real bus."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import timedelta
from io import StringIO
from typing import TYPE_CHECKING

import pytest
from integration.console_cli import Cli
from integration.kit_world import AT, World, moved, world_on
from integration.stream_world import TINY_BYTES, fill, make_tiny
from rich.console import Console

from slmops.console.commands.status import findings
from slmops.console.render import status as render
from slmops.console.render.status_view import Status
from slmops.contracts.events import ModelAliasMoved
from slmops.contracts.permissions import SERVICE_PERMISSIONS
from slmops.contracts.subjects import ROLL_CALL
from slmops.kit.bus import gaps
from slmops.kit.bus.gaps import Durable
from slmops.kit.bus.provision import consumer
from slmops.kit.bus.roll_call import answer_roll_calls, call_roll
from slmops.kit.revision import shared_revision, this_process

if TYPE_CHECKING:
    from servers import NatsServer

OURS = Durable("EVENTS", "registry-test")


@pytest.fixture
async def world(nats_server: NatsServer) -> AsyncIterator[World]:
    async with world_on(nats_server.url, nats_server.creds) as world:
        yield world


@pytest.fixture
def slmops(world: World) -> Cli:
    return Cli(world)


async def make_a_gap(world: World) -> None:
    await consumer(world.client.js, *OURS, ModelAliasMoved.type)
    await world.publish(moved("a"), moved("b"))
    await world.client.js.purge_stream("EVENTS", seq=2)
    assert await gaps.check_for_gap(world.client, OURS)


async def test_status_lists_the_backlog_and_doctor_lists_every_problem_with_a_fix(world: World, slmops: Cli) -> None:
    await make_a_gap(world)
    found = (await slmops("status", "--json")).json
    assert {"stream": "EVENTS", "consumer": OURS.consumer, "pending": 1} in found["backlog"]
    assert (found["dead_letters"], found["problem"]) == (0, None)
    assert found["nats_version"].startswith("2.")
    shown = (await slmops("status")).out
    assert f"1 messages, most for {OURS.consumer}" in shown
    done = await slmops("doctor", "--json")
    kinds = [item["kind"] for item in done.json]
    assert (done.exit_code, kinds) == (1, ["gap", *["unreachable"] * 3])  # no rollout, registry or packager here
    assert all(item["fix"] for item in done.json)


async def test_status_shows_each_process_of_a_mixed_fleet_and_doctor_names_the_releases(
    world: World, slmops: Cli
) -> None:
    """The services and the operator have their real rights. A foreign reply subject is ignored."""
    services = list(SERVICE_PERMISSIONS)
    for service in services:
        await answer_roll_calls(await world.connect(service), this_process(service))
    old = {"version": "0.0.9", "revision": "0123456789ab", "shared_revision": "fedcba987654"}
    second = this_process("optimizer").model_copy(update={**old, "host": "box-2", "pid": 7})
    await answer_roll_calls(await world.connect("optimizer"), second)

    console, found = await world.connect("console"), ()
    while len(found) < len(services) + 1:  # a machine under load answers in more than the usual time
        found = await call_roll(console, services, timedelta(seconds=15))
    assert sorted(process.service for process in found) == sorted([*services, "optimizer"])
    assert second in found

    status = Status(version="0.1.0", shared_revision=shared_revision(), services=found)
    (item,) = findings(status, AT)
    assert item.kind == "mixed_releases"
    assert "0.0.9 (fedcba987654): optimizer" in item.what
    assert f"({shared_revision()}): {', '.join(sorted(services))}" in item.what
    text = Console(width=100, file=(out := StringIO()))
    text.print(render.status(status, AT))
    assert all(word in out.getvalue() for word in ("telemetry", "0.0.9", "0123456789ab", "box-2"))
    assert "services" in (await slmops("status", "--json")).json

    heard = await world.client.connection.subscribe("slmops.>")
    await console.connection.publish(ROLL_CALL, b"", reply="slmops.model.alias_moved.v1")
    await call_roll(console, ["optimizer"])
    assert heard.pending_msgs == 0


async def test_streams_are_listed_with_their_consumers_and_gaps(world: World, slmops: Cli) -> None:
    await make_a_gap(world)
    found = {stream["name"]: stream for stream in (await slmops("stream", "ls", "--json")).json["streams"]}
    events = found["EVENTS"]
    assert (events["messages"], events["limit_bytes"], events["refuses"], events["max_age"]) == (1, 1 << 30, True, None)
    (ours,) = events["consumers"]
    assert (ours["name"], ours["pending"], ours["gap"]["first"], ours["gap"]["last"]) == (OURS.consumer, 1, 1, 1)
    assert (found["WINDOWS"]["refuses"], found["WINDOWS"]["max_age"]) == (False, "P30D")
    shown = (await slmops("stream", "ls")).out
    for text in ("EVENTS", "refuses new", "drops oldest", "30 d", OURS.consumer, "1 to 1: removed"):
        assert text in shown


async def test_a_full_stream_accepts_messages_after_it_is_enlarged(
    world: World, slmops: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    await make_tiny(world, monkeypatch, "EVENTS")
    taken = await fill(world, "EVENTS")
    done = await slmops("stream", "resize", "EVENTS", "32KiB", "--json")
    assert (done.exit_code, done.json["limit_bytes"]) == (0, 32 << 10)
    await world.publish(moved("a"))
    assert (await world.client.js.stream_info("EVENTS")).state.messages == taken + 1


@pytest.mark.parametrize(
    ("arguments", "code", "exit_code", "says"),
    [
        (("EVENTS", "8KiB"), "illegal_transition", 1, "would drop messages"),
        (("EVENTS", "8KiB", "--force"), "illegal_transition", 1, "would drop messages"),
        (("WINDOWS", "8KiB"), "invalid_message", 65, "8KiB is below"),
        (("EVENTS", "1024TiB"), "disk_full", 75, "cannot reserve"),
        (("NOTHING", "1GiB"), "not_found", 1, "no stream NOTHING"),
    ],
)
async def test_an_invalid_stream_size_is_refused_and_changes_nothing(
    world: World,
    slmops: Cli,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    code: str,
    exit_code: int,
    says: str,
) -> None:
    await make_tiny(world, monkeypatch, "EVENTS")
    taken = await fill(world, "EVENTS")
    done = await slmops("stream", "resize", *arguments, "--json")
    assert (done.exit_code, done.problem["code"]) == (exit_code, code)
    assert says in done.problem["what"]
    info = await world.client.js.stream_info("EVENTS")
    assert (info.config.max_bytes, info.state.messages) == (TINY_BYTES, taken)


async def test_a_stream_that_drops_old_messages_may_be_made_smaller(world: World, slmops: Cli) -> None:
    done = await slmops("stream", "resize", "WINDOWS", "64MiB", "--force", "--json")
    assert (done.exit_code, done.json["limit_bytes"]) == (0, 64 << 20)


async def test_a_gap_is_accepted_once(world: World, slmops: Cli) -> None:
    await make_a_gap(world)
    done = await slmops("stream", "accept", "EVENTS", "--json")
    assert [(gap["consumer"], gap["first"], gap["last"]) for gap in done.json["accepted"]] == [(OURS.consumer, 1, 1)]
    assert "There are no gaps" in (await slmops("stream", "accept", "EVENTS")).out
    assert (await slmops("stream", "accept", "NOTHING", "--json")).problem["code"] == "not_found"


async def test_attention_lists_problems_that_need_an_operator(
    world: World, slmops: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    await make_tiny(world, monkeypatch, "EVENTS")
    await make_a_gap(world)
    await fill(world, "EVENTS")
    for number in range(3):
        headers = {"slmops-dead-consumer": "telemetry/measure.{gateway_id}", "slmops-dead-code": "invalid_message"}
        await world.client.store("dlq.measure.gw-1", str(number).encode(), headers)
    done = await slmops("attention", "--json")
    assert done.exit_code == 0
    found = [(item["kind"], item["where"]) for item in done.json]
    assert found == [
        ("stream_full", "EVENTS"),
        ("gap", f"EVENTS for {OURS.consumer}"),
        ("dead_letters", "measure.gw-1 for telemetry"),
        ("unreachable", "cmd.rollout.list_rollouts"),
        ("unreachable", "cmd.registry.describe_storage"),
        ("unreachable", "cmd.packager.describe_trust"),
    ]
    assert "3 × invalid_message" in done.json[2]["what"]
    assert "slmops stream resize EVENTS 32KiB" in (await slmops("attention")).out
