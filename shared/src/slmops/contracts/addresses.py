"""The address of a blob in the object store and in an OCI layout."""

from __future__ import annotations

from slmops.contracts.descriptor import Digest


def blob_key(digest: Digest) -> str:
    """Returns the object key of a blob: `blobs/sha256/<hex>`."""
    return "blobs/" + digest.replace(":", "/", 1)
