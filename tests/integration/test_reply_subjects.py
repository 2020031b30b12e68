"""A request names its reply subject. No user can make a service or the server publish on a forbidden subject.

For each kind of user, an attacker sends every command, and publishes on every other permitted subject, with every
subject on which a service may publish as the reply subject. An observer that receives every message in the services'
account must see no answer there.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nats
import pytest
from integration.kit_world import World, until, world_on
from nats.aio.client import Client, RawCredentials
from nats.aio.msg import Msg

from slmops.contracts import subjects
from slmops.contracts.commands import COMMANDS, ListVersions, VersionList
from slmops.contracts.errors import PermanentError, SlmopsError
from slmops.contracts.identity import Actor, Role, service
from slmops.contracts.permissions import (
    ANSWERING_PERMISSIONS,
    ENROL_PERMISSIONS,
    GATEWAY_PERMISSIONS,
    ROLE_PERMISSIONS,
    SERVICE_PERMISSIONS,
    Permissions,
)
from slmops.contracts.plan import Desired, Identity, Plan
from slmops.gateway.twin import Twin
from slmops.kit.bus.accounts import API, PEOPLE_API
from slmops.kit.bus.client import BusClient
from slmops.kit.bus.nats_auth import creds_text, gateway_jwt, new_user_seed, public_key, read_creds
from slmops.kit.bus.service_bus import Bus
from slmops.kit.settings import BusSettings
from slmops.local.layout import ADMIN

if TYPE_CHECKING:
    from servers import NatsServer

ATTACKERS = (*SERVICE_PERMISSIONS, "enrol", "gw-1", ADMIN)
PLAN = subjects.desired("blueprint.edge-chat")
NAMED = (
    PLAN,
    "slmops.model.version_registered.v1",
    "slmops.gateway.reported.v1.gw-2",
    "measure.gw-2",
    "cmd.registry.retire_version.admin.alice",
    "cmd.rollout.enrol",
    "$JS.API.STREAM.PURGE.EVENTS",
    "twin.desired.blueprint.edge-chat",
    "_INBOX_registry.x",
    "_INBOX_gw-2.x",
)
"""Subjects that matter to an attacker: plans, events, measurements, commands, the JetStream API and inboxes."""


def target_subjects() -> Iterator[str]:
    """Returns every subject on which a service or the operator may publish, with wildcards replaced."""
    yield from NAMED
    for row in (*SERVICE_PERMISSIONS.values(), *ANSWERING_PERMISSIONS.values()):
        yield from (pattern.replace("*", "gw-2").replace(">", "forged.x") for pattern in row.publish)


def command_subjects(sender: Actor) -> Iterator[str]:
    for kind in COMMANDS.values():
        yield kind.model_construct(gateway_id="gw-1").sent_by(sender)


def own_subjects(user: str) -> tuple[str, ...]:
    if user == ADMIN:
        own = (s.replace(API, PEOPLE_API) for s in ROLE_PERMISSIONS[Role.ADMIN].publish if "{{name()}}" not in s)
        return tuple(s.replace("*", "gw-2").replace(">", "forged.x") for s in own)
    row = {"enrol": ENROL_PERMISSIONS, "gw-1": GATEWAY_PERMISSIONS}.get(user)
    if row is None:
        return ()  # a service's own use of JetStream is a matter of its rights on JetStream
    return tuple(s.replace("{{name()}}", "gw-1").replace("{{tag(blueprint)}}", "edge-chat") for s in row.publish)


@dataclass
class Scene:
    world: World
    observed: list[Msg]
    stack: AsyncExitStack
    server: NatsServer
    done: list[str]

    async def connect(self, user: str, credentials: Any, inbox: str) -> Client:
        async def ignore(_error: Exception) -> None:
            """Ignores requests that the server refuses at once."""

        nc = await nats.connect(
            self.server.url, user_credentials=credentials, inbox_prefix=inbox.encode(), error_cb=ignore, name=user
        )
        self.stack.push_async_callback(nc.close)
        return nc

    async def attacker(self, user: str) -> Client:
        credentials = gateway_creds(self.server, user) if user.startswith("gw-") else self.server.creds[user]
        return await self.connect(user, credentials, subjects.inbox_of(self.who(user)))

    def who(self, user: str) -> Actor:
        return read_creds(self.server.creds[user].read_text()).who if user in self.server.creds else service(user)

    async def wait_until_settled(self) -> set[str]:
        """Waits until every service has handled all earlier requests. Returns the commands sent for that."""
        asked: set[str] = set()
        for name in ANSWERING_PERMISSIONS:
            own = (k for k in COMMANDS.values() if k.service == name)
            kind = next(k for k in own if not (k.per_gateway or k.anonymous))
            with pytest.raises(SlmopsError):
                await self.world.client.request(kind.model_construct())
            asked.add(kind.name)
        await asyncio.sleep(0.2)  # commands are handled concurrently
        await self.world.client.connection.flush()
        return asked


def gateway_creds(server: NatsServer, gateway_id: str, blueprint: str = "edge-chat") -> RawCredentials:
    seed = new_user_seed()
    jwt = gateway_jwt(server.gateway_signing_key.read_text(), public_key(seed), gateway_id, blueprint)
    return RawCredentials(creds_text(jwt, seed))


@pytest.fixture
async def scene(nats_server: NatsServer) -> AsyncIterator[Scene]:
    """Yields a bus on which every service answers each of its commands with an error and records it in `done`."""
    async with world_on(nats_server.url, nats_server.creds) as world, AsyncExitStack() as stack:
        scene = Scene(world, [], stack, nats_server, [])

        def refusing(name: str) -> Any:
            async def refuse(_command: Any) -> Any:
                scene.done.append(name)
                raise PermanentError("no")

            return refuse

        def serving(service: str) -> Any:
            def declare(bus: Bus) -> None:
                for kind in COMMANDS.values():
                    if kind.service == service:
                        bus.serve(kind, refusing(kind.name))

            return declare

        for service in ANSWERING_PERMISSIONS:
            await world.service(service, serving(service))
        everything = RawCredentials(nats_server.authority.user_creds("observer", Permissions((">",), (">",))))
        observer = await scene.connect("observer", everything, "_INBOX_observer")

        async def record(message: Msg) -> None:
            scene.observed.append(message)

        await observer.subscribe(">", cb=record)
        await observer.flush()
        yield scene


@pytest.mark.parametrize("user", ATTACKERS)
async def test_only_reply_subjects_in_the_users_own_inbox_are_answered(scene: Scene, user: str) -> None:
    rollout = await scene.world.connect("rollout")
    await rollout.write_desired("blueprint.edge-chat", b"the plan", 0)
    attacker = await scene.attacker(user)
    await scene.wait_until_settled()
    scene.observed.clear()
    scene.done.clear()
    asked, named = {*command_subjects(scene.who(user)), *own_subjects(user)}, set(target_subjects())
    inbox = f"{subjects.inbox_of(scene.who(user))}."
    for subject in asked:
        # Without what the user may send itself: an answer that arrives there gives it nothing more.
        for reply in named - {subject} - set(own_subjects(user)):
            if not reply.startswith(inbox):
                await attacker.publish(subject, b"{}", reply=reply)
    await attacker.flush()
    settling = await scene.wait_until_settled()
    # The attacker's own requests are on some of these subjects too. Their payload tells them from answers.
    asked |= {subject.replace(PEOPLE_API, API, 1) for subject in asked}
    arrived = [m for m in scene.observed if m.subject in named and not (m.subject in asked and m.data == b"{}")]
    assert {m.subject for m in arrived} == set()
    # An admin's commands are executed: the server has put an inbox of the admin's account for what they named.
    assert set(scene.done) <= settling or user == ADMIN
    assert await rollout.read_desired("blueprint.edge-chat") == (b"the plan", 1)


async def test_the_same_requests_are_answered_in_the_users_own_inbox(scene: Scene) -> None:
    """Proves that the attack above fails because of its reply subject and for no other reason."""
    gateway = await scene.attacker("gw-1")
    answer = await gateway.request("cmd.packager.fetch.gw-1", b"{}", timeout=5)
    assert b"does not validate" in answer.data
    enrol = await scene.attacker("enrol")
    assert b"does not validate" in (await enrol.request("cmd.rollout.enrol", b"{}", timeout=5)).data


async def test_a_command_without_a_reply_subject_is_not_executed(scene: Scene) -> None:
    """Otherwise an acknowledgement of JetStream redirected to the subject of a command would execute the command."""
    await scene.world.client.connection.publish("cmd.rollout.list_gateways.admin.alice", b"{}")
    await scene.world.client.connection.flush()
    assert (await _executed(scene)) == ["list_gateways"]


async def _executed(scene: Scene) -> list[str]:
    """Returns the commands that were executed until one real request is answered."""
    with pytest.raises(PermanentError):
        await scene.world.client.request(COMMANDS["cmd.rollout.list_gateways"]())
    return scene.done


async def test_a_request_from_another_account_gets_a_reply_subject_made_by_the_server(
    scene: Scene,
) -> None:
    gateway = await scene.attacker("gw-1")
    scene.observed.clear()
    await gateway.request("cmd.packager.fetch.gw-1", b"{}", timeout=5)
    await until(lambda: any(m.subject == "cmd.packager.fetch.gw-1" for m in scene.observed))
    assert next(m for m in scene.observed if m.subject == "cmd.packager.fetch.gw-1").reply.startswith("_R_.")


async def test_a_forged_reply_subject_of_the_server_is_refused(scene: Scene) -> None:
    for user in (ADMIN, "optimizer"):
        attacker = await scene.attacker(user)
        await attacker.publish(ListVersions().sent_by(scene.who(user)), b"{}", reply="_R_.forged.x")
    await asyncio.sleep(0.3)
    assert scene.done == []


async def test_the_registry_answers_the_optimizer(world_bus: World) -> None:
    async def answer(_command: ListVersions) -> VersionList:
        return VersionList(versions=())

    await world_bus.service("registry", lambda bus: bus.serve(ListVersions, answer))
    optimizer = await world_bus.connect("optimizer")
    assert (await optimizer.request(ListVersions())).versions == ()


@pytest.fixture
async def world_bus(nats_server: NatsServer) -> AsyncIterator[World]:
    async with world_on(nats_server.url, nats_server.creds) as world:
        yield world


class RecordingFollower:
    def __init__(self) -> None:
        self.received: list[object] = []

    def desired_changed(self, desired: Desired, plan: Plan) -> None:
        self.received.append(plan)

    def plan_refused(self, error: SlmopsError) -> None:
        self.received.append(error)


async def test_an_answer_redirected_to_the_plan_subject_of_another_gateway_is_not_followed(scene: Scene) -> None:
    """Gateways share an account, so an answer can be redirected to another one's subject. It must not become a plan."""
    rollout = await scene.world.connect("rollout")
    await rollout.write_desired("blueprint.edge-chat", b"the plan of another blueprint", 0)
    seed = new_user_seed()
    jwt = gateway_jwt(scene.server.gateway_signing_key.read_text(), public_key(seed), "gw-2", "kiosk")
    client = await BusClient.connect(
        BusSettings(nats_url=scene.server.url),
        name="gw-2",
        user_credentials=RawCredentials(creds_text(jwt, seed)),
        inbox_prefix=b"_INBOX_gw-2",
    )
    scene.stack.push_async_callback(client.close)
    opened: list[bytes] = []

    async def open_plan(data: bytes) -> Plan:
        opened.append(data)
        raise PermanentError("no plan")

    follower = RecordingFollower()
    twin = Twin(Identity(gateway_id="gw-2", blueprint="kiosk"), open_plan, follower, timedelta(hours=1))
    watching = asyncio.create_task(twin.watch(client))
    arrived: list[Msg] = []

    async def record(message: Msg) -> None:
        arrived.append(message)

    await client.connection.subscribe("twin.desired.blueprint.kiosk", cb=record)
    await client.connection.flush()
    attacker = await scene.attacker("gw-1")
    for asked in own_subjects("gw-1"):
        await attacker.publish(asked, b"{}", reply="twin.desired.blueprint.kiosk")
    await until(lambda: len(arrived) >= 3)
    assert (opened, follower.received) == ([], [])
    await rollout.write_desired("blueprint.kiosk", b"its own plan", 0)
    await until(lambda: opened == [b"its own plan"])
    watching.cancel()


async def test_a_service_without_credentials_for_answers_does_not_start(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    creds = tmp_path / "registry.creds"
    creds.write_text(nats_server.creds["registry"].read_text())
    bus = Bus("registry", BusSettings(nats_url=nats_server.url, nats_creds=creds))
    bus.serve(ListVersions, None)  # type: ignore[arg-type]
    with pytest.raises(PermanentError, match="cannot be read") as caught:
        await bus.start()
    assert str(caught.value.where).endswith("registry-answers.creds")
    await bus.stop()
