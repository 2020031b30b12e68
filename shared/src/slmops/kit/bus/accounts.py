"""The accounts of the bus: who is in which one, and what each exports to and imports from the services' account.

Streams, buckets and services are in the services' account. People, gateways and the enrolment user have accounts of
their own, which import only what the permissions of their users name. The server sends its own answers
(acknowledgements, stored messages) to any reply subject without checking permissions. Across accounts it returns the
answer to the account that sent the request, so a reply subject of a gateway or a person never reaches a stream, a
bucket or a command.

Users of a revoked key are refused if their credentials were issued at the time of the revocation or before.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from slmops.contracts.identity import Role
from slmops.contracts.permissions import (
    ANSWER_WITHIN,
    ENROL_PERMISSIONS,
    GATEWAY_PERMISSIONS,
    ROLE_PERMISSIONS,
    Permissions,
)
from slmops.contracts.subjects import INBOX, matches

API = "$JS.API"
PEOPLE_API = "jsapi"
"""How people's account names `$JS.API` of the services' account. The server answers on the name itself that the account
has no JetStream, before the other account can answer."""
_COMMANDS = "cmd.*.*.*.*"
"""The commands of all people: service, name, role, person."""
NO_LIMITS = {"subs": -1, "data": -1, "payload": -1}
_ACCOUNT_LIMITS = {**NO_LIMITS, "imports": -1, "exports": -1, "wildcards": True, "conn": -1, "leaf": -1}
_JETSTREAM_LIMITS = {"mem_storage": -1, "disk_storage": -1, "streams": -1, "consumer": -1}
Claims = dict[str, Any]
Revocations = Mapping[str, int]
"""Public key of a user → Unix time: credentials that were issued then or before are refused."""


@dataclass(frozen=True)
class AccountKeys:
    """The public keys of the accounts, and of the keys that sign their users. `roles` sign people, by role."""

    system: str
    services: str
    people: str
    edge: str
    enrolment: str
    service_users: str
    gateway_users: str
    roles: Mapping[str, str]


def account_claims(
    keys: AccountKeys, *, people: Revocations | None = None, gateways: Revocations | None = None
) -> dict[str, tuple[str, Claims]]:
    """Returns name and claims of each account by its public key, with the revoked keys of people and gateways."""
    edge, enrolment = _crossing(GATEWAY_PERMISSIONS), _crossing(ENROL_PERMISSIONS)
    persons = _of_people()
    scopes = [_scope(keys.roles[role], role, _local(ROLE_PERMISSIONS[role])) for role in Role]
    exports = _maximal([*persons, *edge, *enrolment])
    return {
        keys.system: _account("SYS"),
        keys.services: _account(
            "slmops",
            limits={**_ACCOUNT_LIMITS, **_JETSTREAM_LIMITS},
            signing_keys=[keys.service_users],
            exports=exports,
        ),
        keys.people: _account(
            "people",
            signing_keys=scopes,
            imports=[_renamed(one) for one in _imports(keys, persons)],
            revocations=dict(people or {}),
        ),
        keys.edge: _account(
            "edge",
            signing_keys=[_scope(keys.gateway_users, "gateway", GATEWAY_PERMISSIONS)],
            imports=_imports(keys, edge),
            revocations=dict(gateways or {}),
        ),
        # Shared: the server tells the service the sender's address, by which wrong tokens are limited.
        keys.enrolment: _account("enrolment", imports=[{**one, "share": True} for one in _imports(keys, enrolment)]),
    }


def user_claims(permissions: Permissions) -> Claims:
    return {
        "pub": {"allow": list(permissions.publish)},
        "sub": {"allow": list(permissions.subscribe)},
        **NO_LIMITS,
    }


def _account(name: str, **claims: Any) -> tuple[str, Claims]:
    common = {"default_permissions": {"pub": {}, "sub": {}}, "limits": _ACCOUNT_LIMITS, "version": 2}
    return name, {**common, "type": "account", **claims}


def _scope(key: str, role: str, permissions: Permissions) -> Claims:
    return {"kind": "user_scope", "key": key, "role": role, "template": user_claims(permissions)}


def _of_people() -> list[Claims]:
    """Returns the exports that people's account imports: every command, and what their roles use besides."""
    further = dict.fromkeys(s for row in ROLE_PERMISSIONS.values() for s in _open(row.publish))
    heard = dict.fromkeys(s for row in ROLE_PERMISSIONS.values() for s in row.subscribe if not s.startswith(INBOX))
    nanoseconds = int(ANSWER_WITHIN.total_seconds()) * 1_000_000_000
    answers = {"response_type": "Stream", "response_threshold": nanoseconds}  # a long answer has several messages
    return [
        _service(_COMMANDS, **answers),
        *_maximal([_service(subject) for subject in further if not matches(_COMMANDS, subject)]),
        *map(_stream, heard),
    ]


def _crossing(permissions: Permissions) -> list[Claims]:
    """Returns the exports of the services' account that another account imports to give its users `permissions`. A
    template's placeholders become wildcards; the users' own permissions narrow them again."""
    services = [_service(subject) for subject in _open(permissions.publish)]
    heard = [subject for subject in _open(permissions.subscribe) if not subject.startswith(INBOX)]
    return [*services, *map(_stream, heard)]


def _stream(subject: str) -> Claims:
    return {"name": subject, "subject": subject, "type": "stream"}


def _service(subject: str, **more: Any) -> Claims:
    return {"name": subject, "subject": subject, "type": "service", **more}


def _open(subjects: Iterable[str]) -> list[str]:
    return [re.sub(r"\{\{.*?\}\}", "*", subject) for subject in subjects]


def _maximal(exports: list[Claims]) -> list[Claims]:
    """Returns the exports without those that another one contains, which the server refuses."""

    first = list({(one["type"], one["subject"]): one for one in reversed(exports)}.values())[::-1]

    def contained(one: Claims) -> bool:
        others = (other for other in first if other is not one and other["type"] == one["type"])
        return any(matches(other["subject"], one["subject"]) for other in others)

    return [one for one in first if not contained(one)]


def _imports(keys: AccountKeys, exports: list[Claims]) -> list[Claims]:
    wanted = ("name", "subject", "type")
    return [{**{name: export[name] for name in wanted}, "account": keys.services} for export in exports]


def _local(permissions: Permissions) -> Permissions:
    return permissions._replace(publish=tuple(subject.replace(API, PEOPLE_API) for subject in permissions.publish))


def _renamed(one: Claims) -> Claims:
    if not one["subject"].startswith(API):
        return one
    local = one["subject"].replace(API, PEOPLE_API)
    count = iter(range(1, 10))
    return {**one, "local_subject": re.sub(r"(?<=\.)\*", lambda _: f"${next(count)}", local)}
