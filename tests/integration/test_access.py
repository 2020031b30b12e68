"""People on a real nats-server: what each role may do, who did what, and that a revoked key stays out."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import nats
import pytest
from integration.console_cli import Cli
from integration.kit_world import Everything, World, until
from integration.test_nats_auth import User, connected
from nats.aio.client import RawCredentials
from servers import running

from slmops.access import accounts
from slmops.access.app import build
from slmops.access.settings import Settings
from slmops.contracts import permissions
from slmops.contracts.cloudevent import Envelope
from slmops.contracts.commands import AddUser, ListUsers, ListVersions, RevokeUser, StartRollout, VersionList
from slmops.contracts.errors import AlreadyExists, CredentialsRefused, Denied, Unreachable
from slmops.contracts.events import Event, GatewayEnrolled, GatewayRevoked, UserAdded, UserRevoked
from slmops.contracts.identity import Role, person
from slmops.contracts.permissions import PROVISIONER, SYSTEM_USER, Permissions
from slmops.contracts.subjects import inbox_of
from slmops.kit.bus import provisioner
from slmops.kit.bus.client import BusClient
from slmops.kit.bus.nats_auth import (
    Authority,
    creds_text,
    gateway_jwt,
    new_user_seed,
    public_key,
    read_creds,
    revoked_keys,
)
from slmops.kit.bus.service_bus import Bus
from slmops.kit.cancellation import cancel_and_wait
from slmops.kit.settings import BusSettings
from slmops.local.layout import ADMIN, Layout
from slmops.local.ports import HOST, choose_ports
from slmops.local.servers import nats_spec


@dataclass
class Site:
    layout: Layout
    url: str
    folder: Path

    @property
    def admin(self) -> str:
        return read_creds(self.layout.creds(ADMIN).read_text()).who.name

    def lose_database(self) -> None:
        for file in self.folder.glob("access.db*"):
            file.unlink()

    def refused_keys(self, account: str) -> set[str]:
        """Returns the revoked keys of people's or gateways' account, as the server keeps them."""
        return set(revoked_keys(self.layout.nats_accounts, getattr(self.layout.authority().account_keys, account)))

    def cli(self, creds: Path | None = None) -> Cli:
        world = World(self.url, {"console": creds or self.layout.creds(ADMIN)}, None)  # type: ignore[arg-type]
        return Cli(world, HOME=str(self.folder))

    @asynccontextmanager
    async def access(self) -> AsyncIterator[None]:
        """The access service."""
        settings = Settings(
            nats_url=self.url,
            nats_creds=self.layout.creds("access"),
            database_url=f"sqlite:///{self.folder}/access.db",
            access_keys=self.layout.access_keys,
            system_creds=self.layout.creds(SYSTEM_USER),
            first_admin=self.layout.first_admin,
        )
        service = build(settings)
        for step in service.opening:
            await step()
        await service.bus.start()
        tasks = [asyncio.create_task(task()) for task in service.tasks]
        try:
            yield
        finally:
            await cancel_and_wait(tasks)
            await service.bus.stop()
            for step in service.closing:
                await step()

    @asynccontextmanager
    async def sent_by_admin(self) -> AsyncIterator[Everything]:
        client = await Everything.open(self.url, self.layout.keys)
        try:
            yield client
        finally:
            await client.close()


def new_site(folder: Path) -> Site:
    layout = Layout(folder / "data")
    layout.prepare()
    port = choose_ports(layout.ports_file, ["nats"])["nats"]
    return Site(layout, f"nats://{HOST}:{port}", folder)


def server(site: Site) -> Iterator[int]:
    return running(nats_spec(site.layout, choose_ports(site.layout.ports_file, ["nats"])["nats"]))  # type: ignore[return-value]


async def eventually_published(client: BusClient, kind: type[Event], user: str) -> None:
    """Waits until the stream has an event about a person."""
    async with asyncio.timeout(20):
        while True:
            async for _, event in client.recorded(kind):
                if event.key == user:
                    return
            await asyncio.sleep(0.05)


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    site = new_site(tmp_path)
    with await asyncio.to_thread(_entered, site) as _:
        settings = BusSettings(nats_url=site.url, nats_creds=site.layout.creds(PROVISIONER))
        await provisioner.run(settings)
        yield site


class _entered:
    """A server that was started in a thread: `running` waits for it with an event loop of its own."""

    def __init__(self, site: Site) -> None:
        self._running = server(site)
        self._running.__enter__()  # type: ignore[attr-defined]

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None:
        self._running.__exit__(None, None, None)  # type: ignore[attr-defined]


@asynccontextmanager
async def as_person(site: Site, creds: Path) -> AsyncIterator[User]:
    who = read_creds(creds.read_text()).who
    async with connected(site.url, creds, inbox_of(who).encode()) as user:
        yield user


async def test_a_viewer_reads_and_the_server_refuses_everything_else(site: Site) -> None:
    creds = site.folder / "alice.creds"
    async with site.access():
        added = await site.cli()("user", "add", "alice", "--role", "viewer", "--out", str(creds), "--json")
        assert (added.exit_code, added.json["role"]) == (0, "viewer"), added.err
        assert creds.stat().st_mode & 0o777 == 0o600
        again = await site.cli()("user", "add", "alice", "--role", "admin", "--out", f"{creds}2", "--json")
        assert (again.exit_code, again.problem["code"]) == (1, AlreadyExists.code)
    shown = (await site.cli(creds)("whoami", "--json")).json
    assert (shown["user"], shown["role"]) == ("alice", "viewer")
    listed = await site.cli(creds)("stream", "ls", "--json")
    assert listed.exit_code == 0, listed.err
    async with as_person(site, creds) as alice:
        for subject in (
            StartRollout(blueprint="b").sent_by(person("alice", Role.VIEWER)),
            StartRollout(blueprint="b").sent_by(person("alice", Role.ADMIN)),
            ListVersions().sent_by(person("bob", Role.VIEWER)),
            "cmd.registry.list_versions.service.optimizer",
            "cmd.packager.fetch.gw-1",
            "slmops.rollout.completed.v1",
            "jsapi.STREAM.UPDATE.EVENTS",
            "$JS.API.DIRECT.GET.EVENTS",
            "_INBOX_person.bob.x",
        ):
            await alice.nc.publish(subject, b"{}", reply=alice.nc.new_inbox())
            assert len(await alice.refusals()) == 1, subject
        for subject in (">", "cmd.>", "_INBOX_person.bob.>", "_INBOX_person.*.>", "slmops.>"):
            await alice.nc.subscribe(subject)
            assert len(await alice.refusals()) == 1, subject


async def test_the_service_refuses_what_a_too_wide_template_lets_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = Permissions(("cmd.*.*.viewer.{{name()}}",), permissions.ROLE_PERMISSIONS[Role.VIEWER].subscribe)
    monkeypatch.setitem(permissions.ROLE_PERMISSIONS, Role.VIEWER, wide)
    site = new_site(tmp_path)
    until_then = datetime.now(UTC) + timedelta(hours=1)
    creds = tmp_path / "alice.creds"
    creds.write_text(site.layout.authority().person_creds(person("alice", Role.VIEWER), until_then))
    done: list[object] = []

    async def note(command: object) -> VersionList:
        done.append(command)
        return VersionList(versions=())

    with await asyncio.to_thread(_entered, site):
        buses = [_bus(site, "rollout"), _bus(site, "registry")]
        buses[0].serve(StartRollout, note)
        buses[1].serve(ListVersions, note)
        await provisioner.run(BusSettings(nats_url=site.url, nats_creds=site.layout.creds(PROVISIONER)))
        for bus in buses:
            await bus.start()
        alice = await BusClient.connect(BusSettings(nats_url=site.url, nats_creds=creds), name="alice")
        assert await alice.request(ListVersions()) == VersionList(versions=())
        with pytest.raises(Denied, match="alice has the role viewer, and this command requires the role operator"):
            await alice.request(StartRollout(blueprint="edge-chat"))
        assert done == [ListVersions()]
        await alice.close()
        for bus in buses:
            await bus.stop()


def _bus(site: Site, service: str) -> Bus:
    return Bus(service, BusSettings(nats_url=site.url, nats_creds=site.layout.creds(service)))


async def test_a_revoked_person_is_disconnected_and_stays_out_after_a_restart_of_the_server(tmp_path: Path) -> None:
    site = new_site(tmp_path)
    creds = {name: tmp_path / f"{name}.creds" for name in ("alice", "bob")}
    with await asyncio.to_thread(_entered, site):
        await provisioner.run(BusSettings(nats_url=site.url, nats_creds=site.layout.creds(PROVISIONER)))
        async with site.access(), site.sent_by_admin() as admin:
            for name, path in creds.items():
                seed = new_user_seed()
                added = await admin.request(AddUser(user=name, role=Role.OPERATOR, public_key=public_key(seed)))
                path.write_text(creds_text(added.jwt, seed))
            async with as_person(site, creds["alice"]) as alice, as_person(site, creds["bob"]) as bob:
                view = await admin.request(RevokeUser(user="alice", reason="left"))
                assert (view.revoked_by, view.reason) == (f"person:{site.admin}", "left")
                await until(lambda: alice.nc.is_closed)
                await bob.nc.flush()
                assert not bob.nc.is_closed
            with pytest.raises(Denied, match="last admin"):
                await admin.request(RevokeUser(user=site.admin))
            shown = (await site.cli()("user", "ls", "--json")).json["users"]
            assert {one["user"]: one["revoked_at"] is not None for one in shown} == {
                site.admin: False,
                "alice": True,
                "bob": False,
            }
    site.layout.prepare()  # as a new `slmops up` does: it writes the server's configuration again
    with await asyncio.to_thread(_entered, site):  # and no access service runs
        refused = await site.cli(creds["alice"])("whoami", "--json")
        assert refused.problem["code"] == CredentialsRefused.code
        assert (await site.cli(creds["bob"])("whoami", "--json")).json["user"] == "bob"


async def test_a_revoked_gateway_is_disconnected_and_others_are_not(site: Site) -> None:
    now = datetime.now(UTC)
    keys = {name: new_user_seed() for name in ("gw-1", "gw-2")}
    signing = site.layout.gateway_signing_key.read_text()
    jwts = {name: gateway_jwt(signing, public_key(seed), name, "edge-chat") for name, seed in keys.items()}
    creds = {name: RawCredentials(creds_text(jwts[name], seed)) for name, seed in keys.items()}
    async with (
        site.sent_by_admin() as rollout,
        connected(site.url, creds["gw-1"], b"_INBOX_gw-1") as stolen,
        connected(site.url, creds["gw-2"], b"_INBOX_gw-2") as other,
    ):
        event = GatewayRevoked(gateway_id="gw-1", public_key=public_key(keys["gw-1"]), revoked_at=now, reason="stolen")
        # Whoever can publish the event can revoke gateways and nobody else: this key is of the admin.
        admins = read_creds(site.layout.creds(ADMIN).read_text()).public_key
        forged = event.model_copy(update={"gateway_id": "gw-9", "public_key": admins})
        for one in (forged, event):
            await rollout.publish(one, Envelope(id=one.public_key, source="test", type=one.type, time=now))
        async with site.access():
            await until(lambda: stolen.nc.is_closed)
            await other.nc.flush()
            with pytest.raises(nats.errors.Error, match=r"(?i)authorization violation"):
                async with connected(site.url, creds["gw-1"], b"_INBOX_gw-1"):
                    pass
            assert (await site.cli()("whoami", "--json")).exit_code == 0

        site.lose_database()
        async with site.access():  # reads the stored revocations again before it pushes accounts
            assert (await site.cli()("whoami", "--json")).exit_code == 0
            for _ in range(10):
                with pytest.raises(nats.errors.Error, match=r"(?i)authorization violation"):
                    async with connected(site.url, creds["gw-1"], b"_INBOX_gw-1"):
                        pass
                await asyncio.sleep(0.1)
            await other.nc.flush()


async def test_the_credential_of_a_moved_gateway_for_its_old_blueprint_is_refused(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accounts, "_GATHER_S", 0.05)
    seed, now = new_user_seed(), datetime.now(UTC)
    signing = site.layout.gateway_signing_key.read_text()

    def credential(blueprint: str, at: datetime) -> RawCredentials:
        jwt = gateway_jwt(
            signing, public_key(seed), "gw-1", blueprint, issued_at=at, expires_at=now + timedelta(days=9)
        )
        return RawCredentials(creds_text(jwt, seed))

    old, new = credential("edge-chat", now - timedelta(seconds=1)), credential("kiosk", now)
    moved = GatewayEnrolled(
        gateway_id="gw-1", blueprint="kiosk", public_key=public_key(seed), moved_from="edge-chat", at=now
    )

    async def revoke_another(rollout: BusClient) -> None:
        """Revokes some other gateway, and waits until the server knows. So the service has read all streams by then."""
        another = GatewayRevoked(gateway_id="gw-2", public_key=public_key(new_user_seed()), revoked_at=now)
        await rollout.publish(another, Envelope(id=another.public_key, source="test", type=another.type, time=now))
        await until(lambda: another.public_key in site.refused_keys("edge"))

    async def refused() -> bool:
        try:
            async with connected(site.url, old, b"_INBOX_gw-1"):
                return False
        except nats.errors.Error:
            return True

    async with site.sent_by_admin() as rollout, connected(site.url, new, b"_INBOX_gw-1") as gateway:
        async with site.access(), connected(site.url, old, b"_INBOX_gw-1") as before:
            await revoke_another(rollout)
            assert not before.nc.is_closed
            await rollout.publish(moved, Envelope(id="moved", source="test", type=moved.type, time=now))
            await until(lambda: before.nc.is_closed)
            await gateway.nc.flush()
            assert not gateway.nc.is_closed
            assert await refused()
        site.lose_database()
        async with site.access():
            await revoke_another(rollout)
        assert public_key(seed) in site.refused_keys("edge"), "it was read again from the enrolments"
        assert await refused()


async def test_a_revoked_person_stays_out_after_a_loss_of_the_database(site: Site) -> None:
    async with site.sent_by_admin() as admin:
        keys = {}
        for name in ("alice", "bob"):
            keys[name] = public_key(new_user_seed())
            async with site.access():
                await admin.request(AddUser(user=name, role=Role.OPERATOR, public_key=keys[name]))
                await admin.request(RevokeUser(user=name, reason="left"))
                await eventually_published(admin, UserRevoked, name)
            site.lose_database()
    assert site.refused_keys("people") == set(keys.values())


async def test_a_revoked_first_admin_gets_a_new_key(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    before, seed, path = read_creds(site.layout.creds(ADMIN).read_text()), new_user_seed(), site.folder / "bob.creds"
    async with site.access():
        async with site.sent_by_admin() as admin:
            added = await admin.request(AddUser(user="bob", role=Role.ADMIN, public_key=public_key(seed)))
        path.write_text(creds_text(added.jwt, seed))
        bob = await BusClient.connect(BusSettings(nats_url=site.url, nats_creds=path), name="bob")
        await bob.request(RevokeUser(user=site.admin, reason="stolen"))
    site.lose_database()
    async with site.access():  # with the old key, which only the server knows as revoked
        assert "was revoked, so it is not added again" in caplog.text
        assert (await bob.request(ListUsers())).users == ()
    site.layout.prepare()
    after = read_creds(site.layout.creds(ADMIN).read_text())
    assert after.who == before.who
    assert after.public_key != before.public_key
    async with site.access():
        [found] = (await bob.request(ListUsers())).users
        assert (found.user, found.public_key, found.revoked_at) == (site.admin, after.public_key, None)
    await bob.close()


async def test_an_event_names_the_person_who_caused_it(site: Site) -> None:
    async with site.access(), site.sent_by_admin() as client:
        await client.request(AddUser(user="alice", role=Role.VIEWER, public_key=public_key(new_user_seed())))
        found: dict[str, str | None] = {}

        async def read() -> bool:
            async for sequence, _event in client.recorded(UserAdded):
                message = await client.js.get_msg("EVENTS", seq=sequence, direct=True)
                envelope = Envelope.from_headers(message.headers)
                found[str(envelope.subject)] = envelope.actor
            return len(found) == 2

        async with asyncio.timeout(20):
            while not await read():  # noqa: ASYNC110 (a relay in another task: nothing to wait on)
                await asyncio.sleep(0.05)
    assert found == {site.admin: None, "alice": f"person:{site.admin}"}  # nobody asked for the first admin


async def test_a_person_renews_their_own_credentials_with_the_same_key(site: Site) -> None:
    path = site.folder / "alice.creds"
    async with site.access(), site.sent_by_admin() as admin:
        seed = new_user_seed()
        await admin.request(AddUser(user="alice", role=Role.VIEWER, public_key=public_key(seed)))
        soon = datetime.now(UTC) + timedelta(days=3)
        path.write_text(site.layout.authority().person_creds(person("alice", Role.VIEWER), soon, seed))
        (item,) = (one for one in (await site.cli(path)("attention", "--json")).json if one["kind"] == "credentials")
        assert item["fix"] == "slmops user renew"
        renewed = await site.cli(path)("user", "renew", "--json")
        assert renewed.exit_code == 0, renewed.err
        after = read_creds(path.read_text())
        assert (after.public_key, after.who) == (public_key(seed), person("alice", Role.VIEWER))
        assert after.until and after.until > soon + timedelta(days=80)
        assert [one for one in (await site.cli(path)("attention", "--json")).json if one["kind"] == "credentials"] == []


async def test_a_folder_of_the_release_before_gets_an_admin_and_the_old_credentials_are_refused(tmp_path: Path) -> None:
    before = Authority.generate()
    kept = ("operator", "system", "account", "edge", "enrolment", "services", "gateways")
    layout = Layout(tmp_path / "data")
    layout.keys.mkdir(parents=True)
    old = before.user_creds("console", Permissions(("cmd.>", "slmops.>"), ("_INBOX.>",)))
    layout.creds(ADMIN).write_text(old)
    (layout.keys / "nats-authority.json").write_text(json.dumps({name: getattr(before, name) for name in kept}))
    site = new_site(tmp_path)
    (tmp_path / "old.creds").write_text(old)
    with await asyncio.to_thread(_entered, site):
        shown = (await site.cli()("whoami", "--json")).json
        assert (shown["role"], shown["user"]) == ("admin", site.admin)
        with pytest.raises(CredentialsRefused):
            await BusClient.connect(BusSettings(nats_url=site.url, nats_creds=tmp_path / "old.creds"), name="old")
        # A gateway of the release before keeps its access.
        signing = f"{before.gateways}\n{public_key(before.edge)}\n"
        seed = new_user_seed()
        gateway = RawCredentials(creds_text(gateway_jwt(signing, public_key(seed), "gw-1", "edge-chat"), seed))
        async with connected(site.url, gateway, b"_INBOX_gw-1"):
            pass
    first = layout.creds(ADMIN).read_text()
    layout.prepare()
    assert read_creds(layout.creds(ADMIN).read_text()).public_key == read_creds(first).public_key


async def test_a_command_for_an_access_service_that_does_not_run_says_so_at_once(site: Site) -> None:
    async with site.sent_by_admin() as admin, asyncio.timeout(10):
        with pytest.raises(Unreachable, match="the access service is not running"):
            await admin.request(RevokeUser(user="alice"))
