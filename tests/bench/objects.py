"""Compares our verified puts and gets of 100 MB and 4 kB with the bare S3 client on the same server."""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from collections.abc import Awaitable, Callable
from io import BytesIO
from pathlib import Path

import httpx
import urllib3
from bench.comparison import Comparison, Measured, Place
from minio import Minio

from slmops.contracts.addresses import blob_key
from slmops.contracts.descriptor import Descriptor
from slmops.gateway.install.download import fetch
from slmops.kit.objects.store import PART_BYTES, Objects
from slmops.kit.settings import ObjectSettings
from slmops.local.servers import BUCKET
from slmops.local.system import System

LARGE_BYTES, SMALL_BYTES, SMALL_COUNT = 100_000_000, 4096, 40
_TYPE = "application/octet-stream"


async def measure(place: Place) -> Measured:
    async with System(place.scratch / "system", services=(), gateways=()) as system:
        return Measured(await _Store(system, place).compare())


class _Store:
    """The same server through both clients. Every put has new bytes, because our store writes a blob only once."""

    def __init__(self, system: System, place: Place) -> None:
        keys = system.layout.s3_credentials()
        self.ours = Objects(
            ObjectSettings.model_validate(
                {"s3_endpoint": system.s3_endpoint, "s3_access_key": keys.access_key, "s3_bucket": BUCKET}
                | {"tls_ca": system.certificates.trusted}
                | {"s3_secret_key": keys.secret_key}
            )
        )
        pool = urllib3.PoolManager(ssl_context=system.verify)
        self.bare = Minio(system.s3_endpoint, keys.access_key, keys.secret_key, region="us-east-1", http_client=pool)
        self.verify = system.verify
        self.place = place
        self.numbers = itertools.count()
        self.file, self.target = place.scratch / "file", place.scratch / "target"
        self.large = self.small = Descriptor.of(b"", _TYPE)

    async def compare(self) -> list[Comparison]:
        compare = self.place.side_by_side
        return [
            await compare("put_file, 100 MB", "MB/s", "minio fput_object, no digest", self.bare_put, self.put),
            await compare("get_file, 100 MB", "MB/s", "minio fget_object, not verified", self.bare_get, self.get),
            await compare(
                "gateway download, 100 MB", "MB/s", "httpx stream to a file, not verified", self.bare_fetch, self.fetch
            ),
            await compare("put_bytes, 4 kB", "per s", "minio put_object", self.bare_put_small, self.put_small),
            await compare("get_bytes, 4 kB", "per s", "minio get_object", self.bare_get_small, self.get_small),
        ]

    def new_file(self) -> Path:
        block = os.urandom(1_000_000)
        self.file.write_bytes(block * (LARGE_BYTES // len(block)))
        return self.file

    async def bare_put(self) -> float:
        path, key = self.new_file(), f"bench/{next(self.numbers)}"
        return await _megabytes_per_s(
            lambda: asyncio.to_thread(self.bare.fput_object, BUCKET, key, str(path), part_size=PART_BYTES)
        )

    async def put(self) -> float:
        path = self.new_file()

        async def put() -> None:
            self.large = await self.ours.put_file(path, _TYPE)

        return await _megabytes_per_s(put)

    async def bare_get(self) -> float:
        key = blob_key(self.large.digest)
        return await _megabytes_per_s(lambda: asyncio.to_thread(self.bare.fget_object, BUCKET, key, str(self.target)))

    async def get(self) -> float:
        return await _megabytes_per_s(lambda: self.ours.get_file(self.large.digest, self.target))

    async def bare_fetch(self) -> float:
        url = await self.ours.presigned_get(self.large.digest)

        async def download() -> None:
            async with httpx.AsyncClient(verify=self.verify) as http, http.stream("GET", url) as response:
                with self.target.open("wb") as out:
                    async for data in response.aiter_raw():
                        out.write(data)

        return await _megabytes_per_s(download)

    async def fetch(self) -> float:
        url, folder = await self.ours.presigned_get(self.large.digest), self.place.scratch / f"{next(self.numbers)}"

        async def source() -> str:
            return url

        return await _megabytes_per_s(lambda: fetch(self.large, source, folder, tls=self.verify))

    async def bare_put_small(self) -> float:
        def put() -> None:
            for _ in range(SMALL_COUNT):
                key = f"bench/{next(self.numbers)}"
                self.bare.put_object(BUCKET, key, BytesIO(os.urandom(SMALL_BYTES)), SMALL_BYTES)

        return SMALL_COUNT / await _seconds(lambda: asyncio.to_thread(put))

    async def put_small(self) -> float:
        async def put() -> None:
            for _ in range(SMALL_COUNT):
                self.small = await self.ours.put_bytes(os.urandom(SMALL_BYTES), _TYPE)

        return SMALL_COUNT / await _seconds(put)

    async def bare_get_small(self) -> float:
        def get() -> None:
            for _ in range(SMALL_COUNT):
                response = self.bare.get_object(BUCKET, blob_key(self.small.digest))
                response.read()
                response.close()
                response.release_conn()

        return SMALL_COUNT / await _seconds(lambda: asyncio.to_thread(get))

    async def get_small(self) -> float:
        async def get() -> None:
            for _ in range(SMALL_COUNT):
                await self.ours.get_bytes(self.small.digest)

        return SMALL_COUNT / await _seconds(get)


async def _megabytes_per_s(work: Callable[[], Awaitable[object]]) -> float:
    return LARGE_BYTES / 1e6 / await _seconds(work)


async def _seconds(work: Callable[[], Awaitable[object]]) -> float:
    start = time.perf_counter()
    await work()
    return time.perf_counter() - start
