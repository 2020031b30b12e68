"""People and revoked keys, without a bus: who is added, renewed and revoked, and when a revoked key is forgotten."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import Connection, create_engine

from slmops.access import store
from slmops.access.domain import Person, add, record_first_admin, renew, replay, revoke
from slmops.access.store import Holders
from slmops.contracts.commands import AddUser, RevokeUser
from slmops.contracts.errors import AlreadyExists, Denied, NotFound
from slmops.contracts.events import GatewayRevoked, UserAdded, UserRenewed, UserRevoked
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
    assert [type(e) for e in record_first_admin(None, given, NOW)] == [UserAdded]
    assert record_first_admin(given, given, NOW) == []
    again = Person("alice", Role.ADMIN, KEY, LATER + timedelta(days=1))
    assert [type(e) for e in record_first_admin(given, again, NOW)] == [UserRenewed]
    # A lost key, and somebody else's name: what was given before is taken away.
    (gone, added) = record_first_admin(Person("alice", Role.VIEWER, OTHER, LATER), given, NOW)
    assert isinstance(gone, UserRevoked) and gone.public_key == OTHER
    assert isinstance(added, UserAdded) and added.role is Role.ADMIN


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
