"""The accounts that the server gets: nothing that another export contains, and no right beyond the table."""

from __future__ import annotations

from itertools import permutations

from slmops.contracts.identity import Role
from slmops.contracts.permissions import ROLE_PERMISSIONS
from slmops.contracts.subjects import matches
from slmops.kit.bus.accounts import account_claims
from slmops.kit.bus.nats_auth import Authority, account_jwts, claims_of, public_key

AUTHORITY = Authority.generate()
KEYS = AUTHORITY.account_keys
CLAIMS = account_claims(KEYS, people={"UA": 1}, gateways={"UB": 2})


def test_no_export_contains_another() -> None:
    services = [one["subject"] for one in CLAIMS[KEYS.services][1]["exports"] if one["type"] == "service"]
    assert [(a, b) for a, b in permutations(services, 2) if matches(a, b)] == []


def test_every_import_is_exported() -> None:
    exports = CLAIMS[KEYS.services][1]["exports"]
    for account in (KEYS.people, KEYS.edge, KEYS.enrolment):
        for one in CLAIMS[account][1]["imports"]:
            assert any(
                one["type"] == other["type"]
                and (one["subject"] == other["subject"] or matches(other["subject"], one["subject"]))
                for other in exports
            ), one


def test_each_list_of_revoked_keys_is_in_its_own_account() -> None:
    found = {account: claims.get("revocations") for account, (_, claims) in CLAIMS.items()}
    assert found == {
        KEYS.people: {"UA": 1},
        KEYS.edge: {"UB": 2},
        **dict.fromkeys((KEYS.system, KEYS.services, KEYS.enrolment)),
    }


def test_a_role_has_the_template_of_the_table_in_the_names_of_peoples_account() -> None:
    scopes = {scope["role"]: scope for scope in CLAIMS[KEYS.people][1]["signing_keys"]}
    assert set(scopes) == set(Role)
    for role in Role:
        assert scopes[role]["key"] == public_key(AUTHORITY.role_seed(role))
        allowed = scopes[role]["template"]["pub"]["allow"]
        assert [s.replace("jsapi.", "$JS.API.") for s in allowed] == list(ROLE_PERMISSIONS[role].publish)
        assert not [subject for subject in allowed if subject.startswith("$JS")]


def test_what_is_pushed_is_newer_than_the_configuration() -> None:
    for key, jwt in AUTHORITY.account_jwts().items():
        pushed = account_jwts(AUTHORITY.accounts, {key: CLAIMS[key]})[key]
        assert claims_of(jwt)["iat"] < claims_of(pushed)["iat"]
        assert claims_of(jwt)["iss"] == claims_of(pushed)["iss"] == public_key(AUTHORITY.accounts)
