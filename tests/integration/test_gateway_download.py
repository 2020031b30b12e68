"""Downloads from a real HTTP server with faults, onto a real disk that fills up."""

from __future__ import annotations

import asyncio
import hashlib
import subprocess
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from slmops.contracts.descriptor import Descriptor
from slmops.contracts.errors import Denied, DigestMismatch, DiskFull, NotFound, NotReady, Unreachable
from slmops.gateway.install.download import Patience, blob_path, fetch

DATA = hashlib.shake_256(b"weights").digest(3_000_000)
BLOB = Descriptor.of(DATA, "application/octet-stream")
PATIENCE = Patience(stalls=4, pause=timedelta(milliseconds=2), read_timeout=timedelta(seconds=1))
Behaviour = Callable[["Handler"], None]


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.ranges.append(self.headers.get("Range"))
        self.server.behaviour(self)

    def start(self) -> int:
        range_header = self.headers.get("Range")
        return int(range_header.removeprefix("bytes=").removesuffix("-")) if range_header else 0

    def answer(self, data: bytes, *, status: int = 200, length: int | None = None, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(data)

    def ranged(self, data: bytes = DATA, at_most: int | None = None) -> None:
        """Answers as a correct server does; cuts the connection after `at_most` bytes."""
        start = self.start()
        if start >= len(data):
            self.answer(b"", status=416, length=0)
            return
        content_range = {"Content_Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if start else {}
        self.answer(data[start:][:at_most], status=206 if start else 200, length=len(data) - start, **content_range)

    def log_message(self, *_: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.behaviour: Behaviour = Handler.ranged
        self.ranges: list[str | None] = []
        self.url_requests = 0

    async def url(self) -> str:
        self.url_requests += 1
        return f"http://127.0.0.1:{self.server_port}/blob?signature={self.url_requests}"

    def handle_error(self, *_: object) -> None:
        """Ignores clients that disconnect, which is expected here."""


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


async def test_a_blob_is_downloaded_completely_and_not_fetched_again(server: Server, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    path = await fetch(BLOB, server.url, tmp_path, lambda have, size: seen.append((have, size)), patience=PATIENCE)
    assert path == blob_path(tmp_path, BLOB.digest)
    assert path.read_bytes() == DATA
    assert [have for have, _ in seen] == sorted(have for have, _ in seen)
    assert seen[-1] == (BLOB.size, BLOB.size)
    assert await fetch(BLOB, server.url, tmp_path, patience=PATIENCE) == path
    assert (server.url_requests, list(tmp_path.iterdir())) == (1, [path])


async def test_an_empty_blob_is_downloaded(server: Server, tmp_path: Path) -> None:
    assert (await fetch(Descriptor.of(b"", "x/y"), server.url, tmp_path)).read_bytes() == b""


async def test_a_file_with_other_content_at_the_path_of_the_blob_is_replaced(server: Server, tmp_path: Path) -> None:
    blob_path(tmp_path, BLOB.digest).write_bytes(b"damaged")
    assert (await fetch(BLOB, server.url, tmp_path, patience=PATIENCE)).read_bytes() == DATA


async def test_a_cut_download_continues_with_a_range_request(server: Server, tmp_path: Path) -> None:
    server.behaviour = lambda handler: handler.ranged(at_most=400_000)
    assert (await fetch(BLOB, server.url, tmp_path, patience=PATIENCE)).read_bytes() == DATA
    assert server.ranges == [None, *(f"bytes={start}-" for start in range(400_000, 3_000_000, 400_000))]


async def test_the_partial_file_of_an_earlier_process_is_continued(server: Server, tmp_path: Path) -> None:
    blob_path(tmp_path, BLOB.digest).with_suffix(".part").write_bytes(DATA[:1_000_000])
    assert (await fetch(BLOB, server.url, tmp_path, patience=PATIENCE)).read_bytes() == DATA
    assert server.ranges == ["bytes=1000000-"]


@pytest.mark.parametrize("left", [b"x" * 1_000_000, b"x" * BLOB.size, b"x" * (BLOB.size + 1)])
async def test_a_damaged_partial_file_is_downloaded_from_the_start(server: Server, tmp_path: Path, left: bytes) -> None:
    blob_path(tmp_path, BLOB.digest).with_suffix(".part").write_bytes(left)
    assert (await fetch(BLOB, server.url, tmp_path, patience=PATIENCE)).read_bytes() == DATA


async def test_a_complete_partial_file_needs_no_network(tmp_path: Path) -> None:
    async def no_url() -> str:
        raise AssertionError("no URL may be requested")

    blob_path(tmp_path, BLOB.digest).with_suffix(".part").write_bytes(DATA)
    assert (await fetch(BLOB, no_url, tmp_path)).read_bytes() == DATA


async def test_a_server_that_ignores_ranges_is_read_from_the_start(server: Server, tmp_path: Path) -> None:
    blob_path(tmp_path, BLOB.digest).with_suffix(".part").write_bytes(DATA[:1_000_000])
    server.behaviour = lambda handler: handler.answer(DATA, length=len(DATA))
    assert (await fetch(BLOB, server.url, tmp_path, patience=PATIENCE)).read_bytes() == DATA


async def test_an_answer_with_another_range_is_discarded(server: Server, tmp_path: Path) -> None:
    blob_path(tmp_path, BLOB.digest).with_suffix(".part").write_bytes(DATA[:1_000_000])

    def wrong_range(handler: Handler) -> None:
        if handler.start():
            handler.answer(DATA[:100], status=206, length=100, Content_Range="bytes 0-99/3000000")
        else:
            handler.ranged()

    server.behaviour = wrong_range
    assert (await fetch(BLOB, server.url, tmp_path, patience=PATIENCE)).read_bytes() == DATA


async def test_wrong_content_is_refused_and_removed(server: Server, tmp_path: Path) -> None:
    server.behaviour = lambda handler: handler.ranged(DATA[:-1] + b"?")
    with pytest.raises(DigestMismatch, match="digest is different"):
        await fetch(BLOB, server.url, tmp_path, patience=PATIENCE)
    assert list(tmp_path.iterdir()) == []
    assert len(server.ranges) == 1


async def test_data_beyond_the_expected_size_is_refused_at_once(server: Server, tmp_path: Path) -> None:
    sent = 0

    def endless(handler: Handler) -> None:
        nonlocal sent
        handler.answer(DATA)  # without a length, until the connection closes
        for _ in range(10_000):
            handler.wfile.write(b"x" * 100_000)
            sent += 100_000

    server.behaviour = endless
    with pytest.raises(DigestMismatch, match="longer than"):
        await fetch(BLOB, server.url, tmp_path, patience=PATIENCE)
    assert list(tmp_path.iterdir()) == []
    await asyncio.sleep(0.05)
    assert sent < 100_000_000


async def test_a_download_with_a_wrong_content_length_is_continued(server: Server, tmp_path: Path) -> None:
    def wrong_length(handler: Handler) -> None:
        start = handler.start()
        piece = DATA[start : start + 1_000_000]
        status, content_range = (206, {"Content_Range": f"bytes {start}-"}) if start else (200, {})
        # The first length is shorter than the blob, the others are longer than the piece.
        handler.answer(piece, status=status, length=len(piece) + (5_000_000 if start else 0), **content_range)

    server.behaviour = wrong_length
    assert (await fetch(BLOB, server.url, tmp_path, patience=PATIENCE)).read_bytes() == DATA


async def test_an_expired_url_is_renewed(server: Server, tmp_path: Path) -> None:
    def expires(handler: Handler) -> None:
        if handler.path.endswith("=1") and handler.start():
            handler.answer(b"expired", status=403, length=7)
        else:
            handler.ranged(at_most=1_000_000)

    server.behaviour = expires
    assert (await fetch(BLOB, server.url, tmp_path, patience=PATIENCE)).read_bytes() == DATA
    assert server.url_requests == 2


async def test_a_url_source_that_is_not_ready_is_retried_and_one_that_denies_is_not(
    server: Server, tmp_path: Path
) -> None:
    asked = 0

    async def later() -> str:
        nonlocal asked
        asked += 1
        if asked < 3:
            raise NotReady("the packager is starting")
        return await server.url()

    async def denied() -> str:
        raise Denied("not your package")

    await fetch(BLOB, later, tmp_path, patience=PATIENCE)
    with pytest.raises(Denied):
        await fetch(BLOB, denied, tmp_path / "other", patience=PATIENCE)


@pytest.mark.parametrize(
    "behaviour",
    [
        lambda handler: handler.answer(b"", status=500, length=0),
        lambda handler: handler.answer(b"", status=403, length=0),
        lambda handler: handler.answer(b"", length=len(DATA)),
        lambda handler: threading.Event().wait(3),
    ],
    ids=["500", "always 403", "cut at once", "no answer"],
)
async def test_a_download_without_progress_fails_and_keeps_its_partial_file(
    server: Server, tmp_path: Path, behaviour: Behaviour
) -> None:
    part = blob_path(tmp_path, BLOB.digest).with_suffix(".part")
    part.write_bytes(DATA[:500])
    server.behaviour = behaviour
    patience = Patience(stalls=3, pause=timedelta(milliseconds=2), read_timeout=timedelta(milliseconds=200))
    with pytest.raises(Unreachable, match="no progress"):
        await fetch(BLOB, server.url, tmp_path, patience=patience)
    assert part.exists()
    assert not blob_path(tmp_path, BLOB.digest).exists()


async def test_a_closed_port_is_unreachable(tmp_path: Path) -> None:
    async def nowhere() -> str:
        return "http://127.0.0.1:9/blob"

    with pytest.raises(Unreachable):
        await fetch(BLOB, nowhere, tmp_path, patience=PATIENCE)


async def test_a_blob_that_the_store_does_not_have_is_not_found(server: Server, tmp_path: Path) -> None:
    server.behaviour = lambda handler: handler.answer(b"", status=404, length=0)
    with pytest.raises(NotFound):
        await fetch(BLOB, server.url, tmp_path, patience=PATIENCE)


async def test_a_blob_larger_than_the_free_disk_space_is_refused_before_the_download(
    server: Server, tmp_path: Path
) -> None:
    huge = BLOB.model_copy(update={"size": 2**60})
    with pytest.raises(DiskFull, match=r"\d{18,} bytes are missing"):
        await fetch(huge, server.url, tmp_path, patience=PATIENCE)
    assert server.ranges == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Yields a folder on a tmpfs of 4 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", folder], capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)


async def test_a_disk_that_fills_up_is_an_error_and_the_download_continues_after_space_is_freed(
    server: Server, small_disk: Path
) -> None:
    filler = small_disk / "filler"

    def fill(have: int, size: int) -> None:
        if have > 1_000_000 and not filler.exists():
            filler.write_bytes(b"x" * 1_500_000)

    with pytest.raises(DiskFull, match=r"\d+ bytes are missing"):
        await fetch(BLOB, server.url, small_disk, fill, patience=PATIENCE)
    assert not blob_path(small_disk, BLOB.digest).exists()
    kept = blob_path(small_disk, BLOB.digest).with_suffix(".part").stat().st_size
    assert kept > 1_000_000
    filler.unlink()
    assert (await fetch(BLOB, server.url, small_disk, patience=PATIENCE)).read_bytes() == DATA
    assert server.ranges == [None, f"bytes={kept}-"]
