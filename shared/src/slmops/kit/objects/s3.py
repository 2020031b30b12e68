"""Connects to an S3 server and translates its errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import TypeVar

import urllib3
from minio import Minio
from minio.error import S3Error
from urllib3.response import BaseHTTPResponse

from slmops.contracts.errors import NotFound, StoreUnreachable, Unreachable
from slmops.kit.settings import ObjectSettings
from slmops.kit.threads import Threads
from slmops.kit.tls import client_context, untrusted

T = TypeVar("T")
_THREADS = Threads("s3", 32)
"""A hung store holds a thread for as long as its timeouts allow."""
DATA = urllib3.Timeout(connect=5, read=120)  # a store may not answer while it copies gigabytes
LOOK = urllib3.Timeout(connect=5, read=5)
"""For requests without data: short enough to report a hanging store before our caller times out."""
MISSING = ("NoSuchKey", "NoSuchObject")
"""The codes with which S3 servers say that an object does not exist."""
INTERNAL = "InternalError"
"""The code with which S3 servers say that they have an object and cannot read it."""


@dataclass(frozen=True)
class Stored:
    """One copy of an object. `modified` is by S3's own clock, in whole seconds, rounded down. `etag` has no quotes."""

    key: str
    size_bytes: int
    modified: datetime
    etag: str = ""


def minio(settings: ObjectSettings, timeout: urllib3.Timeout, retries: int) -> Minio:
    """Returns a client of the store. Raises `InvalidMessage` for an unusable file of authorities."""
    return Minio(
        endpoint=settings.s3_endpoint,
        access_key=settings.s3_access_key.get_secret_value(),
        secret_key=settings.s3_secret_key.get_secret_value(),
        secure=settings.s3_is_secure,
        region="us-east-1",  # given, so that presigning needs no round trip
        http_client=pool(settings, timeout, retries),
    )


def pool(settings: ObjectSettings, timeout: urllib3.Timeout, retries: int) -> urllib3.PoolManager:
    tls = client_context(settings.tls_ca) if settings.s3_is_secure else None
    again = urllib3.Retry(total=retries, backoff_factor=0.2)
    return urllib3.PoolManager(maxsize=16, timeout=timeout, retries=again, ssl_context=tls)


def stat(client: Minio, bucket: str, key: str) -> Stored | None:
    """Returns an object's size, age and ETag, or None if it does not exist."""
    try:
        found = client.stat_object(bucket, key)
    except S3Error as error:
        if error.code in MISSING:
            return None
        raise
    assert found.last_modified is not None and found.size is not None, "the server sends both"
    return Stored(key, found.size, found.last_modified, found.etag or "")


def listed(client: Minio, bucket: str, prefix: str) -> list[Stored]:
    """Returns every object below `prefix`."""
    return [
        Stored(found.object_name, found.size or 0, found.last_modified, (found.etag or "").strip('"'))
        for found in client.list_objects(bucket, prefix, recursive=True)
        if found.object_name and found.last_modified
    ]


@contextmanager
def opened(client: Minio, bucket: str, key: str) -> Iterator[tuple[BaseHTTPResponse, Stored]]:
    """Yields the response that carries an object's bytes, and which copy of the object it carries."""
    response = client.get_object(bucket, key)
    try:
        headers = response.headers
        modified = parsedate_to_datetime(headers["Last-Modified"])
        size_bytes = int(headers.get("Content-Length", 0))
        yield response, Stored(key, size_bytes, modified, headers.get("ETag", "").strip('"'))
    finally:
        response.close()
        response.release_conn()


def read(client: Minio, bucket: str, key: str) -> bytes | None:
    """Returns a small object that is not a blob, or None if it does not exist."""
    try:
        with opened(client, bucket, key) as (response, _):
            return bytes(response.read())
    except S3Error as error:
        if error.code in MISSING:
            return None
        raise


async def answered(endpoint: str, work: Callable[[], T]) -> T:
    """Runs `work` in a thread. Raises `NotFound`, `StoreUnreachable` if there is no answer, `ServerUntrusted`, and
    `Unreachable` for a refusal."""
    try:
        return await _THREADS.run(work)
    except S3Error as error:
        if error.code in (*MISSING, "NoSuchBucket"):
            raise NotFound(
                "the object store does not have this object", where=f"{endpoint}{error.resource or ''}"
            ) from error
        fix = "If it concerns one object, its bytes may be damaged: slmops storage verify --repair."
        raise Unreachable(
            f"the object store rejected the request: {error.code}",
            where=f"{endpoint}{error.resource or ''}",
            fix=fix if error.code == INTERNAL else None,
        ) from error
    except urllib3.exceptions.HTTPError as error:
        raise untrusted(error, endpoint) or StoreUnreachable(
            f"the object store does not answer: {type(error).__name__}",
            where=endpoint,
            fix="Check that it runs and that SLMOPS_S3_ENDPOINT names it.",
        ) from error
