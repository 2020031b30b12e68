"""The command line with fake services on a real bus: answers, errors, exit codes, dead letters, spans."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from integration.console_cli import Cli, wait_for_exit
from integration.kit_world import World, envelope, moved, until, world_on
from unit.console.console_examples import blueprint, gateway, rollout, version

from slmops.contracts.blueprint import Blueprint
from slmops.contracts.commands import (
    ApplyBlueprint,
    BlueprintList,
    BlueprintView,
    GatewayList,
    GatewayRemoval,
    GatewayView,
    ListBlueprints,
    ListGateways,
    ListRollouts,
    MoveGateway,
    PauseRollout,
    ReenrolGateway,
    RemoveGateway,
    RetireVersion,
    RevokeGateway,
    RolloutList,
    RolloutView,
    SetAlias,
    Standing,
    StartRollout,
    VersionView,
)
from slmops.contracts.errors import IllegalTransition, NotFound, PermanentError
from slmops.contracts.events import ModelAliasMoved
from slmops.contracts.identity import Role, person
from slmops.kit.bus.deadletters import CONSUMER_HEADER, SUBJECT_HEADER
from slmops.kit.bus.service_bus import Bus, MessageContext

if TYPE_CHECKING:
    from servers import NatsServer


SUBJECT = ModelAliasMoved.type
TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"


@pytest.fixture
async def world(nats_server: NatsServer) -> AsyncIterator[World]:
    async with world_on(nats_server.url, nats_server.creds) as world:
        yield world


@pytest.fixture
def slmops(world: World) -> Cli:
    return Cli(world)


class Rollouts:
    """A fake rollout service. Each query gets the next view of `views`; the last one is repeated."""

    def __init__(self, *views: RolloutView) -> None:
        self.views = list(views) or [rollout()]
        self.received: list[object] = []

    async def start(self, command: StartRollout) -> RolloutView:
        self.received.append(command)
        return self.views[0]

    async def pause(self, command: PauseRollout) -> RolloutView:
        raise IllegalTransition("a rollout that is completed does not take pause", fix="It takes: roll_back.")

    async def rollouts(self, query: ListRollouts) -> RolloutList:
        self.received.append(query)
        if query.blueprint not in (None, "edge-chat"):
            return RolloutList(rollouts=())
        view = self.views[0] if len(self.views) == 1 else self.views.pop(0)
        return RolloutList(rollouts=(view,))

    async def gateways(self, query: ListGateways) -> GatewayList:
        fleet = (gateway("gw-1"), gateway("gw-2", problem="0 of 5 golden prompts pass"))
        return GatewayList(gateways=tuple(g for g in fleet if query.gateway_id in (None, g.gateway_id)))

    async def apply(self, command: ApplyBlueprint) -> BlueprintView:
        self.received.append(command)
        return blueprint()

    async def blueprints(self, _: ListBlueprints) -> BlueprintList:
        return BlueprintList(blueprints=(blueprint(),))

    def declare(self, bus: Bus) -> None:
        bus.serve(StartRollout, self.start)
        bus.serve(PauseRollout, self.pause)
        bus.serve(ListRollouts, self.rollouts)
        bus.serve(ListGateways, self.gateways)
        bus.serve(ApplyBlueprint, self.apply)
        bus.serve(ListBlueprints, self.blueprints)


class Fleet:
    """A fake rollout service that accepts every command about gw-1."""

    def __init__(self) -> None:
        self.asked: list[object] = []
        self.view = gateway("gw-1")

    async def change(self, command: Any) -> GatewayView:
        self.asked.append(command)
        return self.view.model_copy(update={"standing": Standing.REVOKED, "revoked_because": "stolen"})

    async def remove(self, command: RemoveGateway) -> GatewayRemoval:
        self.asked.append(command)
        return GatewayRemoval(gateway_id="gw-1", blueprint="edge-chat", at=self.view.last_seen)

    async def listed(self, query: ListGateways) -> GatewayList:
        self.asked.append(query)
        return GatewayList(gateways=(await self.change(None),))

    def declare(self, bus: Bus) -> None:
        for kind in (RevokeGateway, ReenrolGateway, MoveGateway):
            bus.serve(kind, self.change)
        bus.serve(RemoveGateway, self.remove)
        bus.serve(ListGateways, self.listed)


async def test_gateways_are_revoked_removed_moved_and_enrolled_again(world: World, slmops: Cli) -> None:
    fleet = Fleet()
    await world.service("rollout", fleet.declare)
    commands = ["revoke gw-1 --reason stolen", "re-enrol gw-1 --within 2h", "move gw-1 --blueprint kiosk", "rm gw-1"]
    done = await asyncio.gather(*(slmops("gateway", *text.split(), "--json") for text in commands))
    assert [one.exit_code for one in done] == [0, 0, 0, 0]
    assert [one.json["gateway_id"] for one in done] == ["gw-1"] * 4
    asked: Any = sorted(fleet.asked, key=lambda one: type(one).__name__)
    assert asked == [
        MoveGateway(gateway_id="gw-1", blueprint="kiosk"),
        ReenrolGateway(gateway_id="gw-1", within_s=7200),
        RemoveGateway(gateway_id="gw-1"),
        RevokeGateway(gateway_id="gw-1", reason="stolen"),
    ]
    fleet.asked.clear()
    listed = await slmops("gateway", "ls", "--revoked", "--blueprint", "edge-chat")
    assert fleet.asked[0] == ListGateways(blueprint="edge-chat", standing=Standing.REVOKED)
    assert "revoked: stolen" in listed.out


# ---- rollouts, blueprints, gateways -----------------------------------------------------------------------


async def test_watch_prints_a_line_per_change_and_its_exit_code_is_the_outcome(world: World, slmops: Cli) -> None:
    running = rollout()
    stages = (running.stages[0].model_copy(update={"committed": 1, "failed": 0}), running.stages[1])
    views = [running, running, running.model_copy(update={"stages": stages}), rollout("rolled_back")]
    await world.service("rollout", Rollouts(*views).declare)
    done = await slmops("rollout", "watch", "edge-chat", "--json")
    assert done.exit_code == 3
    assert [RolloutView.model_validate(line) for line in done.lines] == [views[0], views[2], views[3]]
    assert (await slmops("rollout", "watch", "edge-chat")).out.startswith("rolled_back, stage 1/2 canary: 0 of 1")


async def test_watch_of_a_completed_rollout_exits_with_0(world: World, slmops: Cli) -> None:
    await world.service("rollout", Rollouts(rollout(), rollout("completed")).declare)
    done = await slmops("rollout", "watch", "edge-chat", "--json")
    assert (done.exit_code, [line["state"] for line in done.lines]) == (0, ["running", "completed"])


async def test_watch_continues_after_a_restart_of_the_service(world: World, slmops: Cli) -> None:
    first = await world.service("rollout", Rollouts(rollout()).declare)
    process = await slmops.start("rollout", "watch", "edge-chat", "--json")
    assert process.stdout
    assert json.loads(await process.stdout.readline())["state"] == "running"
    await first.stop()
    await world.service("rollout", Rollouts(rollout("completed")).declare)
    done = await wait_for_exit(process)
    assert (done.exit_code, done.lines[-1]["state"]) == (0, "completed")


async def test_watch_without_a_rollout_is_an_error_that_says_how_to_start_one(world: World, slmops: Cli) -> None:
    await world.service("rollout", Rollouts().declare)
    done = await slmops("rollout", "watch", "another", "--json")
    assert (done.exit_code, done.problem["code"]) == (1, NotFound.code)
    assert "slmops rollout start another" in done.problem["fix"]


async def test_ctrl_c_exits_with_130_and_without_a_traceback(world: World, slmops: Cli) -> None:
    await world.service("rollout", Rollouts(rollout()).declare)
    process = await slmops.start("rollout", "watch", "edge-chat", "--json")
    assert process.stdout
    await process.stdout.readline()
    process.send_signal(signal.SIGINT)
    done = await wait_for_exit(process)
    assert (done.exit_code, done.err) == (130, "Interrupted.\n")


async def test_start_sends_the_command_and_prints_the_rollout(world: World, slmops: Cli) -> None:
    service = Rollouts()
    await world.service("rollout", service.declare)
    done = await slmops("rollout", "start", "edge-chat", "--version", "1.0.1", "--json")
    assert service.received == [StartRollout(blueprint="edge-chat", version="1.0.1")]
    assert RolloutView.model_validate(done.json) == rollout()


async def test_the_error_of_a_service_is_printed_unchanged(world: World, slmops: Cli) -> None:
    await world.service("rollout", Rollouts().declare)
    done = await slmops("rollout", "pause", "edge-chat", "--json")
    assert done.exit_code == IllegalTransition.exit_code
    assert done.out == ""
    assert done.problem == {
        "code": "illegal_transition",
        "what": "a rollout that is completed does not take pause",
        "where": None,
        "fix": "It takes: roll_back.",
    }


async def test_the_error_for_a_stopped_service_names_it(slmops: Cli) -> None:
    done = await slmops("model", "ls")
    assert done.exit_code == 75
    assert "the registry service is not running" in done.err


async def test_a_blueprint_is_applied_from_yaml_and_from_json_on_standard_input(
    world: World, slmops: Cli, tmp_path: Path
) -> None:
    service = Rollouts()
    await world.service("rollout", service.declare)
    file = tmp_path / "edge-chat.yaml"
    file.write_text("name: edge-chat\nmodel: smollm2\nsoak: {seconds: 1}\n")
    assert (await slmops("blueprint", "apply", str(file))).exit_code == 0
    spec = Blueprint(name="edge-chat", model="smollm2")
    assert (await slmops("blueprint", "apply", "-", stdin=spec.model_dump_json())).exit_code == 0
    assert service.received == [
        ApplyBlueprint(spec=spec.model_copy(update={"soak": spec.soak.model_copy(update={"seconds": 1})})),
        ApplyBlueprint(spec=spec),
    ]


async def test_lists_are_the_replies_as_json_and_tables_as_text(world: World, slmops: Cli) -> None:
    await world.service("rollout", Rollouts(rollout("completed")).declare)
    for command, kind, word in (
        (("gateway", "ls"), GatewayList, "gw-2"),
        (("rollout", "ls"), RolloutList, "smollm2:1.0.1"),
        (("blueprint", "ls"), BlueprintList, "edge-chat"),
    ):
        assert kind.model_validate((await slmops(*command, "--json")).json)
        assert word in (await slmops(*command)).out


async def test_gateway_show_explains_the_desired_release(world: World, slmops: Cli) -> None:
    await world.service("rollout", Rollouts().declare)
    assert "no rollout under way" in (await slmops("gateway", "show", "gw-1")).out
    unknown = await slmops("gateway", "show", "gw-9", "--json")
    assert (unknown.exit_code, unknown.problem["code"]) == (1, NotFound.code)


async def test_the_list_of_gateways_has_the_addresses_of_their_apis(world: World) -> None:
    await world.service("rollout", Rollouts().declare)
    slmops = Cli(world, SLMOPS_GATEWAYS=json.dumps({"gw-1": "http://127.0.0.1:28001"}))
    assert "http://127.0.0.1:28001" in (await slmops("gateway", "ls")).out
    apis = {row["gateway_id"]: row["api"] for row in (await slmops("gateway", "ls", "--json")).json["gateways"]}
    assert apis == {"gw-1": "http://127.0.0.1:28001", "gw-2": None}


async def test_an_alias_is_moved_and_a_version_retired(world: World, slmops: Cli) -> None:
    received: list[object] = []

    async def alias(command: SetAlias) -> VersionView:
        received.append(command)
        return version()

    async def retire(command: RetireVersion) -> VersionView:
        received.append(command)
        return version()

    await world.service("registry", lambda bus: (bus.serve(SetAlias, alias), bus.serve(RetireVersion, retire)))
    assert (await slmops("model", "alias", "smollm2:1.0.0", "production")).exit_code == 0
    done = await slmops("model", "retire", "smollm2:1.0.0", "--reason", "old", "--json")
    assert VersionView.model_validate(done.json) == version()
    assert received == [
        SetAlias(model="smollm2", alias="production", version="1.0.0"),
        RetireVersion(model="smollm2", version="1.0.0", reason="old"),
    ]


# ---- dead letters -----------------------------------------------------------------------------------------


class Optimizer:
    """A fake optimizer that raises `NotFound` until `fixed` is set."""

    def __init__(self) -> None:
        self.fixed = False
        self.done: list[tuple[str, str]] = []

    async def on_alias(self, event: ModelAliasMoved, delivered: MessageContext) -> None:
        if not self.fixed:
            raise NotFound("no such model")
        self.done.append((event.alias, delivered.id))

    def declare(self, bus: Bus) -> None:
        bus.on(ModelAliasMoved, self.on_alias)


async def test_dead_letters_are_listed_without_their_payload_unless_it_is_requested(world: World, slmops: Cli) -> None:
    await world.service("optimizer", Optimizer().declare)
    await world.publish(moved("stable"))
    await world.client.store(SUBJECT, b"my secret", {"Nats-Msg-Id": "malformed"})
    await world.dead_letters(2)
    readers = (await world.client.js.stream_info("DLQ")).state.consumer_count
    done = await slmops("dlq", "ls", "--json")
    first, second = sorted(done.json["dead_letters"], key=lambda letter: str(letter["code"]), reverse=True)
    size = len(moved("stable").model_dump_json())
    assert {key: first[key] for key in ("subject", "consumer", "code", "reason", "size_bytes")} == {
        "subject": SUBJECT,
        "consumer": f"optimizer/{SUBJECT}",
        "code": NotFound.code,
        "reason": "no such model",
        "size_bytes": size,
    }
    assert (second["code"], second["size_bytes"]) == ("invalid_message", 9)
    newest = await slmops("dlq", "ls", "--limit", "1")
    assert (newest.out.count(SUBJECT), "1 of 2 dead letters" in newest.err) == (1, True)
    for output in (done.out, (await slmops("dlq", "ls")).out):
        assert "secret" not in output
    for output in (
        (await slmops("dlq", "ls", "--show-payload")).out,
        (await slmops("dlq", "ls", "--show-payload", "--json")).out,
    ):
        assert "my secret" in output
    assert (await world.client.js.stream_info("DLQ")).state.consumer_count == readers


async def test_a_replayed_message_is_the_same_event_under_a_new_message_id(world: World, slmops: Cli) -> None:
    optimizer = Optimizer()
    await world.service("optimizer", optimizer.declare)
    await world.publish(moved("stable"))
    (letter,) = await world.dead_letters(1)
    optimizer.fixed = True
    done = await slmops("dlq", "replay", str(letter.metadata.sequence.stream), "--json")
    assert (done.exit_code, done.json["replayed"][0]["problem"]) == (0, None)
    original = envelope(moved("stable"))
    await until(lambda: optimizer.done == [("stable", original.id)])
    first, second = await world.stored("EVENTS")
    assert first.data == second.data
    assert (first.headers or {})["Nats-Msg-Id"] != (second.headers or {})["Nats-Msg-Id"]
    ours = [key for key in second.headers or {} if key.startswith("slmops-")]
    assert ours == []
    await world.dead_letters(0)


async def test_replay_all_replays_every_dead_letter_and_a_new_failure_is_a_new_dead_letter(
    world: World, slmops: Cli
) -> None:
    await world.service("optimizer", Optimizer().declare)
    await world.publish(moved("stable"), moved("canary"))
    before = {letter.metadata.sequence.stream for letter in await world.dead_letters(2)}
    done = await slmops("dlq", "replay", "--all", "--json")
    assert {row["sequence"] for row in done.json["replayed"]} == before
    after: set[int] = set()
    while len(after) < 2:
        after = {letter.metadata.sequence.stream for letter in await world.stored("DLQ")} - before
    assert len(await world.dead_letters(2)) == 2


async def test_dead_letters_are_removed_one_by_one_or_all_at_once(world: World, slmops: Cli) -> None:
    await world.service("optimizer", Optimizer().declare)
    await world.publish(moved("stable"), moved("canary"), moved("third"))
    first, *others = sorted(letter.metadata.sequence.stream for letter in await world.dead_letters(3))
    done = await slmops("dlq", "rm", str(first), "--json")
    assert [letter["sequence"] for letter in done.json["dead_letters"]] == [first]
    assert sorted(letter.metadata.sequence.stream for letter in await world.dead_letters(2)) == others
    again = await slmops("dlq", "rm", str(first), "--json")
    assert (again.exit_code, again.problem["code"]) == (1, NotFound.code)
    assert (await slmops("dlq", "rm", "--all")).exit_code == 0
    await world.dead_letters(0)


async def test_a_dead_command_is_kept_while_its_service_does_not_answer(world: World, slmops: Cli) -> None:
    async def retire(command: RetireVersion) -> RolloutView:
        raise AssertionError("never valid")

    bus = await world.service("registry", lambda bus: bus.serve(RetireVersion, retire))
    await world.client.send(RetireVersion, b"{}")
    (letter,) = await world.dead_letters(1)
    sequence = str(letter.metadata.sequence.stream)
    again = await slmops("dlq", "replay", sequence, "--yes", "--json")
    assert (again.exit_code, again.json["replayed"][0]["problem"]["code"]) == (65, "invalid_message")
    (letter,) = await world.dead_letters(1)
    assert str(letter.metadata.sequence.stream) != sequence
    await bus.stop()
    silent = await slmops("dlq", "replay", str(letter.metadata.sequence.stream), "--yes", "--json")
    assert (silent.exit_code, silent.json["replayed"][0]["problem"]["code"]) == (75, "unreachable")
    await world.dead_letters(1)


async def test_a_command_is_shown_before_it_is_replayed_and_replay_all_leaves_it_out(world: World, slmops: Cli) -> None:
    sent: list[RetireVersion] = []

    async def retire(command: RetireVersion) -> VersionView:
        sent.append(command)
        return version()

    await world.service("registry", lambda bus: bus.serve(RetireVersion, retire))
    await world.service("optimizer", (optimizer := Optimizer()).declare)
    optimizer.fixed = True
    command = RetireVersion(model="smollm2", version="1.0.0", reason="mine")
    subject = command.sent_by(person("mallory", Role.APPROVER))
    await world.client.store(f"dlq.{subject}", command.model_dump_json().encode(), {"Nats-Msg-Id": "1"})
    event = moved("stable")
    await world.client.store(f"dlq.{event.type}", event.model_dump_json().encode(), envelope(event).headers())
    done = await slmops("dlq", "replay", "--all", "--json")
    assert [row["subject"] for row in done.json["replayed"]] == [event.type]
    [left_out] = done.json["left_out"]
    assert left_out["subject"] == subject
    number = str(left_out["sequence"])
    text = await slmops("dlq", "replay", "--all")
    assert f"Left out: {number}" in text.err
    shown = await slmops("dlq", "replay", number)
    assert shown.exit_code == 1
    assert "mallory" in shown.out and '"reason":"mine"' in shown.out
    assert f"slmops dlq replay {number} --yes" in shown.err
    assert sent == []
    assert (await slmops("dlq", "replay", number, "--yes")).exit_code == 0
    assert sent == [command]


async def test_a_letter_whose_headers_name_another_subject_is_not_replayed(world: World, slmops: Cli) -> None:
    """The server limits the subject under which a service stores a letter. It does not check the headers."""
    event, other = moved("stable"), "slmops.rollout.completed.v1"
    for number, headers in enumerate(
        ({SUBJECT_HEADER: other}, {CONSUMER_HEADER: f"optimizer/{other}"}, {SUBJECT_HEADER: f"dlq.{event.type}"})
    ):
        original = envelope(event).headers() | {"Nats-Msg-Id": str(number)}
        await world.client.store(f"dlq.{event.type}", event.model_dump_json().encode(), original | headers)
    done = await slmops("dlq", "replay", "--all", "--json")
    assert [row["problem"]["code"] for row in done.json["replayed"]] == [PermanentError.code] * 3
    assert {row["subject"] for row in done.json["replayed"]} == {event.type}
    assert "slmops dlq rm" in done.json["replayed"][0]["problem"]["fix"]
    assert await world.stored("EVENTS") == []
    await world.dead_letters(3)


async def test_replaying_an_unknown_dead_letter_is_an_error(slmops: Cli) -> None:
    done = await slmops("dlq", "replay", "4711", "--json")
    assert (done.exit_code, done.problem["code"]) == (1, NotFound.code)
    assert (await slmops("dlq", "ls")).out.strip() == "No dead letters."


# ---- traces -----------------------------------------------------------------------------------------------


async def test_a_call_with_a_traceparent_is_a_span_of_that_trace(world: World, tmp_path: Path) -> None:
    trace = tmp_path / "console.jsonl"
    await world.service("rollout", Rollouts().declare)
    parent = f"00-{TRACE_ID}-00f067aa0ba902b7-01"
    slmops = Cli(world, SLMOPS_TRACE_FILE=str(trace), TRACEPARENT=parent)
    assert (await slmops("rollout", "start", "edge-chat")).exit_code == 0
    assert (await slmops("rollout", "pause", "edge-chat")).exit_code == 1
    spans = [json.loads(line) for line in trace.read_text().splitlines()]
    assert {span["context"]["trace_id"] for span in spans} == {f"0x{TRACE_ID}"}
    assert {span["resource"]["attributes"]["service.name"] for span in spans} == {"console"}
    calls = {span["name"]: span for span in spans if span["name"].startswith("slmops ")}
    assert set(calls) == {"slmops rollout start", "slmops rollout pause"}
    assert {span["parent_id"] for span in calls.values()} == {"0x00f067aa0ba902b7"}
    assert calls["slmops rollout pause"]["status"]["status_code"] == "ERROR"


async def test_a_call_without_a_traceparent_starts_a_new_trace_without_the_prompt(world: World, tmp_path: Path) -> None:
    trace = tmp_path / "console.jsonl"
    await Cli(world, SLMOPS_TRACE_FILE=str(trace))("chat", "my secret", "--url", "http://127.0.0.1:1")
    (span,) = [json.loads(line) for line in trace.read_text().splitlines()]
    assert (span["name"], span["parent_id"]) == ("slmops chat", None)
    assert "secret" not in trace.read_text()
