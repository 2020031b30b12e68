"""Composition root of the gateway. The gateway starts to serve first and connects to the network afterwards."""

from __future__ import annotations

import asyncio
import logging
import signal
import sqlite3
import sys
from collections.abc import Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prometheus_client import REGISTRY, make_asgi_app
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Mount, Route

from slmops.contracts.errors import (
    DiskFull,
    InvalidMessage,
    PermanentError,
)
from slmops.gateway.api.access import Access
from slmops.gateway.api.listen import ApiServer, listen
from slmops.gateway.api.server import create_api
from slmops.gateway.handlers import Agent
from slmops.gateway.identity import Credentials, own_identity, own_seed, stored
from slmops.gateway.install.acquire import Acquirer
from slmops.gateway.install.authorization import Authorization
from slmops.gateway.install.bundles import Bundles
from slmops.gateway.install.factory import Factory
from slmops.gateway.install.slots import Slots
from slmops.gateway.install.updater import Updater
from slmops.gateway.network import Network
from slmops.gateway.report.clock_check import ClockCheck
from slmops.gateway.report.presence import Presence
from slmops.gateway.report.reporter import Reporter
from slmops.gateway.report.sealed import Results
from slmops.gateway.report.spool import Spool
from slmops.gateway.serving.releases import Serving
from slmops.gateway.settings import Settings
from slmops.gateway.twin import Twin
from slmops.kit import tracing
from slmops.kit.bus.client import BusClient
from slmops.kit.cancellation import cancel_and_wait
from slmops.kit.clock import utc_now
from slmops.kit.data_folder import FolderLayout
from slmops.kit.disk import DiskWatch
from slmops.kit.logs import log_as_json
from slmops.kit.main import errors_as_one_line
from slmops.kit.settings import load
from slmops.kit.tls import client_context, publish_expiry
from slmops.kit.trust.asking import Answers

log = logging.getLogger("slmops.gateway")


FOLDER = FolderLayout(kind="a gateway", marks=("slots.json", "spool.db", "user.jwt"))
"""The layout of a gateway's data folder. A change that older folders need is a migration here."""


@dataclass
class Gateway:
    """Holds the wired components of one gateway and runs them."""

    settings: Settings
    agent: Agent
    twin: Twin
    trust: Authorization
    serving: Serving
    reporter: Reporter
    clocks: ClockCheck
    disks: DiskWatch
    servers: list[ApiServer] = field(default_factory=list)
    network: Network | None = None
    bundles: Bundles | None = None
    results: Results | None = None

    @property
    def client(self) -> BusClient | None:
        return self.network.client if self.network else None

    def source(self) -> Answers | None:
        """Returns the source of metadata and packages: the connected bus, otherwise the last accepted bundle."""
        if self.client is not None and self.client.connection.is_connected:
            return self.client
        return (self.bundles.source if self.bundles else None) or self.client

    async def run(self) -> None:
        """Runs until SIGTERM or Ctrl-C. Raises the error that stopped it, for example `PortTaken` or `Denied`."""
        settings = self.settings
        app = create_api(self.serving, registry=REGISTRY, access=Access.of(settings))
        api = ApiServer(app, settings.api_tls_cert, settings.api_tls_key)
        health = ApiServer(self._health(), settings.http_tls_cert, settings.http_tls_key)
        for name, certificate in (("api", settings.api_tls_cert), ("http", settings.http_tls_cert)):
            if certificate:
                publish_expiry(certificate, name)
        sockets = [listen(settings.api_host, settings.api_port), listen(settings.http_host, settings.http_port)]
        self.servers = [api, health]
        self.network = Network(settings, self.on_connection, self.adopt)
        self.twin.on_moved = self.network.belongs_to
        work: list[Coroutine[Any, Any, None]] = [
            self.agent.run(),
            self.agent.report_periodically(settings.report_every),
            self.agent.measure_periodically(),
            self.network.run(),
            self.disks.run(),
            *([self.bundles.watch()] if self.bundles else []),
            *([self.results.watch()] if self.results else []),
            _until_stopped(),
            api.serve([sockets[0]]),
            health.serve([sockets[1]]),
        ]
        tasks = [asyncio.create_task(part) for part in work]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            await self._stop(tasks)

    def on_connection(self, client: BusClient) -> list[Coroutine[Any, Any, None]]:
        """Returns what runs on each connection to the bus: the twin, the spool, presence, and the comparison of
        clocks."""
        settings = self.settings
        presence = Presence(settings.gateway_id, self.reporter.presence, settings.presence_every, utc_now)
        return [self.twin.watch(client), self.reporter.send(client), presence.send(client), self.clocks.watch(client)]

    def adopt(self, credentials: Credentials) -> None:
        """Reports under these credentials from now on. If they are for another blueprint, an admin moved this
        gateway: it follows the plan of the new one, and serves what it has until then."""
        identity = credentials.identity
        self.reporter.report_as(identity, credentials.claims.enrolment)
        if identity.blueprint == self.twin.blueprint:
            if self.agent.started:
                self.agent.report()  # the enrolment may be another one
            return
        log.warning("this gateway belongs to %s now, no longer to %s", identity.blueprint, self.twin.blueprint)
        self.twin.move_to(identity)
        self.trust.move_to(identity)
        if self.bundles is not None:
            self.bundles.move_to(identity.blueprint)
        if self.results is not None:
            self.results.move_to(identity)
        self.agent.moved()

    def _health(self) -> Starlette:
        async def health(_request: Request) -> JSONResponse:
            connected = self.client is not None and self.client.connection.is_connected
            # A gateway without a network, without a release or that was revoked is healthy. It is not healthy while its
            # release loads, or while its model runner is down.
            healthy = self.agent.started and (self.serving.release is None or self.serving.ready)
            # With a full disk it still serves, and a restart would free nothing.
            degraded = [problem.model_dump() for problem in await self.disks.problems()]
            body: dict[str, Any] = {"service": "gateway", "healthy": healthy, "connected": connected}
            body["degraded"] = degraded
            if self.network is not None and self.network.refused is not None:
                body["refused"] = self.network.refused.model_dump()
            return JSONResponse(body, 200 if healthy else 503)

        return Starlette(routes=[Route("/health", health), Mount("/metrics", make_asgi_app())])

    async def _stop(self, tasks: list[asyncio.Task[None]]) -> None:
        for server in self.servers:
            server.should_exit = True
        await asyncio.wait(tasks[-2:], timeout=3)
        await cancel_and_wait(tasks)
        await self.serving.stop()
        await self.reporter.close()
        if self.client is not None:
            await self.client.close()


async def _until_stopped() -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await stop.wait()


def build(settings: Settings) -> Gateway:
    """Wires a gateway. Raises `IncompatibleFolder`, before anything is written to its folder."""
    home = settings.data_dir
    FOLDER.check(home)
    home.mkdir(parents=True, exist_ok=True)
    _migrate(home)
    credentials = stored(settings)
    identity = own_identity(settings, credentials)
    slots, serving = Slots(home), Serving()
    spool = _spool(home / "spool.db")
    reporter = Reporter(identity, spool, home / "report.sequence", utc_now)
    if credentials is not None:
        reporter.report_as(identity, credentials.claims.enrolment)
    gateway: Gateway
    factory = _factory(settings)
    trust = Authorization(
        identity,
        lambda: gateway.source(),
        home / "trust",
        settings.trusted_root,
        utc_now,
        settings.disconnected_grace,
    )
    acquirer = Acquirer(
        identity.gateway_id,
        lambda: gateway.source(),
        slots,
        home / "blobs",
        settings.trusted_key,
        trust,
        factory,
        client_context(settings.tls_ca) if settings.tls_ca else None,
    )
    updater = Updater(slots, acquirer, serving, home / "releases")
    clocks = ClockCheck(identity.gateway_id)
    brought = factory.release if factory else None
    agent = Agent(slots, updater, serving, reporter, settings.retry_every, brought, clocks)
    twin = Twin(identity, trust.plan, agent, settings.refresh_every)
    disks = DiskWatch([home], settings.disk_floor_bytes)
    gateway = Gateway(settings, agent, twin, trust, serving, reporter, clocks, disks)
    if settings.bundles:
        gateway.bundles = Bundles(
            settings.bundles, home / "blobs", identity.blueprint, trust, twin, settings.bundles_every
        )
        gateway.results = Results(settings.bundles, identity, own_seed(home), spool, settings.results_every, utc_now)
    return gateway


def _migrate(home: Path) -> None:
    """Brings the folder to today's layout. On a full disk a folder that needs no migration is used without a stamp."""
    try:
        FOLDER.migrate(home)
    except DiskFull as error:
        if FOLDER.check(home) != FOLDER.newest:
            raise
        log.warning("%s", error)


def _factory(settings: Settings) -> Factory | None:
    """Returns the factory release, or None if there is none or it is unreadable.

    An unreadable factory release is only logged, so that the gateway still serves an installed release.
    """
    try:
        return Factory.open(settings.factory) if settings.factory else None
    except InvalidMessage as error:
        log.error("cannot use the factory release: %s", error)
        return None


def _spool(path: Path) -> Spool:
    """Opens the spool on disk. On a full or damaged disk, uses a spool in memory, so that the gateway still serves."""
    try:
        return Spool(path)
    except sqlite3.DatabaseError:
        log.exception("cannot open %s: messages that wait for a network will be lost at the next restart", path)
        return Spool(Path(":memory:"))


def main() -> None:
    with errors_as_one_line():
        settings = load(Settings)
        log_as_json(settings.gateway_id, settings.log_level)
        provider = tracing.setup("gateway", settings)
    try:
        asyncio.run(_main(settings))
    except PermanentError as error:
        log.error("stopped: %s", error)
        sys.exit(error.exit_code)
    finally:
        provider.shutdown()


async def _main(settings: Settings) -> None:
    await build(settings).run()


if __name__ == "__main__":
    main()
