"""The key ceremony, rotation and revocation. Each returns `Changes`, which a dry run only prints.

Root and targets are signed by a threshold of keyholders. A file that lacks signatures waits in `pending/`. Each
keyholder adds a signature separately (`sign`); with the last required one the file moves to `metadata/`. The metadata
determines who must sign: a new root needs the threshold of the previous root and its own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Final, cast

from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import DelegatedRole, Delegations, Metadata, Root, TargetFile, Targets
from tuf.api.serialization.json import JSONSerializer

from slmops.contracts import freshness
from slmops.contracts.errors import AlreadyExists, IllegalTransition, InvalidMessage, NotFound
from slmops.contracts.names import NAME_PATTERN, VERSION_PATTERN
from slmops.contracts.tuf_names import (
    ALL_PACKAGES,
    PACKAGES_ROLE,
    REVOKED_ROLE,
    ROLLOUT_TARGET,
    RolloutKeys,
    model_paths,
    version_paths,
)
from slmops.kit.trust.folder import OFFLINE_ROLES, Changes, Folder, file_name
from slmops.kit.trust.keys import key_file, new_key, trusted

ONLINE_ROLES: Final = ("snapshot", "timestamp")
ROTATED: Final = ("root", "targets", *ONLINE_ROLES, PACKAGES_ROLE, "rollout")
_KEY_ID: Final = re.compile(r"[0-9a-f]{8,}")

Keys = Mapping[str, CryptoSigner]
Edited = dict[str, Metadata[Any]]
"""New versions by role."""


def ceremony(folder: Folder, now: datetime, *, keys: int = 3, threshold: int = 2) -> Changes:
    """Creates the keys and the first root and targets. Raises `AlreadyExists`, `InvalidMessage`."""
    if folder.first_root.exists():
        raise AlreadyExists(
            "a ceremony was already held in this folder",
            where=str(folder.root),
            fix="Use slmops trust rotate, or another folder.",
        )
    _check_threshold(keys, threshold)
    changes = Changes()
    root, targets = Root(expires=_until(now)), Targets(expires=_until(now))
    holders: dict[str, CryptoSigner] = {}
    for role in ("root", "targets"):
        root.roles[role].threshold = threshold
        for signer in _new_offline_keys(folder, role, keys, changes):
            root.add_key(signer.public_key, role)
            holders[signer.public_key.keyid] = signer
    for role in ONLINE_ROLES:
        root.add_key(_new_online_key(folder, role, changes).public_key, role)
    _delegate_packages(targets, _new_online_key(folder, PACKAGES_ROLE, changes))
    plan = _new_file(folder.plan_key, changes, "key that signs plans")
    _name_rollout_keys(targets, RolloutKeys(keys=(trusted(plan.public_key),)))
    # The root is written last, so its existence means that the ceremony is complete.
    return _signed(folder, changes, {"targets": Metadata(targets), "root": Metadata(root)}, holders)


def rotate(
    folder: Folder, role: str, holders: Keys, now: datetime, *, keep_keys: bool = False, keys: int = 0
) -> Changes:
    """Creates new keys for a role of `ROTATED`.

    `keep_keys` renews only the expiry date. A new rollout key is added to the old one, which `revoke` removes. `keys`
    is the new number of keyholders of an offline role; 0 keeps the number. Raises `IllegalTransition` while a file
    waits for signatures, `InvalidMessage` for another role.
    """
    if role not in ROTATED:
        raise InvalidMessage(f"there is no role {role!r} to rotate", fix=f"Use one of: {', '.join(ROTATED)}.")
    changes, root, targets = Changes(), _next(folder, "root", now), _next(folder, "targets", now)
    edited = {"root": root} if role in root.signed.roles and role != "targets" else {"targets": targets}
    if keep_keys:
        pass
    elif role in ("root", "targets"):
        new = _new_keyholders(folder, root.signed, role, keys, changes)
        edited, holders = edited | {"root": root}, {**holders, **new}
    elif role in ONLINE_ROLES:
        _replace_keys(root.signed, role, [_new_online_key(folder, role, changes)])
    elif role == PACKAGES_ROLE:
        _redelegate(targets.signed, _new_online_key(folder, PACKAGES_ROLE, changes))
    else:
        _add_rollout_key(folder, targets.signed, changes)
    return _signed(folder, changes, _with_revoked(folder, edited, now), holders)


def revoke(folder: Folder, what: str, holders: Keys, now: datetime) -> Changes:
    """Revokes a model by its name, one version of it (`smollm2:1.0.0`), or a key by its id (or the first 8 or more
    digits of it).

    Raises `NotFound`, `IllegalTransition` if too few keys would be left or while a file waits for signatures.
    """
    root, targets = _next(folder, "root", now), _next(folder, "targets", now)
    changes = Changes()
    if keyid := _known_key(root.signed, targets.signed, what):
        edited = _revoke_key(root, targets, keyid, changes)
    elif paths := _paths(what):
        revoked = folder.newest(REVOKED_ROLE)
        first = Metadata(Targets(expires=_until(now)))
        edited = _revoke_packages(root.signed, targets, what, paths, changes)
        edited |= {REVOKED_ROLE: _next(folder, REVOKED_ROLE, now) if revoked else first}
    else:
        raise NotFound(
            f"{what!r} is not a trusted key",
            fix="Use a key of slmops trust show, MODEL or MODEL:VERSION.",
        )
    return _signed(folder, changes, _with_revoked(folder, edited, now), holders)


def sign(folder: Folder, holders: Keys) -> Changes:
    """Adds the signatures of some keyholders to the pending files. Raises `NotFound` if no file is pending."""
    drafts = _drafts(folder)
    if not drafts:
        raise NotFound("no file is waiting for a signature", where=str(folder.pending))
    changes = _signed(folder, Changes(), drafts, holders)
    if not any("signed by" in line for line in changes.lines):
        raise InvalidMessage(
            "none of these keys may sign the pending files", fix="slmops trust show lists the keys that are missing."
        )
    return changes


def waiting(folder: Folder) -> dict[str, tuple[Metadata[Any], int, tuple[str, ...]]]:
    """Returns by role each pending file, its number of missing signatures, and the keys that may still sign it."""
    drafts = _drafts(folder)
    found = {}
    for role, draft in drafts.items():
        asked = _delegators(folder, drafts, role)
        lacking = [(root, of) for root, of in asked if _missing([(root, of)], draft)]
        keys = {keyid for root, of in lacking for keyid in root.roles[of].keyids} - draft.signatures.keys()
        found[role] = draft, _missing(asked, draft), tuple(sorted(keys))
    return found


# ---- signatures -------------------------------------------------------------------------------------------


def _signed(folder: Folder, changes: Changes, edited: Edited, holders: Keys) -> Changes:
    """Signs with every given key that may sign, and puts each file into `metadata/` or `pending/`."""
    asked = {role: _delegators(folder, edited, role) for role in edited}
    for role, metadata in edited.items():
        for keyid in sorted({keyid for root, of in asked[role] for keyid in root.roles[of].keyids} & holders.keys()):
            if keyid not in metadata.signatures:
                metadata.sign(holders[keyid], append=True)
                changes.lines.append(f"{role} {metadata.signed.version}: signed by {keyid[:8]}")
    missing = {role: _missing(asked[role], metadata) for role, metadata in edited.items()}
    for role, metadata in edited.items():
        # All files together or none: a root with new targets keys is useless before these have signed the targets.
        _place(folder, changes, role, metadata, missing[role], complete=not any(missing.values()))
    return changes


def _drafts(folder: Folder) -> Edited:
    return {role: draft for role in OFFLINE_ROLES if (draft := folder.draft(role)) is not None}


def _place(
    folder: Folder, changes: Changes, role: str, metadata: Metadata[Any], missing: int, *, complete: bool
) -> None:
    name = file_name(role, metadata.signed.version)
    changes.write[(folder.metadata if complete else folder.pending) / name] = metadata.to_bytes(JSONSerializer())
    if complete:
        changes.remove.append(folder.pending / name)
    state = "complete" if complete else f"waits for {missing} more" if missing else "waits for the other files"
    changes.lines.append(f"{role} {metadata.signed.version}: {state}, valid until {metadata.signed.expires:%Y-%m-%d}")


def _delegators(folder: Folder, edited: Edited, role: str) -> list[tuple[Root, str]]:
    """Returns the roots and roles whose thresholds a file must reach."""
    root, before = _root(folder, edited), folder.newest("root")
    if role != "root":
        return [(root, "targets")]
    return [(root, "root"), *([(before.signed, "root")] if before else [])]


def _root(folder: Folder, edited: Edited) -> Root:
    metadata = edited.get("root") or folder.newest("root")
    assert metadata is not None
    return cast("Root", metadata.signed)


def _missing(delegators: list[tuple[Root, str]], metadata: Metadata[Any]) -> int:
    """Returns the largest number of valid signatures that a delegator still needs."""
    payload, signatures = metadata.signed_bytes, metadata.signatures
    return max(root.get_verification_result(role, payload, signatures).missing for root, role in delegators)


# ---- edits ------------------------------------------------------------------------------------------------


def _next(folder: Folder, role: str, now: datetime) -> Metadata[Any]:
    """Returns the next, unsigned version of an offline role. Raises `NotFound`, `IllegalTransition`."""
    folder.check()
    if waiting := sorted(folder.pending.glob("*.json")):
        raise IllegalTransition(
            f"{waiting[0].name} still waits for signatures",
            where=str(folder.pending),
            fix="Have it signed (slmops trust sign), or delete it to discard that change.",
        )
    metadata = folder.newest(role)
    assert metadata is not None
    metadata.signed.version += 1
    metadata.signed.expires = _until(now)
    metadata.signatures.clear()
    return metadata


def _new_keyholders(folder: Folder, root: Root, role: str, keys: int, changes: Changes) -> Keys:
    count = keys or len(root.roles[role].keyids)
    _check_threshold(count, root.roles[role].threshold)
    new = _new_offline_keys(folder, role, count, changes)
    _replace_keys(root, role, new)
    return {signer.public_key.keyid: signer for signer in new}


def _with_revoked(folder: Folder, edited: Edited, now: datetime) -> Edited:
    """Renews the revoked role together with targets, because it has the same keys."""
    targets = edited.get("targets")
    if targets is None or REVOKED_ROLE in edited or folder.newest(REVOKED_ROLE) is None:
        return edited
    _delegate_revoked(targets.signed, _root(folder, edited))
    return edited | {REVOKED_ROLE: _next(folder, REVOKED_ROLE, now)}


def _replace_keys(root: Root, role: str, signers: list[CryptoSigner]) -> None:
    for keyid in list(root.roles[role].keyids):
        root.revoke_key(keyid, role)
    for signer in signers:
        root.add_key(signer.public_key, role)


def _revoke_key(root: Metadata[Root], targets: Metadata[Targets], keyid: str, changes: Changes) -> Edited:
    rollout = rollout_keys(targets.signed)
    if keyid in {key.keyid for key in rollout.keys}:
        left = tuple(key for key in rollout.keys if key.keyid != keyid)
        _enough(len(left), 1, "rollout")
        _name_rollout_keys(targets.signed, RolloutKeys(keys=left))
        changes.lines.append(f"rollout: {keyid[:8]} may no longer sign plans")
        return {"targets": targets}
    roles = [name for name, role in root.signed.roles.items() if keyid in role.keyids]
    if not roles:
        raise IllegalTransition(
            "the packages role has no other key", fix="Replace it instead: slmops trust rotate packages."
        )
    for role in roles:
        _enough(len(root.signed.roles[role].keyids) - 1, root.signed.roles[role].threshold, role)
        root.signed.revoke_key(keyid, role)
        changes.lines.append(f"{role}: {keyid[:8]} may no longer sign")
    # Its signature on the targets no longer counts, so the other keys sign them again.
    return {"root": root, "targets": targets} if "targets" in roles else {"root": root}


def _revoke_packages(root: Root, targets: Metadata[Targets], what: str, pattern: str, changes: Changes) -> Edited:
    delegations = _delegations(targets.signed)
    role = delegations.get(REVOKED_ROLE)
    paths = list(role.paths or []) if role else []
    if {pattern, model_paths(what.partition(":")[0])} & set(paths):
        raise AlreadyExists(f"{what} is already revoked")
    _delegate_revoked(targets.signed, root, [*paths, pattern])
    changes.lines.append(f"{what}: its packages may no longer be installed")
    return {"targets": targets}


def _delegate_revoked(targets: Targets, root: Root, paths: list[str] | None = None) -> None:
    """Puts the revoked role before `packages`, so the packager's signatures cannot allow a revoked model again."""
    others = _delegations(targets)
    old = others.pop(REVOKED_ROLE, None)
    holders = root.roles["targets"]
    named = paths if paths is not None else list(old.paths or []) if old else []
    role = DelegatedRole(REVOKED_ROLE, list(holders.keyids), holders.threshold, True, paths=named)
    keys = {keyid: root.keys[keyid] for keyid in holders.keyids}
    kept = {keyid: key for keyid, key in _keys(targets).items() if any(keyid in r.keyids for r in others.values())}
    targets.delegations = Delegations(keys | kept, {REVOKED_ROLE: role, **others})


def _delegate_packages(targets: Targets, signer: CryptoSigner) -> None:
    key = signer.public_key
    role = DelegatedRole(PACKAGES_ROLE, [key.keyid], 1, False, paths=[ALL_PACKAGES])
    targets.delegations = Delegations({key.keyid: key}, {PACKAGES_ROLE: role})


def _redelegate(targets: Targets, signer: CryptoSigner) -> None:
    for keyid in list(_delegations(targets)[PACKAGES_ROLE].keyids):
        targets.revoke_key(keyid, PACKAGES_ROLE)
    targets.add_key(signer.public_key, PACKAGES_ROLE)


def _add_rollout_key(folder: Folder, targets: Targets, changes: Changes) -> None:
    signer = new_key()
    path = folder.rollout / key_file("plan", signer.public_key.keyid)
    changes.write[path] = signer.private_bytes
    changes.lines.append(f"new key that signs plans: {path}; replace plan.pem by it when this change is complete")
    _name_rollout_keys(targets, RolloutKeys(keys=(*rollout_keys(targets).keys, trusted(signer.public_key))))


def _name_rollout_keys(targets: Targets, keys: RolloutKeys) -> None:
    """Puts the keys into the target's custom field, so the metadata contains them; the file has the same content."""
    custom = keys.model_dump()
    target = TargetFile.from_data(ROLLOUT_TARGET, rollout_file(keys))
    target.unrecognized_fields["custom"] = custom
    targets.targets[ROLLOUT_TARGET] = target


def rollout_keys(targets: Targets) -> RolloutKeys:
    return RolloutKeys.model_validate(targets.targets[ROLLOUT_TARGET].custom)


def rollout_file(keys: RolloutKeys) -> bytes:
    """Returns the bytes of the target `trust/rollout.json`."""
    return json.dumps(keys.model_dump(), sort_keys=True, separators=(",", ":")).encode()


# ---- keys -------------------------------------------------------------------------------------------------


def _new_offline_keys(folder: Folder, role: str, count: int, changes: Changes) -> list[CryptoSigner]:
    signers = [new_key() for _ in range(count)]
    for signer in signers:
        path = folder.offline / key_file(role, signer.public_key.keyid)
        changes.write[path] = signer.private_bytes
        changes.lines.append(f"new {role} key: {path}")
    return signers


def _new_online_key(folder: Folder, role: str, changes: Changes) -> CryptoSigner:
    signer = new_key()
    path = folder.online / key_file(role, signer.public_key.keyid)
    changes.write[path] = signer.private_bytes
    changes.lines.append(f"new {role} key, for the packager: {path}")
    return signer


def _new_file(path: Path, changes: Changes, what: str) -> CryptoSigner:
    signer = new_key()
    changes.write[path] = signer.private_bytes
    changes.lines.append(f"new {what}: {path}")
    return signer


def _known_key(root: Root, targets: Targets, text: str) -> str | None:
    """Returns the id of the currently trusted key that begins with `text`, if there is exactly one."""
    if len(text) < 8:
        return None
    rollout = [key.keyid for key in rollout_keys(targets).keys]
    known = {*root.keys, *_keys(targets), *rollout}
    found = [keyid for keyid in known if keyid.startswith(text)]
    return found[0] if len(found) == 1 else None


def _paths(text: str) -> str | None:
    """Returns the pattern of the targets of `MODEL` or `MODEL:VERSION`; None if `text` is neither."""
    if _KEY_ID.fullmatch(text):  # a mistyped key id must not look like a revoked model
        return None
    model, colon, version = text.partition(":")
    if not re.fullmatch(NAME_PATTERN, model) or (colon and not re.fullmatch(VERSION_PATTERN, version)):
        return None
    return version_paths(model, version) if colon else model_paths(model)


def _delegations(targets: Targets) -> dict[str, DelegatedRole]:
    return dict(targets.delegations.roles or {}) if targets.delegations else {}


def _keys(targets: Targets) -> dict[str, Any]:
    return dict(targets.delegations.keys) if targets.delegations else {}


def _enough(left: int, threshold: int, role: str) -> None:
    if left < threshold:
        raise IllegalTransition(
            f"{role} would have {left} keys left but needs {threshold}",
            fix=f"Replace its keys instead: slmops trust rotate {role}.",
        )


def _check_threshold(keys: int, threshold: int) -> None:
    if not 1 <= threshold <= keys <= 16:
        raise InvalidMessage(
            f"{threshold} of {keys} keys is not a valid threshold", fix="For example: --keys 3 --threshold 2."
        )


def _until(now: datetime) -> datetime:
    return (now + freshness.KEYHOLDERS).replace(microsecond=0)
