"""Lists the trust metadata that a bundle for gateways without a network must contain."""

from __future__ import annotations

import base64

from sqlalchemy import Connection
from tuf.api.metadata import Metadata, Snapshot, Timestamp

from slmops.contracts.errors import NotReady
from slmops.kit.trust.folder import file_name
from slmops.packager import store


def trust_metadata(connection: Connection) -> tuple[bytes, tuple[str, ...]]:
    """Returns the newest timestamp and the names of all other metadata that a client needs, from the first root on.

    It reads everything in one transaction, so the versions belong together. Raises `NotReady`.
    """
    timestamp = _file(connection, "timestamp", None)
    version = Metadata[Timestamp].from_bytes(timestamp).signed.snapshot_meta.version
    snapshot = Metadata[Snapshot].from_bytes(_file(connection, "snapshot", version)).signed
    names = [file_name("root", number) for number in store.root_versions(connection)]
    names += [file_name(name.removesuffix(".json"), meta.version) for name, meta in snapshot.meta.items()]
    return timestamp, (*names, file_name("snapshot", version))


def base64_text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _file(connection: Connection, role: str, version: int | None) -> bytes:
    data = store.metadata(connection, role, version)
    if data is None:
        raise NotReady(f"the packager has no {role} metadata yet", where="packager")
    return data
