"""People and revoked keys, without a bus: who is added, renewed and revoked, and when a revoked key is forgotten."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import Connection, create_engine

from slmops.access import store
from slmops.access.domain import Person, add, record_first_admin, renew, replay, revoke, with_moved
from slmops.access.store import Holders
from slmops.contracts.commands import AddUser, RevokeUser
from slmops.contracts.errors import AlreadyExists, Denied, NotFound
from slmops.contracts.events import GatewayEnrolled, GatewayRevoked, UserAdded, UserRenewed, UserRevoked
from slmops.contracts.identity import LONGEST_CREDENTIAL_LIFE, Role

NOW = datetime(2026, 1, 2, tzinfo=UTC)
LATER = NOW + timedelta(days=90)
KEY, OTHER = "U" + "A" * 55, "U" + "B" * 55
ALICE = Person("alice", Role.OPERATOR, KEY, LATER)


def asked(**changes: Any) -> AddUser:
    return AddUser(**{"user": "alice", "role": Role.OPERATOR, "public_key": KEY, **changes})


def test_a_person_is_replayed_from_their_events() -> None:
    added = add(None, asked(), LATER, NOW)
    assert replay(added) == ALICE
    later = LATER + timedelta(days=1)
    events = [*added, *renew(ALICE, "alice", later, NOW)]
    found = replay(events)
    assert found and found.expires_at == later
    events += revoke(found, RevokeUser(user="alice"), 1, NOW)
    found = replay(events)
    assert found and not found.active(NOW)
    events += add(found, asked(role=Role.VIEWER, public_key=OTHER), LATER, NOW)
    assert replay(events) == Person("alice", Role.VIEWER, OTHER, LATER)


def test_the_same_addition_changes_nothing_and_another_one_is_refused() -> None:
    assert add(ALICE, asked(), LATER, NOW) == []
    for changes in ({"role": Role.ADMIN}, {"public_key": OTHER}):
        with pytest.raises(AlreadyExists, match="role operator"):
            add(ALICE, asked(**changes), LATER, NOW)
    assert add(ALICE, asked(public_key=OTHER), LATER + timedelta(days=90), LATER), "their credentials have expired"


def test_nobody_renews_what_was_never_given_or_taken_away() -> None:
    with pytest.raises(NotFound):
        renew(None, "alice", LATER, NOW)
    revoked = Person("alice", Role.OPERATOR, KEY, LATER, revoked=True)
    with pytest.raises(Denied):
        renew(revoked, "alice", LATER, NOW)
    assert revoke(revoked, RevokeUser(user="alice"), 1, NOW) == []
    with pytest.raises(NotFound):
        revoke(None, RevokeUser(user="alice"), 1, NOW)


def test_the_last_admin_stays() -> None:
    admin = Person("alice", Role.ADMIN, KEY, LATER)
    with pytest.raises(Denied, match="last admin"):
        revoke(admin, RevokeUser(user="alice"), 0, NOW)
    assert revoke(admin, RevokeUser(user="alice"), 1, NOW)
    assert revoke(ALICE, RevokeUser(user="alice"), 0, NOW)


def test_the_first_admin_holds_one_key() -> None:
    given = Person("alice", Role.ADMIN, KEY, LATER)
    assert [type(e) for e in record_first_admin(None, given, False, NOW)] == [UserAdded]
    assert record_first_admin(given, given, False, NOW) == []
    again = Person("alice", Role.ADMIN, KEY, LATER + timedelta(days=1))
    assert [type(e) for e in record_first_admin(given, again, False, NOW)] == [UserRenewed]
    # A lost key, and somebody else's name: what was given before is taken away.
    (gone, added) = record_first_admin(Person("alice", Role.VIEWER, OTHER, LATER), given, False, NOW)
    assert isinstance(gone, UserRevoked) and gone.public_key == OTHER
    assert isinstance(added, UserAdded) and added.role is Role.ADMIN


def test_a_revoked_key_of_the_first_admin_is_not_added_again() -> None:
    given = Person("alice", Role.ADMIN, KEY, LATER)
    for known, key_is_revoked in ((replace(given, revoked=True), False), (None, True)):
        with pytest.raises(Denied, match="was revoked") as refusal:
            record_first_admin(known, given, key_is_revoked, NOW)
        assert "slmops up" in (refusal.value.fix or "")
    added = record_first_admin(replace(given, revoked=True), replace(given, public_key=OTHER), False, NOW)
    assert [type(event) for event in added] == [UserAdded]


def test_moved_gateways_do_not_displace_revoked_keys() -> None:
    revoked, moved = {"UA": 5, "UB": 6}, {"UC": 9, "UB": 8, "UD": 7, "UA": 1}
    assert with_moved(revoked, moved, 100) == {"UA": 5, "UB": 8, "UC": 9, "UD": 7}
    assert with_moved(revoked, moved, 1) == {"UA": 5, "UB": 8, "UC": 9}, "the newest move has the room"
    assert with_moved(revoked, moved, 0) == {"UA": 5, "UB": 8}


@pytest.fixture
def connection() -> Any:
    engine = create_engine("sqlite://")
    store.schema().create_all(engine)
    with engine.begin() as connection:
        yield connection
    engine.dispose()


def gateway(**changes: Any) -> GatewayRevoked:
    return GatewayRevoked(**{"gateway_id": "gw-1", "public_key": KEY, "revoked_at": NOW, **changes})


def test_a_revoked_key_is_forgotten_when_its_credentials_have_expired_everywhere(connection: Connection) -> None:
    store.record_gateway(connection, gateway(expires_at=LATER))
    store.record_gateway(connection, gateway(public_key=OTHER))  # never expires
    seconds = int(NOW.timestamp())
    assert store.revoked_keys(connection, Holders.GATEWAYS, LATER) == {KEY: seconds, OTHER: seconds}
    assert store.revoked_keys(connection, Holders.PEOPLE, LATER) == {}
    assert store.forget_expired(connection, LATER) == 0, "the server's clock may be behind"
    after = LATER + timedelta(days=2)
    assert KEY in store.revoked_keys(connection, Holders.GATEWAYS, after), "an earlier credential may live longer"
    after = NOW + LONGEST_CREDENTIAL_LIFE + timedelta(days=2)
    assert store.revoked_keys(connection, Holders.GATEWAYS, after) == {OTHER: seconds}
    assert store.forget_expired(connection, after) == 1


def test_a_key_whose_credentials_never_expire_stays_revoked_for_ever(connection: Connection) -> None:
    """Another revocation of the same key that names an expiry changes nothing."""
    store.record_gateway(connection, gateway())
    store.record_gateway(connection, gateway(expires_at=LATER))
    after = NOW + 2 * LONGEST_CREDENTIAL_LIFE
    assert KEY in store.revoked_keys(connection, Holders.GATEWAYS, after)


def test_an_older_revocation_of_a_key_does_not_replace_a_newer_one(connection: Connection) -> None:
    for at in (NOW, NOW - timedelta(hours=1)):
        store.record_gateway(connection, gateway(revoked_at=at))
    assert store.revoked_keys(connection, Holders.GATEWAYS, NOW) == {KEY: int(NOW.timestamp())}


def enrolled(**changes: Any) -> GatewayEnrolled:
    fields = {"gateway_id": "gw-1", "blueprint": "kiosk", "public_key": KEY, "moved_from": "edge-chat", "at": NOW}
    return GatewayEnrolled(**{**fields, **changes})


def test_a_move_refuses_the_credentials_before_it_and_not_its_own(connection: Connection) -> None:
    at = NOW + timedelta(seconds=0.7)
    store.record_moved(connection, enrolled(at=at))
    store.record_moved(connection, enrolled(public_key=OTHER, moved_from=None))
    found = store.revoked_keys(connection, Holders.MOVED, NOW)
    assert found == {KEY: int(NOW.timestamp()) - 1}, "the server refuses what was issued at that second or before"
    assert store.revoked_keys(connection, Holders.GATEWAYS, NOW) == {}
    assert store.forget_expired(connection, NOW + LONGEST_CREDENTIAL_LIFE + timedelta(days=2)) == 1


def test_revoked_keys_are_listed_with_the_newest_first(connection: Connection) -> None:
    for day, key in enumerate((OTHER, KEY)):
        store.record_moved(connection, enrolled(public_key=key, at=NOW + timedelta(days=day)))
    assert list(store.revoked_keys(connection, Holders.MOVED, NOW)) == [KEY, OTHER]


def test_a_person_whom_a_new_database_does_not_know_stays_revoked(connection: Connection) -> None:
    event = UserRevoked(user="alice", public_key=KEY, reason="left", at=NOW)
    for _ in range(2):
        store.record_person(connection, event)
    assert store.revoked_keys(connection, Holders.PEOPLE, LATER) == {KEY: int(NOW.timestamp())}
    assert store.forget_expired(connection, NOW + LONGEST_CREDENTIAL_LIFE + timedelta(days=2)) == 1


def test_people_are_listed_a_page_at_a_time(connection: Connection) -> None:
    for name in ("carl", "alice", "bob"):
        event = UserAdded(user=name, role=Role.ADMIN, public_key=KEY, expires_at=LATER, at=NOW)
        store.project(connection, event)
    assert [view.user for view in store.page(connection, "", 2)] == ["alice", "bob"]
    assert [view.user for view in store.page(connection, "bob", 2)] == ["carl"]
    assert store.other_admins(connection, "bob", NOW) == 2
    store.project(connection, UserRevoked(user="carl", public_key=KEY, reason="left", at=NOW))
    assert store.other_admins(connection, "bob", NOW) == 1
    assert store.other_admins(connection, "bob", LATER) == 0
