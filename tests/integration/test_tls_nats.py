"""NATS over TLS and websockets: an impostor gets nothing, and certificates change while clients are connected."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
from tls_world import WRONG, issued_to, nats, new_authority, serial

from slmops.contracts import errors
from slmops.contracts.errors import InvalidMessage, NotEncrypted, ServerUntrusted, UnknownAuthority
from slmops.kit.bus.client import BusClient
from slmops.kit.bus.service_bus import Bus
from slmops.kit.settings import BusSettings
from slmops.local.certificates import Certificates
from slmops.local.layout import Layout
from slmops.local.ports import HOST

Running = tuple[dict[str, int], int]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    layout = Layout(tmp_path_factory.mktemp("tls"))
    layout.prepare()
    return layout


@pytest.fixture(scope="module")
def ours(home: Layout) -> Certificates:
    return new_authority(home.keys / "tls")


@pytest.fixture(scope="module")
def server(home: Layout, ours: Certificates) -> Iterator[Running]:
    with nats(home, ours, "right") as found:
        yield found


def settings(home: Layout, authorities: Path | None, scheme: str, ports: dict[str, int], **more: str) -> BusSettings:
    port = ports["nats.websocket" if scheme == "wss" else "nats"]
    return BusSettings(
        nats_url=f"{scheme}://{HOST}:{port}", nats_creds=home.creds("console"), tls_ca=authorities, **more
    )


@asynccontextmanager
async def started(home: Layout, ours: Certificates, what: str) -> AsyncIterator[Running]:
    server = nats(home, ours, what)
    found = await asyncio.to_thread(server.__enter__)
    try:
        yield found
    finally:
        await asyncio.to_thread(server.__exit__, None, None, None)


@asynccontextmanager
async def connected(given: BusSettings) -> AsyncIterator[BusClient]:
    client = await BusClient.connect(given, name="console")
    try:
        yield client
    finally:
        await client.close()


async def works(client: BusClient) -> bool:
    await client.connection.flush(5)
    return True


@pytest.mark.parametrize("scheme", ["tls", "wss"])
async def test_a_client_works_over_tls_and_over_websockets(
    home: Layout, ours: Certificates, server: Running, scheme: str
) -> None:
    async with connected(settings(home, ours.trusted, scheme, server[0])) as client:
        assert await works(client)
        assert client.connection.connected_url and client.connection.connected_url.scheme == scheme


@pytest.mark.parametrize("what", WRONG)
async def test_an_impostor_is_refused_by_name(home: Layout, ours: Certificates, what: str) -> None:
    """Real servers that would accept our users. The plain one is what nats-py alone connects to, given tls://."""
    async with started(home, ours, what) as (ports, _):
        for scheme in ("tls", "wss") if what != "plain" else ("tls",):
            with pytest.raises(ServerUntrusted) as refused:
                await BusClient.connect(settings(home, ours.trusted, scheme, ports), name="console", patient=False)
            assert type(refused.value) is getattr(errors, WRONG[what])
            assert refused.value.fix
            if what == "another authority":
                assert "SLMOPS_TLS_CA" in refused.value.fix
        bus = Bus("registry", settings(home, ours.trusted, "tls", ports))
        with pytest.raises(ServerUntrusted):
            await bus.start()


async def test_a_server_of_public_authorities_is_expected_without_a_file(home: Layout, server: Running) -> None:
    with pytest.raises(UnknownAuthority):
        await BusClient.connect(settings(home, None, "tls", server[0]), name="console", patient=False)


async def test_nothing_is_sent_to_a_plain_server(home: Layout, ours: Certificates) -> None:
    """Its greeting says that TLS is not needed, as somebody on the way can make every greeting say."""
    received = bytearray()

    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b'INFO {"server_id":"x","version":"2.15.1","max_payload":1048576,"tls_required":false}\r\n')
        received.extend(await reader.read(1 << 16))
        writer.write(b"-ERR 'Unknown Protocol Operation'\r\n")
        writer.close()

    listening = await asyncio.start_server(greet, HOST, 0)
    async with listening:
        port = listening.sockets[0].getsockname()[1]
        with pytest.raises(NotEncrypted):
            await BusClient.connect(settings(home, ours.trusted, "tls", {"nats": port}), name="x", patient=False)
    assert received[:1] == b"\x16", "a TLS handshake"
    assert b"CONNECT" not in received


async def test_a_plain_url_beside_an_authority_is_an_error(home: Layout, ours: Certificates, server: Running) -> None:
    for url in (f"nats://{HOST}:1", f"tls://{HOST}:1,nats://{HOST}:2", f"{HOST}:4222"):
        given = settings(home, ours.trusted, "tls", server[0]).model_copy(update={"nats_url": url})
        with pytest.raises(InvalidMessage, match="would not be encrypted"):
            await BusClient.connect(given, name="console", patient=False)


@pytest.mark.parametrize("scheme", ["tls", "wss"])
async def test_a_renewed_certificate_needs_no_restart(
    home: Layout, ours: Certificates, server: Running, scheme: str
) -> None:
    ports, pid = server
    port = ports["nats.websocket" if scheme == "wss" else "nats"]
    async with connected(settings(home, ours.trusted, scheme, ports)) as client:
        reconnected = asyncio.Event()
        client.on_reconnect(reconnected.set)
        before = await asyncio.to_thread(serial, port, ours)
        issued_to(ours)
        os.kill(pid, signal.SIGHUP)
        async with asyncio.timeout(15):
            while await asyncio.to_thread(serial, port, ours) == before:  # noqa: ASYNC110 (another process)
                await asyncio.sleep(0.05)
        assert await works(client)
        assert not reconnected.is_set()
        async with connected(settings(home, ours.trusted, scheme, ports)) as new:
            assert await works(new)


async def test_a_new_authority_needs_no_restart(home: Layout, ours: Certificates, server: Running) -> None:
    """A client that has read only the old file connects again to a server with a certificate of the new authority."""
    ports, pid = server
    before = ours.trusted.read_text()
    async with connected(settings(home, ours.trusted, "tls", ports)) as client:
        reconnected = asyncio.Event()
        client.on_reconnect(reconnected.set)
        ours.authority.unlink()
        issued_to(ours)
        assert ours.trusted.read_text().endswith(before), "both are trusted"
        os.kill(pid, signal.SIGHUP)
        async with asyncio.timeout(15):
            client.connection._transport.close()  # type: ignore[union-attr] # as when the network fails
            await reconnected.wait()
        assert await works(client)
        only_old = home.root / "only-old.pem"
        only_old.write_text(before)
        with pytest.raises(UnknownAuthority):
            await BusClient.connect(settings(home, only_old, "tls", ports), name="console", patient=False)


@pytest.mark.parametrize("scheme", ["tls", "wss"])
async def test_a_client_comes_back_but_not_to_an_impostor(
    home: Layout, tmp_path: Path, scheme: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The server's certificate is exchanged while a client is connected, for one of another authority, and back."""
    layout = Layout(tmp_path)
    layout.prepare()
    ours, theirs = new_authority(layout.keys / "tls"), new_authority(tmp_path / "theirs")
    async with started(layout, ours, "right") as (ports, pid):
        given = settings(layout, ours.trusted, scheme, ports)
        async with connected(given) as client:
            right = ours.server("nats").read_text()
            ours.server("nats").write_text(theirs.server("nats").read_text())
            os.kill(pid, signal.SIGHUP)
            async with asyncio.timeout(20):
                port = ports["nats.websocket" if scheme == "wss" else "nats"]
                while await still_shows_ours(port, ours):  # noqa: ASYNC110 (another process)
                    await asyncio.sleep(0.05)
                client.connection._transport.close()  # type: ignore[union-attr]
                while client._handshakes is None or client._handshakes.failed is None:  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
                assert isinstance(client._handshakes.failed, UnknownAuthority)
                assert [record.getMessage() for record in caplog.records if "no authority" in record.getMessage()]
                ours.server("nats").write_text(right)
                os.kill(pid, signal.SIGHUP)
                while not client.connection.is_connected:  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
            assert await works(client)
            assert client._handshakes.failed is None


async def still_shows_ours(port: int, ours: Certificates) -> bool:
    """Whether the server has not read its new certificate yet."""
    try:
        return bool(await asyncio.to_thread(serial, port, ours))
    except OSError:
        return False


@asynccontextmanager
async def proxy() -> AsyncIterator[tuple[str, bytearray]]:
    """An HTTP proxy that knows only CONNECT. Yields its URL and all that clients sent through it."""
    seen = bytearray()

    async def pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, note: bytearray | None) -> None:
        with suppress(ConnectionError):
            while data := await reader.read(1 << 16):
                if note is not None:
                    note.extend(data)
                writer.write(data)
                await writer.drain()
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        seen.extend(head)
        host, _, port = head.split()[1].decode().partition(":")
        there, back = await asyncio.open_connection(host, int(port))
        writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        await asyncio.gather(pipe(reader, back, seen), pipe(there, writer, None))

    listening = await asyncio.start_server(serve, HOST, 0)
    async with listening:
        yield f"http://{HOST}:{listening.sockets[0].getsockname()[1]}", seen


async def test_websockets_pass_a_proxy_that_sees_no_content(home: Layout, ours: Certificates, server: Running) -> None:
    ports = server[0]
    async with proxy() as (url, seen):
        async with connected(settings(home, ours.trusted, "wss", ports, nats_proxy=url)) as client:
            assert await works(client)
            assert client.connection._transport is not None
            client.connection._transport.close()
            async with asyncio.timeout(15):
                while seen.count(b"CONNECT ") < 3:  # noqa: ASYNC110 (two to connect, one to connect again)
                    await asyncio.sleep(0.05)
            assert await works(client)
        assert seen.startswith(f"CONNECT {HOST}:{ports['nats.websocket']} HTTP/1.1".encode())
        for secret in (b"Upgrade: websocket", b"jwt", b"CONNECT {"):
            assert secret not in seen
