"""Enrolment: a gateway with the right token gets a credential for its own key, and not for another gateway's id."""

from __future__ import annotations

import asyncio
import base64
import json
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from unit.rollout.rollout_examples import T0, report

from slmops.contracts.commands import (
    EnrolGateway,
    GatewayView,
    ListGateways,
    RemoveGateway,
    RenewCredential,
    RenewExpiredCredential,
    RevokeGateway,
    Standing,
)
from slmops.contracts.errors import AlreadyExists, CredentialRevoked, Denied, InvalidMessage, NotFound, NotReady
from slmops.contracts.events import GatewayEnrolled, GatewayRevoked, UpdatePhase
from slmops.kit.bus.batches import Received
from slmops.kit.bus.nats_auth import Authority, GatewayClaims, new_user_seed, public_key, sign
from slmops.kit.bus.service_bus import Bus, MessageContext
from slmops.kit.journal import Journal
from slmops.kit.settings import BusSettings
from slmops.rollout.enrolment import Enrolment
from slmops.rollout.handlers import Handlers
from slmops.rollout.membership import MembershipHandlers
from slmops.rollout.overlays import Overlays
from slmops.rollout.queries import Queries
from slmops.rollout.reconcile import Reconciler
from slmops.rollout.signing import PlanSigner
from slmops.rollout.store import MIGRATIONS, project, schema

TOKEN = "the-token-of-this-site"


class NoBus(Overlays):
    async def tell(self) -> None:
        """The tests of the real bus are elsewhere."""


class Service:
    """The handlers on a separate journal. Enrolment needs no broker."""

    def __init__(self, folder: Path) -> None:
        self.database = folder / "rollout.db"
        (folder / "token").write_text(TOKEN + "\n")
        (folder / "seed").write_text(Authority.generate().gateway_signing_key)
        self.journal = Journal(
            f"sqlite:///{self.database}", service="rollout", metadata=schema(), migrations=MIGRATIONS, project=project
        )
        self.now = T0
        self.credentials = Enrolment(folder / "token", folder / "seed", timedelta(days=30))
        bus = Bus("rollout", BusSettings())
        reconciler = Reconciler(
            self.journal,
            bus,
            PlanSigner(folder / "plan.pem"),
            lambda: self.now,
            timedelta(seconds=1),
        )
        self.overlays = NoBus(self.journal, lambda: bus.client, timedelta(seconds=1))
        self.on_the_bus: GatewayEnrolled | None = None

        async def enrolment_of(_gateway_id: str) -> GatewayEnrolled | None:
            return self.on_the_bus

        def clock() -> datetime:
            return self.now

        self.queries = Handlers(self.journal, reconciler, enrolment_of, clock)
        self.handlers = MembershipHandlers(
            self.journal, reconciler, self.overlays, self.credentials, enrolment_of, clock
        )

    async def open(self) -> MembershipHandlers:
        await self.journal.open()
        await self.credentials.open()
        return self.handlers

    async def gateways(self, **query: Any) -> list[GatewayView]:
        listing = Queries(self.journal, lambda: self.now)
        return list((await listing.list_gateways(ListGateways(**query))).gateways)


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
    [view] = await service.gateways()
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
    assert await service.gateways() == []


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
        await Enrolment(tmp_path / "token", tmp_path / "seed", timedelta(days=30)).open()
    assert "SLMOPS_ENROLMENT_TOKEN" in (refusal.value.fix or "")
    with pytest.raises(Denied):
        Enrolment(tmp_path / "token", tmp_path / "seed", timedelta(days=30)).check(command("U" + "A" * 55))


# ---- renewal ----------------------------------------------------------------------------------------------


def statement(seed: str, at: datetime, gateway_id: str = "gw-1", key: str | None = None) -> RenewExpiredCredential:
    bare = RenewExpiredCredential(gateway_id=gateway_id, public_key=key or public_key(seed), signed_at=at)
    return bare.model_copy(update={"signature": base64.b64encode(sign(seed, bare.statement)).decode()})


async def test_a_credential_expires_and_is_renewed_for_the_same_key(service: Service, key: str) -> None:
    handlers = await service.open()
    first = GatewayClaims.of((await handlers.enrol(command(key))).jwt)
    assert (first.issued_at, first.expires_at, first.enrolment) == (T0, T0 + timedelta(days=30), 1)
    service.now += timedelta(days=20)
    second = GatewayClaims.of((await handlers.renew(RenewCredential(gateway_id="gw-1", public_key=key))).jwt)
    assert (second.public_key, second.blueprint) == (key, "edge-chat")
    assert second.expires_at == T0 + timedelta(days=50)
    [view] = await service.gateways()
    assert view.credential_expires_at == second.expires_at
    assert len(await service.journal.outbox()) == 1, "a renewal is no event"


async def test_a_signature_of_the_key_renews_without_a_token(service: Service) -> None:
    handlers = await service.open()
    seed = new_user_seed()
    await handlers.enrol(command(public_key(seed)))
    service.now += timedelta(days=90)
    answer = await handlers.renew_expired(statement(seed, service.now - timedelta(minutes=4)))
    assert GatewayClaims.of(answer.jwt).issued_at == service.now


@pytest.mark.parametrize("minutes", [-6, 6])
async def test_a_statement_that_is_old_or_ahead_is_not_followed_and_not_throttled(
    service: Service, minutes: int
) -> None:
    handlers = await service.open()
    seed = new_user_seed()
    await handlers.enrol(command(public_key(seed)))
    with pytest.raises(NotReady, match="s old"):
        await handlers.renew_expired(statement(seed, T0 + timedelta(minutes=minutes)))


async def test_only_the_holder_of_the_key_can_sign_for_it(service: Service, key: str) -> None:
    handlers = await service.open()
    await handlers.enrol(command(key))
    other = new_user_seed()
    forged = statement(other, T0, key=key)
    moved = statement(other, T0).model_copy(update={"gateway_id": "gw-2"})
    for wrong in (forged, moved, statement(other, T0).model_copy(update={"signature": "no base64!"})):
        with pytest.raises(Denied, match="not signed"):
            await handlers.renew_expired(wrong)
    with pytest.raises(Denied, match="another key"):
        await handlers.renew_expired(statement(other, T0))
    with pytest.raises(NotFound):
        await handlers.renew_expired(statement(other, T0, gateway_id="gw-7"))


async def test_a_revoked_gateway_is_listed_and_gets_nothing(service: Service, key: str) -> None:
    handlers = await service.open()
    await handlers.enrol(command(key))
    service.now += timedelta(days=1)
    view = await handlers.revoke(RevokeGateway(gateway_id="gw-1", reason="stolen"))
    assert (view.standing, view.revoked_because, view.desired) == (Standing.REVOKED, "stolen", None)
    assert view == await handlers.revoke(RevokeGateway(gateway_id="gw-1", reason="again")), "a retry"
    assert await service.gateways(standing=Standing.REVOKED) == [view]
    assert await service.gateways(standing=Standing.ENROLLED) == []
    with pytest.raises(CredentialRevoked, match="stolen"):
        await handlers.renew(RenewCredential(gateway_id="gw-1", public_key=key))
    _, revoked = await service.journal.outbox()
    assert isinstance(revoked.event, GatewayRevoked)
    assert revoked.event.expires_at == T0 + timedelta(days=30)


async def test_the_revocation_of_a_key_with_an_endless_credential_never_ends(service: Service, key: str) -> None:
    """A gateway of an earlier release has one, and its renewal does not take it away."""
    handlers = await service.open()
    old = GatewayEnrolled(gateway_id="gw-1", blueprint="edge-chat", public_key=key, at=T0)
    await service.journal.transact(lambda unit: unit.append("gateway:gw-1", 0, [old]))
    await handlers.renew(RenewCredential(gateway_id="gw-1", public_key=key))
    await handlers.revoke(RevokeGateway(gateway_id="gw-1"))
    *_, revoked = await service.journal.outbox()
    assert isinstance(revoked.event, GatewayRevoked)
    assert revoked.event.expires_at is None


async def test_a_removed_gateway_is_not_listed_and_its_key_stays_revoked(service: Service, key: str) -> None:
    handlers = await service.open()
    await handlers.enrol(command(key))
    gone = await handlers.remove(RemoveGateway(gateway_id="gw-1"))
    assert gone == await handlers.remove(RemoveGateway(gateway_id="gw-1")), "a retry"
    assert await service.gateways() == []
    with pytest.raises(CredentialRevoked):
        await handlers.enrol(command(key))
    assert (await handlers.enrol(command(public_key(new_user_seed()), blueprint="kiosk"))).blueprint == "kiosk"


async def test_a_younger_database_adopts_the_enrolment_that_the_bus_keeps(service: Service) -> None:
    """Otherwise the first who has the token would take over the id, and the numbers would start again."""
    handlers = await service.open()
    seed = new_user_seed()
    service.on_the_bus = GatewayEnrolled(
        gateway_id="gw-1", blueprint="kiosk", public_key=public_key(seed), enrolment=4, at=T0
    )
    with pytest.raises(Denied, match="another key"):
        await handlers.enrol(command(public_key(new_user_seed()), blueprint="kiosk"))
    claims = GatewayClaims.of((await handlers.renew_expired(statement(seed, T0))).jwt)
    assert (claims.enrolment, claims.blueprint) == (4, "kiosk")
    [view] = await service.gateways()
    assert (view.enrolment, view.blueprint) == (4, "kiosk")
    assert await service.journal.outbox() == []
    service.on_the_bus = None
    await handlers.renew(RenewCredential(gateway_id="gw-1", public_key=public_key(seed)))
    await handlers.revoke(RevokeGateway(gateway_id="gw-1"))
    with pytest.raises(CredentialRevoked):
        await handlers.renew(RenewCredential(gateway_id="gw-1", public_key=public_key(seed)))


async def test_a_late_report_does_not_bring_a_removed_gateway_back(service: Service, key: str) -> None:
    """Its enrolment is still on the bus for a moment, from which an unknown gateway is recorded."""
    handlers = await service.open()
    await handlers.enrol(command(key))
    [first] = await service.journal.outbox()
    assert isinstance(first.event, GatewayEnrolled)
    service.on_the_bus = first.event
    await handlers.remove(RemoveGateway(gateway_id="gw-1"))
    late = report("gw-1", UpdatePhase.IDLE, "1.0.0", 1)
    delivered = MessageContext("id", late.subject, None, asyncio.Event().wait, arrived_at=T0)  # type: ignore[arg-type]
    refused = await service.queries.on_gateway_reports([Received(late, delivered)])
    assert isinstance(refused[0], CredentialRevoked)
    assert "was removed" in refused[0].what
    assert await service.gateways() == []
