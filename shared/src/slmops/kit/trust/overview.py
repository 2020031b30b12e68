"""An overview of a ceremony folder: who may sign what and until when, what is revoked, and what is pending."""

from __future__ import annotations

from datetime import datetime

from pydantic import BaseModel

from slmops.contracts.tuf_names import PACKAGES_ROLE, REVOKED_ROLE
from slmops.kit.trust.ceremony import ONLINE_ROLES, rollout_keys, waiting
from slmops.kit.trust.expiry import Validity, validity, warning
from slmops.kit.trust.folder import OFFLINE_ROLES, Folder


class RoleView(BaseModel):
    """The keys of a role. Roles that the packager signs have no version and date here, because only the packager has
    them."""

    role: str
    version: int | None = None
    expires: datetime | None = None
    validity: Validity | None = None
    threshold: int
    keys: tuple[str, ...]


class WaitingView(BaseModel):
    """A pending version. `keys` may still sign it; with 0 `missing` it waits only for the other files."""

    role: str
    version: int
    missing: int
    keys: tuple[str, ...]


class TrustView(BaseModel):
    roles: tuple[RoleView, ...]
    rollout_keys: tuple[str, ...]
    revoked: tuple[str, ...]
    """Patterns of revoked targets."""
    waiting: tuple[WaitingView, ...]
    warnings: tuple[str, ...] = ()
    """About metadata that has expired or will expire within `freshness.WARN_AHEAD`."""


def overview(folder: Folder, now: datetime) -> TrustView:
    """Returns the overview. Raises `NotFound` without a ceremony, `InvalidMessage` for unreadable metadata."""
    folder.check()
    newest = {role: metadata.signed for role in OFFLINE_ROLES if (metadata := folder.newest(role))}
    root, targets = newest["root"], newest["targets"]
    delegated = dict(targets.delegations.roles)
    roles = []
    for role, signed in newest.items():
        named = delegated[role] if role == REVOKED_ROLE else root.roles[role]
        roles.append(
            RoleView(
                role=role,
                version=signed.version,
                expires=signed.expires,
                validity=validity(signed.expires, now),
                threshold=named.threshold,
                keys=tuple(named.keyids),
            )
        )
    for role, named in [
        *((role, root.roles[role]) for role in ONLINE_ROLES),
        (PACKAGES_ROLE, delegated[PACKAGES_ROLE]),
    ]:
        roles.append(RoleView(role=role, threshold=named.threshold, keys=tuple(named.keyids)))
    revoked = delegated.get(REVOKED_ROLE)
    return TrustView(
        roles=tuple(roles),
        rollout_keys=tuple(key.keyid for key in rollout_keys(targets).keys),
        revoked=tuple(revoked.paths or ()) if revoked else (),
        waiting=tuple(
            WaitingView(role=role, version=draft.signed.version, missing=missing, keys=keys)
            for role, (draft, missing, keys) in waiting(folder).items()
        ),
        warnings=tuple(text for role, signed in newest.items() if (text := warning(role, signed.expires, now))),
    )
