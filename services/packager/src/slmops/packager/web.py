"""Serves the TUF repository over plain HTTP for any TUF client: `/tuf/metadata/…` and `/tuf/targets/…`.

Public by design: metadata is signed, and a manifest names layers by digest but does not contain them.
"""

from __future__ import annotations

import re

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from slmops.contracts.descriptor import digest_of
from slmops.contracts.errors import NotFound, TemporaryError
from slmops.contracts.manifest import MANIFEST_LIMIT_BYTES
from slmops.contracts.tuf_names import ROLLOUT_TARGET
from slmops.kit.journal import Journal
from slmops.kit.objects.store import Objects
from slmops.packager import store
from slmops.packager.tuf_metadata import TufMetadata

_METADATA, _TARGETS = "/tuf/metadata/", "/tuf/targets/"
_MANIFEST = re.compile(r"([0-9a-f]{64})/\1\.manifest\.json$")


def serve(trust: TufMetadata, journal: Journal, objects: Objects) -> ASGIApp:
    async def manifest(digest: str) -> bytes | None:
        package = await journal.read(lambda connection: store.package(connection, digest))
        return await objects.get_bytes(package.manifest.digest, MANIFEST_LIMIT_BYTES) if package else None

    async def target(path: str) -> bytes | None:
        if found := _MANIFEST.search(path):
            return await manifest(f"sha256:{found[1]}")
        folder, _, name = ROLLOUT_TARGET.rpartition("/")
        data = await trust.rollout_file()
        return data if path == f"{folder}/{digest_of(data).removeprefix('sha256:')}.{name}" else None

    async def answer(path: str) -> bytes | None:
        if path.startswith(_METADATA):
            return await trust.file(path.removeprefix(_METADATA))
        return await target(path.removeprefix(_TARGETS)) if path.startswith(_TARGETS) else None

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope)
        try:
            data = await answer(request.url.path) if request.method == "GET" else None
        except NotFound:
            data = None
        except TemporaryError as error:
            await PlainTextResponse(str(error), 503)(scope, receive, send)
            return
        found = Response(data, media_type="application/json") if data is not None else PlainTextResponse("", 404)
        await found(scope, receive, send)

    return app
