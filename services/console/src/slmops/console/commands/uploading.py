"""Uploads files by presigned URL, and waits for an object store that does not answer."""

from __future__ import annotations

import asyncio
import hashlib
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Final, TypeVar

import httpx

from slmops.contracts.errors import DigestMismatch, StoreUnreachable, Unreachable
from slmops.contracts.model import ModelFile
from slmops.kit.tls import untrusted

T = TypeVar("T")
OnProgress = Callable[[str, int, int], None]
"""Called for every chunk with the step, the bytes done and the total bytes."""

VERIFY_STORE: Final = "Look for corrupt blobs: slmops storage verify --repair."
"""The fix shown for a download with wrong bytes."""
CHUNK_BYTES = 4 << 20
UPLOAD_ATTEMPTS = 3
PATIENCE: Final = timedelta(minutes=5)
_PIECE_BYTES = 256 << 10
_RETRY_AFTER_S = 1.0
_SAY_AFTER_S = 5.0
_LOOK_EVERY_S = 0.2
_CONNECT_WITHIN_S = 10.0


@dataclass(frozen=True)
class Source:
    """A local file and its entry in the version. `md5` (hex) is what an S3 store keeps as its ETag."""

    path: Path
    file: ModelFile
    md5: str = ""


class StoreWait:
    """Waits for an object store that accepts connections and does not answer, for `limit` without any progress.

    `say` gets a line after 5 s, and again each time that the wait has doubled.
    """

    def __init__(
        self,
        limit: timedelta = PATIENCE,
        say: Callable[[str], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.limit = limit
        self._say, self._clock = say, clock
        self._since, self._next_s = clock(), _SAY_AFTER_S

    def progressed(self) -> None:
        """The store took or sent something: the wait begins anew."""
        self._since, self._next_s = self._clock(), _SAY_AFTER_S

    def check(self, where: str | None = None) -> None:
        """Reports the length of the wait. Raises `StoreUnreachable` when it is over."""
        waited_s, limit_s = self._clock() - self._since, self.limit.total_seconds()
        if waited_s >= limit_s:
            raise StoreUnreachable(
                f"the object store has not answered for {waited_s:.0f} s",
                where=where,
                fix="Check the object store, then push again. SLMOPS_UPLOAD_PATIENCE sets how long a push waits.",
            )
        if waited_s >= self._next_s:
            self._next_s = 2 * waited_s
            self._say(f"waiting for the object store: no answer for {waited_s:.0f} s, giving up after {limit_s:.0f} s")

    async def waited_for(self, ask: Callable[[], Awaitable[T]]) -> T:
        """Asks a service, again as long as its object store does not answer. Raises what `ask` raises otherwise."""
        self.progressed()
        while True:
            try:
                return await ask()
            except StoreUnreachable as error:
                self.check(error.where)
                await asyncio.sleep(_RETRY_AFTER_S)

    async def watched(self, work: Awaitable[T], where: str) -> T:
        """Returns the result of `work`, which calls `progressed`. Cancels it when the wait is over."""
        self.progressed()
        running = asyncio.ensure_future(work)
        try:
            while not (await asyncio.wait([running], timeout=_LOOK_EVERY_S))[0]:
                self.check(where)
            return running.result()
        finally:
            running.cancel()


async def hash_files(named: Mapping[str, Path], on_progress: OnProgress) -> list[Source]:
    """Returns the files with their digests and MD5 sums, read once."""
    total = sum(path.stat().st_size for path in named.values())
    found, done = [], 0
    for name, path in named.items():
        state, md5, size = hashlib.sha256(), hashlib.md5(usedforsecurity=False), 0
        async for chunk in chunks(path):
            # One thread call per chunk, so that Ctrl-C takes effect between chunks.
            await asyncio.gather(asyncio.to_thread(state.update, chunk), asyncio.to_thread(md5.update, chunk))
            size += len(chunk)
            on_progress("hash", done + size, total)
        done += size
        file = ModelFile(path=name, digest=f"sha256:{state.hexdigest()}", size_bytes=size)
        found.append(Source(path, file, md5.hexdigest()))
    return found


def connections(verify: ssl.SSLContext | bool) -> httpx.AsyncClient:
    """Returns a client without time limits for sending and answering, which `StoreWait` sets."""
    return httpx.AsyncClient(timeout=httpx.Timeout(None, connect=_CONNECT_WITHIN_S), verify=verify)


async def upload(
    sources: Sequence[Source],
    urls: Mapping[str, str],
    on_progress: OnProgress,
    store: StoreWait,
    verify: ssl.SSLContext | bool,
) -> None:
    """Uploads the files that have a URL, one after the other. Raises what `put_file` raises."""
    missing = {source.file.digest: source for source in sources if source.file.digest in urls}
    total, done = sum(source.file.size_bytes for source in missing.values()), 0
    async with connections(verify) as http:
        for digest, source in missing.items():

            def on_sent(sent: int, before: int = done) -> None:
                on_progress("upload", before + sent, total)

            await put_file(http, urls[digest], source, on_sent, store)
            done += source.file.size_bytes


async def put_file(
    http: httpx.AsyncClient, url: str, source: Source, on_sent: Callable[[int], None], store: StoreWait
) -> None:
    """Uploads one file. Each attempt starts from the beginning. Raises `StoreUnreachable`, `Unreachable`,
    `ServerUntrusted`, `DigestMismatch`."""
    where = url.partition("?")[0]  # without the URL's signature
    for attempt in range(1, UPLOAD_ATTEMPTS + 1):
        problem = await store.watched(_put_once(http, url, source, on_sent, store), where)
        if problem is None:
            return
        if attempt < UPLOAD_ATTEMPTS:
            await asyncio.sleep(_RETRY_AFTER_S * attempt)
    raise Unreachable(
        f"could not upload {source.path.name} in {UPLOAD_ATTEMPTS} attempts: {problem}",
        where=where,
        fix="Push again.",
    )


async def _put_once(
    http: httpx.AsyncClient, url: str, source: Source, on_sent: Callable[[int], None], store: StoreWait
) -> str | None:
    """Uploads the file once. Returns None on success, otherwise the temporary problem.

    Raises `Unreachable` if the store refuses the file, `ServerUntrusted`, `DigestMismatch`.
    """
    # S3 does not accept chunked transfer encoding, so the length is set.
    length = {"Content-Length": str(source.file.size_bytes)}
    try:
        answer = await http.put(url, content=_body(source, on_sent, store), headers=length)
    except httpx.TransportError as error:
        if impostor := untrusted(error, url.partition("?")[0]):
            raise impostor from error
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


async def _body(source: Source, on_sent: Callable[[int], None], store: StoreWait) -> AsyncIterator[bytes]:
    sent = 0
    async for chunk in chunks(source.path):
        sent += len(chunk)
        if sent > source.file.size_bytes:
            break
        for start in range(0, len(chunk), _PIECE_BYTES):
            store.progressed()  # the store took the piece before, or there is room in the connection's buffers
            yield chunk[start : start + _PIECE_BYTES]
        on_sent(sent)
    if sent != source.file.size_bytes:
        raise DigestMismatch(
            "the file changed during the push", where=str(source.path), fix="Push again when the file is complete."
        )


async def chunks(path: Path) -> AsyncIterator[bytes]:
    with path.open("rb") as source:
        while chunk := await asyncio.to_thread(source.read, CHUNK_BYTES):
            yield chunk
