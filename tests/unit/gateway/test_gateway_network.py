"""A gateway connects again when its connection is closed for good, and renews its credential before it expires."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from slmops.contracts.errors import CredentialRevoked, CredentialsRefused, Unreachable
from slmops.contracts.plan import Identity
from slmops.gateway import identity, network, renewal
from slmops.gateway.identity import Credentials
from slmops.gateway.network import Network
from slmops.kit.bus.nats_auth import Authority, GatewayClaims, gateway_jwt, new_user_seed, public_key
from slmops.kit.cancellation import cancel_and_wait

T0 = datetime(2030, 1, 1, tzinfo=UTC)
SEED, KEYS = new_user_seed(), Authority.generate().gateway_signing_key


def credentials(life: timedelta | None = timedelta(days=30), blueprint: str = "edge-chat") -> Credentials:
    expires_at = T0 + life if life else None
    jwt = gateway_jwt(KEYS, public_key(SEED), "gw-1", blueprint, issued_at=T0, expires_at=expires_at)
    return Credentials(Identity(gateway_id="gw-1", blueprint=blueprint), SEED, jwt)


class Connection:
    clock_ahead: timedelta | None = None

    def __init__(self) -> None:
        self.closed = asyncio.Event()

    async def close(self) -> None:
        self.closed.set()


class Scene:
    """A network whose requests and connections a test decides, and a clock that it moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        settings: Any = type("S", (), {"blueprint": "edge-chat"})()
        self.now = T0
        self.connections: list[Connection] = []
        self.worked: list[Any] = []
        self.stopped = 0
        self.adopted: list[Credentials] = []
        self.pauses: list[float] = []
        self.known = credentials()
        self.renews: Callable[[], Credentials] = lambda: self.known
        self.readmits: Callable[[], Credentials] = lambda: self.known
        self.refused_connections = 0
        self.network = Network(settings, lambda client: [self._work(client)], self.adopted.append)
        real_sleep = asyncio.sleep

        async def sleep(seconds: float) -> None:
            self.pauses.append(seconds)
            await real_sleep(0)

        async def connect(_credentials: Credentials, _settings: Any) -> Any:
            if self.refused_connections:
                self.refused_connections -= 1
                raise CredentialsRefused("NATS rejected the credentials")
            self.connections.append(Connection())
            return self.connections[-1]

        async def enrol(_settings: Any) -> Credentials:
            return self.known

        async def renew(_settings: Any, _client: Any) -> Credentials:
            return self.renews()

        async def readmit(_settings: Any) -> Credentials:
            return self.readmits()

        monkeypatch.setattr(Credentials, "connect", connect)
        monkeypatch.setattr(identity, "enrol", enrol)
        monkeypatch.setattr(identity, "renew", renew)
        monkeypatch.setattr(identity, "readmit", readmit)
        monkeypatch.setattr(network, "utc_now", lambda: self.now)
        monkeypatch.setattr(network.asyncio, "sleep", sleep)
        monkeypatch.setattr(network, "_LOOK_EVERY_S", 0.001)

    async def _work(self, client: Any) -> None:
        self.worked.append(client)
        try:
            await asyncio.Event().wait()
        finally:
            self.stopped += 1

    async def until(self, true: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not true():  # noqa: ASYNC110 (other tasks make it true)
                await asyncio.sleep(0)


@pytest.fixture
async def scene(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Scene]:
    scene = Scene(monkeypatch)
    running = asyncio.create_task(scene.network.run())
    await scene.until(lambda: len(scene.worked) == 1)
    yield scene
    await cancel_and_wait([running])


async def test_it_connects_again_after_its_connection_was_closed_for_good(scene: Scene) -> None:
    scene.connections[0].closed.set()
    await scene.until(lambda: len(scene.worked) == 2)
    assert (scene.worked, scene.stopped) == (scene.connections, 1)
    assert scene.network.client is scene.connections[1]  # type: ignore[comparison-overlap]


async def test_it_renews_before_its_credential_expires_and_connects_with_the_new_one(scene: Scene) -> None:
    new = credentials(timedelta(days=50))
    scene.renews = lambda: new
    scene.now = T0 + timedelta(days=17, hours=23)
    await scene.until(lambda: scene.pauses.count(0) > 200)
    assert len(scene.connections) == 1, "not before three fifths of its life"
    scene.now = T0 + timedelta(days=22)
    await scene.until(lambda: len(scene.worked) == 2)
    assert (scene.stopped, scene.connections[0].closed.is_set()) == (1, True)
    assert scene.adopted[-1] is new


async def test_a_renewal_that_fails_is_tried_again(scene: Scene) -> None:
    failures = iter([Unreachable("no rollout service"), Unreachable("still none")])

    def renew() -> Credentials:
        if (error := next(failures, None)) is not None:
            raise error
        return credentials(timedelta(days=50))

    scene.renews = renew
    scene.now = T0 + timedelta(days=23)
    await scene.until(lambda: len(scene.worked) == 2)
    assert len([pause for pause in scene.pauses if 45 <= pause <= 75]) == 2
    assert scene.stopped == 1, "it stayed connected meanwhile"


async def test_an_expired_credential_is_replaced_before_it_connects(scene: Scene) -> None:
    new = credentials(timedelta(days=400))
    scene.readmits = lambda: new
    scene.refused_connections = 1
    scene.connections[0].closed.set()  # the server: user authentication expired
    await scene.until(lambda: len(scene.worked) == 2)
    assert scene.adopted[-1] is new


async def test_a_revoked_gateway_says_so_and_asks_ever_more_seldom(scene: Scene) -> None:
    def readmit() -> Credentials:
        raise CredentialRevoked("the key of gw-1 was revoked at 2030-01-01 00:00 UTC: stolen")

    scene.readmits = readmit
    scene.refused_connections = 1000
    scene.connections[0].closed.set()
    await scene.until(lambda: len([pause for pause in scene.pauses if pause > 2400]) >= 3)
    pauses = [pause for pause in scene.pauses if pause >= 40]
    assert 45 <= pauses[0] <= 75
    assert max(pauses) <= 4500
    assert scene.network.refused is not None
    assert (scene.network.refused.code, "stolen" in scene.network.refused.what) == ("credential_revoked", True)
    scene.refused_connections = 0
    await scene.until(lambda: len(scene.worked) == 2)
    assert scene.network.refused is None


async def test_a_move_is_followed_at_once_and_a_wrong_answer_is_not_repeated_hotly(scene: Scene) -> None:
    asked = 0

    def renew() -> Credentials:
        nonlocal asked
        asked += 1
        return credentials(timedelta(days=50), "kiosk" if asked > 1 else "edge-chat")

    scene.renews = renew
    scene.network.belongs_to("edge-chat")
    assert not scene.network._renew_now.is_set()
    scene.network.belongs_to("kiosk")
    await scene.until(lambda: len(scene.worked) == 2)
    scene.network.belongs_to("kiosk")
    await scene.until(lambda: len(scene.worked) == 3)
    assert scene.adopted[-1].identity.blueprint == "kiosk"
    assert [pause for pause in scene.pauses if 25 < pause <= 30], "the second renewal waited"


# ---- when: pure -------------------------------------------------------------------------------------------


def claims(gateway_id: str, life: timedelta | None = timedelta(days=30)) -> GatewayClaims:
    return GatewayClaims(gateway_id, "U" + "A" * 55, "edge-chat", 1, T0, T0 + life if life else None)


def test_a_fleet_that_enrolled_at_once_does_not_renew_at_once() -> None:
    days = [(renewal.due(claims(f"gw-{n}"), T0) - T0) / timedelta(days=1) for n in range(10_000)]
    assert 18 <= min(days) < 18.1 < 21.9 < max(days) <= 22
    assert 19.9 < sum(days) / len(days) < 20.1, "two thirds"
    hours = [sum(1 for day in days if int(day * 24) == hour) for hour in range(18 * 24, 22 * 24)]
    assert max(hours) < 2 * len(days) / len(hours)


def test_it_is_the_same_time_after_every_restart() -> None:
    assert renewal.due(claims("gw-1"), T0) == renewal.due(claims("gw-1"), T0 + timedelta(days=3))


def test_a_credential_of_an_earlier_release_is_renewed_soon() -> None:
    waits = [renewal.due(claims(f"gw-{n}", None), T0) - T0 for n in range(1000)]
    assert timedelta() <= min(waits) < max(waits) <= timedelta(minutes=10)


# ---- the stored credential --------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "not a jwt", "a.b.c", credentials().jwt[:40]])
def test_a_stored_credential_that_is_cut_off_is_not_used(tmp_path: Path, text: str) -> None:
    (tmp_path / "user.jwt").write_text(text)
    settings: Any = type("S", (), {"data_dir": tmp_path, "gateway_id": "gw-1"})()
    assert identity.stored(settings) is None


def test_the_credential_says_to_which_blueprint_the_gateway_belongs(tmp_path: Path) -> None:
    (tmp_path / "nkey.seed").write_text(SEED)
    (tmp_path / "user.jwt").write_text(credentials(blueprint="kiosk").jwt)
    values = {"data_dir": tmp_path, "gateway_id": "gw-1", "blueprint": "edge-chat", "labels": {"ring": "fleet"}}
    settings: Any = type("S", (), values)()
    assert identity.own_identity(settings, identity.stored(settings)) == Identity(
        gateway_id="gw-1", blueprint="kiosk", labels={"ring": "fleet"}
    )
    (tmp_path / "nkey.seed").write_text(new_user_seed())
    assert identity.own_identity(settings, identity.stored(settings)).blueprint == "edge-chat", (
        "those of another key do not count"
    )
