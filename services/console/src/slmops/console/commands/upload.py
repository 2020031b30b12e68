"""Hashes local files and uploads those that the object store lacks, by presigned URLs."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx

from slmops.contracts.errors import DigestMismatch, Unreachable
from slmops.contracts.model import ModelFile

OnProgress = Callable[[str, int, int], None]
"""Called for every chunk with the step, the bytes done and the total bytes."""

CHUNK_BYTES = 4 << 20
UPLOAD_ATTEMPTS = 3
_RETRY_AFTER_S = 1.0
_UPLOAD_TIMEOUT = httpx.Timeout(120, connect=10)


@dataclass(frozen=True)
class Source:
    """A local file and its entry in the version."""

    path: Path
    file: ModelFile


async def hash_files(named: Mapping[str, Path], on_progress: OnProgress) -> list[Source]:
    total = sum(path.stat().st_size for path in named.values())
    found, done = [], 0
    for name, path in named.items():
        state, size = hashlib.sha256(), 0
        async for chunk in _chunks(path):
            # One thread call per chunk, so that Ctrl-C takes effect between chunks.
            await asyncio.to_thread(state.update, chunk)
            size += len(chunk)
            on_progress("hash", done + size, total)
        done += size
        found.append(Source(path, ModelFile(path=name, digest=f"sha256:{state.hexdigest()}", size_bytes=size)))
    return found


async def _chunks(path: Path) -> AsyncIterator[bytes]:
    with path.open("rb") as source:
        while chunk := await asyncio.to_thread(source.read, CHUNK_BYTES):
            yield chunk


async def upload_missing(sources: Sequence[Source], urls: Mapping[str, str], on_progress: OnProgress) -> None:
    """Uploads the files for whose digest there is a URL. Raises `Unreachable`, `DigestMismatch`."""
    missing = {source.file.digest: source for source in sources if source.file.digest in urls}
    total, done = sum(source.file.size_bytes for source in missing.values()), 0
    async with httpx.AsyncClient(timeout=_UPLOAD_TIMEOUT) as http:
        for digest, source in missing.items():
            await _put(http, urls[digest], source, lambda sent: on_progress("upload", done + sent, total))  # noqa: B023
            done += source.file.size_bytes


async def _put(http: httpx.AsyncClient, url: str, source: Source, on_sent: Callable[[int], None]) -> None:
    """Uploads one file. Each attempt starts from the beginning. Raises `Unreachable`, `DigestMismatch`."""
    where = url.partition("?")[0]  # without the URL's signature
    for attempt in range(1, UPLOAD_ATTEMPTS + 1):
        problem = await _put_once(http, url, source, on_sent)
        if problem is None:
            return
        if attempt < UPLOAD_ATTEMPTS:
            await asyncio.sleep(_RETRY_AFTER_S * attempt)
    raise Unreachable(
        f"could not upload {source.path.name} in {UPLOAD_ATTEMPTS} attempts: {problem}",
        where=where,
        fix="Push again.",
    )


async def _put_once(http: httpx.AsyncClient, url: str, source: Source, on_sent: Callable[[int], None]) -> str | None:
    """Uploads the file once. Returns None on success, otherwise the temporary problem.

    Raises `Unreachable` if the store refuses the file, `DigestMismatch`.
    """
    # S3 does not accept chunked transfer encoding, so the length is set.
    length = {"Content-Length": str(source.file.size_bytes)}
    try:
        answer = await http.put(url, content=_body(source, on_sent), headers=length)
    except httpx.TransportError as error:
        return f"{type(error).__name__} {error}".strip()
    if answer.is_success:
        return None
    if answer.is_server_error:
        return f"the object store answered {answer.status_code}"
    raise Unreachable(
        f"the object store refused {source.path.name} with status {answer.status_code}",
        where=url.partition("?")[0],
        fix="Push again. An upload URL is valid for 15 minutes.",
    )


async def _body(source: Source, on_sent: Callable[[int], None]) -> AsyncIterator[bytes]:
    sent = 0
    async for chunk in _chunks(source.path):
        sent += len(chunk)
        if sent > source.file.size_bytes:
            break
        yield chunk
        on_sent(sent)
    if sent != source.file.size_bytes:
        raise DigestMismatch(
            "the file changed during the push", where=str(source.path), fix="Push again when the file is complete."
        )
