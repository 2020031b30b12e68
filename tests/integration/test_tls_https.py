"""S3 and downloads over https: an impostor gets no key and gives no bytes. Certificates change without a restart."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from tls_world import WRONG, Https, certificate_of, https, issued_to, new_authority, serial

from slmops.console.commands.chat import ask
from slmops.console.commands.export import fetch as console_fetch
from slmops.contracts import errors
from slmops.contracts.descriptor import Descriptor
from slmops.contracts.errors import NotEncrypted, ServerUntrusted
from slmops.contracts.manifest import PackageFile
from slmops.gateway.api.listen import ApiServer, listen
from slmops.gateway.install.download import Patience, UrlSource, fetch
from slmops.kit.objects.store import Objects
from slmops.kit.settings import ObjectSettings
from slmops.kit.tls import client_context, https_trust, server_context
from slmops.local.certificates import Certificates

CONTENT = b"weights"
BLOB = Descriptor.of(CONTENT, "x/y")
PATIENCE = Patience(stalls=2)


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return new_authority(tmp_path_factory.mktemp("tls"))


@pytest.fixture(params=WRONG)
def impostor(request: pytest.FixtureRequest, ours: Certificates, tmp_path: Path) -> Iterator[tuple[Https, str]]:
    """A server that is wrong in one way, and the name of the error for it."""
    what: str = request.param
    context = None if what == "plain" else server_context(certificate_of(what, ours, tmp_path))
    with https(CONTENT, context) as server:
        yield server, WRONG[what]


def objects(server: Https, ours: Certificates) -> Objects:
    return Objects(ObjectSettings(s3_endpoint=server.address, tls_ca=ours.trusted))


def source(url: str) -> UrlSource:
    async def give() -> str:
        return url

    return give


async def test_an_impostor_is_refused_by_every_client(
    impostor: tuple[Https, str], ours: Certificates, tmp_path: Path
) -> None:
    server, expected = impostor
    kind: type[ServerUntrusted] = getattr(errors, expected)
    url = f"https://{server.address}/blob"
    with pytest.raises(kind) as refused:
        await objects(server, ours).get_bytes(BLOB.digest)
    assert type(refused.value) is kind
    context = client_context(ours.trusted)
    with pytest.raises(kind):
        await fetch(BLOB, source(url), tmp_path / "gateway", patience=PATIENCE, tls=context)
    async with httpx.AsyncClient(verify=context) as http:
        with pytest.raises(kind):
            await console_fetch(http, PackageFile(path="w", descriptor=BLOB, url=url), tmp_path / "w")
    with pytest.raises(kind):
        await ask(f"https://{server.address}", "hello", verify=https_trust(ours.trusted))
    assert server.asked == [], "no request, and so no signature, reached it"


async def test_the_right_server_is_accepted(ours: Certificates, tmp_path: Path) -> None:
    context = client_context(ours.trusted)
    with https(CONTENT, server_context(ours.server("s3"))) as server:
        url = f"https://{server.address}/blob"
        assert (await fetch(BLOB, source(url), tmp_path, tls=context)).read_bytes() == CONTENT
        presigned = await objects(server, ours).presigned_get(BLOB.digest)
        assert presigned.startswith(f"https://{server.address}/")


async def test_a_download_never_goes_on_without_encryption(ours: Certificates, tmp_path: Path) -> None:
    """Neither by a plain URL nor by a redirect to one."""
    context = client_context(ours.trusted)
    with https(CONTENT, None) as plain, https(b"", server_context(ours.server("s3"))) as server:
        server.elsewhere = f"http://{plain.address}/blob"
        for url in (f"http://{plain.address}/blob", f"https://{server.address}/elsewhere"):
            with pytest.raises(NotEncrypted):
                await fetch(BLOB, source(url), tmp_path, patience=PATIENCE, tls=context)
        assert plain.asked == []
        assert (await fetch(BLOB, source(f"http://{plain.address}/blob"), tmp_path)).read_bytes() == CONTENT


async def hello(scope: object, receive: object, send: object) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})  # type: ignore[operator]
    await send({"type": "http.response.body", "body": b"hello"})  # type: ignore[operator]


async def test_our_http_servers_show_a_renewed_certificate_without_a_restart(tmp_path: Path) -> None:
    """uvicorn as the services and the gateway use it; a connection that is open stays open."""
    ours = new_authority(tmp_path)
    bound, server = listen(), ApiServer(hello, ours.server("nats"))
    serving, port = asyncio.create_task(server.serve([bound])), bound.getsockname()[1]
    try:
        async with asyncio.timeout(20), httpx.AsyncClient(verify=client_context(ours.trusted)) as http:
            while not server.started:  # noqa: ASYNC110 (uvicorn has no event for it)
                await asyncio.sleep(0.01)
            url = f"https://127.0.0.1:{port}/"
            assert (await http.get(url)).text == "hello"
            before = await asyncio.to_thread(serial, port, ours)
            issued_to(ours)
            renewed = await asyncio.to_thread(serial, port, ours)
            assert renewed != before
            assert (await http.get(url)).text == "hello"
            ours.server("nats").write_text("damaged")
            assert await asyncio.to_thread(serial, port, ours) == renewed, "the last good one stays in use"
            with pytest.raises(ssl.SSLCertVerificationError):
                await asyncio.to_thread(serial, port, new_authority(tmp_path / "other"))
    finally:
        server.should_exit = True
        await serving
