"""An overview of a ceremony folder: who may sign what and until when, what is revoked, and what is pending."""

from __future__ import annotations

from datetime import datetime

from pydantic import BaseModel

from slmops.contracts.tuf_names import PACKAGES_ROLE, REVOKED_ROLE
from slmops.kit.trust.ceremony import ONLINE_ROLES, rollout_keys, waiting
from slmops.kit.trust.folder import Folder


class RoleView(BaseModel):
    """The keys of a role. Roles that the packager signs have no version and date here, because only the packager has
    them."""

    role: str
    version: int | None = None
    expires: datetime | None = None
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


def overview(folder: Folder) -> TrustView:
    """Returns the overview. Raises `NotFound` without a ceremony, `InvalidMessage` for unreadable metadata."""
    folder.check()
    newest = {role: metadata.signed for role in ("root", "targets") if (metadata := folder.newest(role))}
    root, targets = newest["root"], newest["targets"]
    delegated = dict(targets.delegations.roles)
    roles = [
        RoleView(
            role=role,
            version=newest[role].version,
            expires=newest[role].expires,
            threshold=root.roles[role].threshold,
            keys=tuple(root.roles[role].keyids),
        )
        for role in newest
    ]
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
    )
