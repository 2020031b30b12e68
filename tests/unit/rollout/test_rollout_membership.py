"""Who belongs to the fleet: enrolment, renewal, revocation, removal, re-enrolment and moves, decided without I/O."""

from __future__ import annotations

from datetime import datetime, timedelta
from functools import reduce
from itertools import product

import pytest
from unit.rollout.rollout_examples import T0, at

from slmops.contracts.commands import EnrolGateway, ReenrolGateway
from slmops.contracts.errors import (
    AlreadyExists,
    CredentialRevoked,
    Denied,
    IllegalTransition,
    NotFound,
    NotReady,
)
from slmops.contracts.events import Event, GatewayEnrolled, GatewayMoved, GatewayRemoved, GatewayRevoked
from slmops.rollout.domain.membership import (
    TRANSITIONS,
    LastCredential,
    Membership,
    State,
    Trigger,
    allow_reenrolment,
    check_not_revoked,
    enrol,
    evolve,
    move,
    next_state,
    remove,
    renew,
    revoke,
)

K1, K2, K3 = ("U" + letter * 55 for letter in "ABC")
LIFE = timedelta(days=30)
EVER = LastCredential()
DAY = 24 * 3600


class Device:
    """Decides and remembers, as the service does in one transaction."""

    def __init__(self) -> None:
        self.member = Membership("gw-1")

    def _then(self, events: list[Event]) -> list[Event]:
        self.member = reduce(evolve, events, self.member)
        return events

    def enrol(self, key: str = K1, blueprint: str = "edge-chat", seconds: float = 0) -> list[Event]:
        command = EnrolGateway(gateway_id="gw-1", blueprint=blueprint, public_key=key, token="t")
        return self._then(enrol(self.member, command, at(seconds), at(seconds) + LIFE, EVER))

    def renew(self, key: str = K1, seconds: float = 0) -> list[Event]:
        return self._then(renew(self.member, key, at(seconds), at(seconds) + LIFE))

    def revoke(self, seconds: float = 0, reason: str = "stolen", last: LastCredential = EVER) -> list[Event]:
        return self._then(revoke(self.member, reason, last, at(seconds)))

    def remove(self, seconds: float = 0) -> list[Event]:
        return self._then(remove(self.member, "scrapped", EVER, at(seconds)))

    def allow(self, seconds: float = 0, within: float = DAY, same_key: bool = False) -> list[Event]:
        command = ReenrolGateway(gateway_id="gw-1", within_s=within, same_key=same_key)
        return self._then(allow_reenrolment(self.member, command, at(seconds)))

    def move(self, blueprint: str, seconds: float = 0) -> list[Event]:
        return self._then(move(self.member, blueprint, at(seconds)))


@pytest.fixture
def device() -> Device:
    device = Device()
    device.enrol()
    return device


@pytest.mark.parametrize(("state", "trigger"), [pair for pair in product(State, Trigger) if pair not in TRANSITIONS])
def test_a_pair_that_is_not_in_the_table_is_refused_by_name(state: State, trigger: Trigger) -> None:
    with pytest.raises(IllegalTransition) as refusal:
        next_state(state, trigger)
    assert state in refusal.value.what
    assert trigger in refusal.value.what


def test_every_state_is_reached_and_every_trigger_used() -> None:
    assert set(TRANSITIONS.values()) == set(State) - {State.UNKNOWN}
    assert {trigger for _, trigger in TRANSITIONS} == set(Trigger)


def test_the_first_enrolment_says_when_its_credential_expires(device: Device) -> None:
    known = device.member.enrolled
    assert known == GatewayEnrolled(
        gateway_id="gw-1", blueprint="edge-chat", public_key=K1, enrolment=1, expires_at=T0 + LIFE, at=T0
    )
    assert device.enrol() == [], "a retry"


# ---- a device that was set up again -----------------------------------------------------------------------


def test_another_key_needs_consent_and_the_refusal_names_the_command(device: Device) -> None:
    with pytest.raises(Denied, match="another key") as refusal:
        device.enrol(K2)
    assert "slmops gateway re-enrol gw-1" in (refusal.value.fix or "")


def test_with_consent_the_new_key_revokes_the_old_one(device: Device) -> None:
    device.allow(seconds=10)
    gone, new = device.enrol(K2, seconds=20)
    assert isinstance(gone, GatewayRevoked)
    assert (gone.public_key, gone.revoked_at) == (K1, at(20))
    assert isinstance(new, GatewayEnrolled)
    assert (new.public_key, new.enrolment, new.moved_from) == (K2, 2, None)
    with pytest.raises(CredentialRevoked):
        device.renew(K1, 30)
    with pytest.raises(CredentialRevoked):
        device.enrol(K1, seconds=30)


def test_a_consent_is_for_one_key(device: Device) -> None:
    device.allow()
    device.enrol(K2)
    with pytest.raises(Denied, match="another key"):
        device.enrol(K3, seconds=1)
    assert device.enrol(K2, seconds=1) == [], "the answer was lost"


def test_a_consent_ends(device: Device) -> None:
    device.allow(within=60)
    with pytest.raises(Denied):
        device.enrol(K2, seconds=60)
    device.allow(seconds=61, within=60)
    assert device.enrol(K2, seconds=120)


def test_until_then_the_enrolled_key_is_valid(device: Device) -> None:
    device.allow()
    assert device.renew(K1, 5) == []


# ---- revoked ----------------------------------------------------------------------------------------------


def test_a_revoked_key_is_refused_by_name(device: Device) -> None:
    [event] = device.revoke(5, last=LastCredential(at(3), at(900)))
    assert event == GatewayRevoked(
        gateway_id="gw-1", public_key=K1, revoked_at=at(5), reason="stolen", expires_at=at(900)
    )
    assert device.revoke(6) == [], "a retry"
    for attempt in (device.renew, device.enrol):
        with pytest.raises(CredentialRevoked, match="revoked at 2030-01-01 00:00 UTC: stolen") as refusal:
            attempt(K1, seconds=9)
        assert "re-enrol gw-1 --same-key" in (refusal.value.fix or "")


def test_a_revocation_is_not_before_the_newest_credential(device: Device) -> None:
    """Another process of the service, with a clock that is ahead, may have issued it."""
    [event] = device.revoke(5, last=LastCredential(at(8), None))
    assert isinstance(event, GatewayRevoked)
    assert event.revoked_at == at(8)


def test_a_revoked_key_does_not_return_by_a_consent_for_a_new_one(device: Device) -> None:
    """The stolen device has the token too, and would be first."""
    device.revoke(5)
    device.allow(6)
    for attempt in (device.renew, device.enrol):
        with pytest.raises(CredentialRevoked):
            attempt(K1, seconds=9)
    [new] = device.enrol(K2, seconds=9)
    assert isinstance(new, GatewayEnrolled), "the old key is revoked already"


def test_a_key_that_was_revoked_by_mistake_returns_without_a_token(device: Device) -> None:
    device.revoke(5)
    device.allow(5, same_key=True)
    with pytest.raises(NotReady):
        device.renew(K1, seconds=5)
    with pytest.raises(Denied, match="another key"):
        device.enrol(K2, seconds=6)
    [back] = device.renew(K1, seconds=6)
    assert isinstance(back, GatewayEnrolled)
    assert (back.enrolment, back.public_key) == (2, K1)
    assert device.renew(K1, seconds=7) == []


def test_a_key_that_is_not_revoked_needs_no_consent(device: Device) -> None:
    with pytest.raises(IllegalTransition, match="not revoked"):
        device.allow(same_key=True)


# ---- removed ----------------------------------------------------------------------------------------------


def test_a_removed_gateway_is_revoked_first_and_its_id_is_free(device: Device) -> None:
    assert [type(event) for event in device.remove(5)] == [GatewayRevoked, GatewayRemoved]
    assert device.remove(6) == [], "a retry"
    with pytest.raises(CredentialRevoked):
        device.enrol(K1, seconds=9)
    with pytest.raises(CredentialRevoked):
        device.renew(K1, seconds=9)
    [new] = device.enrol(K2, blueprint="kiosk", seconds=9)
    assert isinstance(new, GatewayEnrolled)
    assert (new.enrolment, new.blueprint, device.member.earlier) == (2, "kiosk", {"kiosk"})


def test_removing_a_revoked_gateway_revokes_nothing_again(device: Device) -> None:
    device.revoke(5)
    assert [type(event) for event in device.remove(6)] == [GatewayRemoved]


# ---- moved ------------------------------------------------------------------------------------------------


def test_a_moved_gateway_gets_the_new_blueprint_at_its_next_renewal(device: Device) -> None:
    assert device.move("kiosk", 5) == [
        GatewayMoved(gateway_id="gw-1", previous="edge-chat", blueprint="kiosk", at=at(5))
    ]
    assert device.move("kiosk", 6) == [], "a retry"
    assert device.member.state is State.MOVING
    [event] = device.renew(K1, 9)
    assert isinstance(event, GatewayEnrolled)
    assert (event.blueprint, event.moved_from, event.enrolment) == ("kiosk", "edge-chat", 2)
    assert device.renew(K1, 10) == []


def test_a_move_can_be_taken_back_before_the_gateway_followed(device: Device) -> None:
    device.move("kiosk")
    device.move("edge-chat")
    assert device.member.state is State.ENROLLED
    assert device.renew(K1, 9) == []


def test_the_settings_of_a_moved_device_may_still_name_the_earlier_blueprint(device: Device) -> None:
    device.move("kiosk")
    [event] = device.enrol(K1, blueprint="edge-chat", seconds=9)
    assert isinstance(event, GatewayEnrolled)
    assert event.blueprint == "kiosk"
    device.allow()
    *_, again = device.enrol(K2, blueprint="edge-chat", seconds=10)
    assert isinstance(again, GatewayEnrolled)
    assert (again.blueprint, again.moved_from) == ("kiosk", None)


def test_a_device_does_not_choose_another_blueprint_by_itself(device: Device) -> None:
    device.allow()
    with pytest.raises(AlreadyExists, match="edge-chat, not kiosk") as refusal:
        device.enrol(K2, blueprint="kiosk")
    assert "slmops gateway move gw-1 --blueprint kiosk" in (refusal.value.fix or "")


def test_a_revoked_gateway_is_not_moved(device: Device) -> None:
    device.revoke()
    with pytest.raises(IllegalTransition):
        device.move("kiosk")


# ---- unknown ----------------------------------------------------------------------------------------------


def test_of_an_unknown_gateway_nothing_can_be_changed() -> None:
    device = Device()
    for attempt in (device.renew, device.revoke, device.remove, device.allow, lambda: device.move("kiosk")):
        with pytest.raises(NotFound):
            attempt()


def test_times_are_those_of_the_decision(device: Device) -> None:
    [event] = device.revoke(1.9)
    assert isinstance(event, GatewayRevoked)
    assert event.revoked_at == datetime.fromtimestamp(int(at(1.9).timestamp()), T0.tzinfo)


def test_a_younger_database_does_not_take_a_revoked_key_back(device: Device) -> None:
    known = device.member.enrolled
    assert known is not None
    [gone] = device.revoke(5)
    assert isinstance(gone, GatewayRevoked)
    with pytest.raises(CredentialRevoked, match="stolen"):
        check_not_revoked(known, gone)
    check_not_revoked(known, None)
    check_not_revoked(known.model_copy(update={"at": at(6)}), gone)
