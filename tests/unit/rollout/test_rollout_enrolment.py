"""Enrolment: a gateway with the right token gets a credential for its own key, and not for another gateway's id."""

from __future__ import annotations

import base64
import json
from datetime import timedelta
from pathlib import Path

import pytest
from unit.rollout.rollout_examples import T0

from slmops.contracts.commands import EnrolGateway, ListGateways
from slmops.contracts.errors import AlreadyExists, Denied, InvalidMessage
from slmops.contracts.events import GatewayEnrolled
from slmops.kit.bus.nats_auth import Authority, new_user_seed, public_key
from slmops.kit.bus.service_bus import Bus
from slmops.kit.journal import Journal
from slmops.kit.settings import BusSettings
from slmops.rollout.enrolment import Enrolment
from slmops.rollout.handlers import Handlers
from slmops.rollout.reconcile import Reconciler
from slmops.rollout.signing import PlanSigner
from slmops.rollout.store import MIGRATIONS, project, schema

TOKEN = "the-token-of-this-site"


class Service:
    """The handlers on a separate journal. Enrolment needs no broker."""

    def __init__(self, folder: Path) -> None:
        self.database = folder / "rollout.db"
        (folder / "token").write_text(TOKEN + "\n")
        (folder / "seed").write_text(Authority.generate().gateway_signing_key)
        self.journal = Journal(
            f"sqlite:///{self.database}", service="rollout", metadata=schema(), migrations=MIGRATIONS, project=project
        )
        self.credentials = Enrolment(folder / "token", folder / "seed")
        reconciler = Reconciler(
            self.journal,
            Bus("rollout", BusSettings()),
            PlanSigner(folder / "plan.pem"),
            lambda: T0,
            timedelta(seconds=1),
        )

        async def enrolment_of(_gateway_id: str) -> GatewayEnrolled | None:
            return None

        self.handlers = Handlers(self.journal, reconciler, self.credentials, enrolment_of, lambda: T0)

    async def open(self) -> Handlers:
        await self.journal.open()
        await self.credentials.open()
        return self.handlers


def command(key: str, token: str = TOKEN, gateway_id: str = "gw-1", blueprint: str = "edge-chat") -> EnrolGateway:
    return EnrolGateway(
        gateway_id=gateway_id, blueprint=blueprint, labels={"ring": "canary"}, public_key=key, token=token
    )


def claims(jwt: str) -> dict[str, object]:
    part = jwt.split(".")[1]
    return dict(json.loads(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4))))


@pytest.fixture
def service(tmp_path: Path) -> Service:
    return Service(tmp_path)


@pytest.fixture
def key() -> str:
    return public_key(new_user_seed())


async def test_the_credential_is_for_the_gateways_own_key(service: Service, key: str) -> None:
    handlers = await service.open()
    answer = await handlers.enrol(command(key))
    found = claims(answer.jwt)
    assert (found["sub"], found["name"]) == (key, "gw-1")
    [view] = (await handlers.list_gateways(ListGateways())).gateways
    assert (view.gateway_id, view.labels, view.phase, view.last_seen) == ("gw-1", {"ring": "canary"}, "idle", T0)
    assert view.desired_because == {"release": "the blueprint edge-chat has not been applied"}


async def test_enrolling_again_with_the_same_key_gives_a_credential_and_no_second_event(
    service: Service, key: str
) -> None:
    handlers = await service.open()
    for _ in range(2):
        assert claims((await handlers.enrol(command(key))).jwt)["sub"] == key
    assert [recorded.envelope.type for recorded in await service.journal.outbox()] == ["slmops.gateway.enrolled.v1"]


async def test_another_key_under_the_same_id_is_denied(service: Service, key: str) -> None:
    handlers = await service.open()
    await handlers.enrol(command(key))
    with pytest.raises(Denied, match="another key"):
        await handlers.enrol(command(public_key(new_user_seed())))


async def test_a_gateway_cannot_move_itself_to_another_blueprint(service: Service, key: str) -> None:
    handlers = await service.open()
    await handlers.enrol(command(key))
    with pytest.raises(AlreadyExists, match="edge-chat"):
        await handlers.enrol(command(key, blueprint="kiosk"))


@pytest.mark.parametrize("wrong", ["x", TOKEN[:-1], TOKEN + "x", TOKEN.upper(), "ü"])
async def test_a_wrong_token_is_denied_and_stores_nothing(service: Service, key: str, wrong: str) -> None:
    handlers = await service.open()
    with pytest.raises(Denied) as refusal:
        await handlers.enrol(command(key, token=wrong))
    assert wrong not in str(refusal.value) or len(wrong) == 1
    assert await service.journal.outbox() == []
    assert (await handlers.list_gateways(ListGateways())).gateways == ()


async def test_the_token_is_nowhere_in_the_database(service: Service, key: str) -> None:
    handlers = await service.open()
    await handlers.enrol(command(key))
    await service.journal.close()
    stored = b"".join(path.read_bytes() for path in service.database.parent.glob("rollout.db*"))
    assert b"gw-1" in stored
    assert TOKEN.encode() not in stored


async def test_an_invalid_public_key_is_rejected_and_stores_nothing(service: Service, key: str) -> None:
    handlers = await service.open()
    forged = key[:-1] + ("A" if key[-1] != "A" else "B")
    with pytest.raises(InvalidMessage):
        await handlers.enrol(command(forged))
    assert await service.journal.outbox() == []


@pytest.mark.parametrize("text", [None, "", " \n"])
async def test_a_missing_or_empty_token_file_stops_the_service(tmp_path: Path, text: str | None) -> None:
    (tmp_path / "seed").write_text("seed")
    if text is not None:
        (tmp_path / "token").write_text(text)
    with pytest.raises(InvalidMessage) as refusal:
        await Enrolment(tmp_path / "token", tmp_path / "seed").open()
    assert "SLMOPS_ENROLMENT_TOKEN" in (refusal.value.fix or "")
    with pytest.raises(Denied):
        Enrolment(tmp_path / "token", tmp_path / "seed").sign(command("U" + "A" * 55))
