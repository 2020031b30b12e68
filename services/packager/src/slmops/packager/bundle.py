"""Everything that gateways of a blueprint need when they have no network, as addresses and names."""

from __future__ import annotations

import base64

from sqlalchemy import Connection
from tuf.api.metadata import Metadata, Snapshot, Timestamp

from slmops.contracts.errors import NotReady
from slmops.kit.trust.folder import file_name
from slmops.packager import store


def state_of_trust(connection: Connection) -> tuple[bytes, tuple[str, ...]]:
    """The newest timestamp and the names of all that a client needs beside it, from its first root on.

    In one transaction, so that all of it belongs together. Raises `NotReady`.
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
        raise NotReady(f"there is no {role} metadata yet", where="packager")
    return data
