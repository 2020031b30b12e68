"""Fetches trust metadata over the bus: one request per file, answered by the packager."""

from __future__ import annotations

import asyncio
from base64 import b64decode
from collections.abc import Iterator

from pydantic import ValidationError
from tuf.api.exceptions import DownloadHTTPError
from tuf.ngclient import FetcherInterface

from slmops.contracts.commands import FetchMetadata
from slmops.contracts.errors import NotFound
from slmops.kit.trust.asking import Answers

_PATIENCE_S = 60.0  # the client has a shorter timeout; this one is for an event loop that no longer runs


class BusFetcher(FetcherInterface):
    """A fetcher that the library calls in one thread while `loop` runs in another."""

    def __init__(self, client: Answers, gateway_id: str, loop: asyncio.AbstractEventLoop) -> None:
        self._client = client
        self._gateway_id = gateway_id
        self._loop = loop

    def _fetch(self, url: str) -> Iterator[bytes]:
        try:
            command = FetchMetadata(gateway_id=self._gateway_id, file=url.rpartition("/")[2])
            asked = asyncio.run_coroutine_threadsafe(self._client.request(command), self._loop)
            return iter([b64decode(asked.result(_PATIENCE_S).content, validate=True)])
        except (NotFound, ValidationError) as error:
            raise DownloadHTTPError("the packager has no such file", 404) from error
