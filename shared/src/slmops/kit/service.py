"""Runs a service: bus, background tasks, `/health`, `/metrics` and a clean stop on SIGTERM."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from faststream import FastStream
from faststream.asgi import AsgiFastStream, AsgiResponse, get
from faststream.specification import AsyncAPI
from prometheus_client import make_asgi_app
from pydantic import BaseModel

from slmops.contracts.errors import PortTaken, SlmopsError, TemporaryError
from slmops.contracts.exit_codes import ExitCode
from slmops.contracts.identity import ServiceProcess
from slmops.kit import tracing
from slmops.kit.bus.roll_call import answer_roll_calls
from slmops.kit.bus.service_bus import Bus
from slmops.kit.bus.stream_watch import watch_streams
from slmops.kit.cancellation import cancel_and_wait
from slmops.kit.disk import DiskWatch, folders_of
from slmops.kit.logs import log_as_json
from slmops.kit.revision import this_process
from slmops.kit.settings import BusSettings
from slmops.kit.tls import publish_expiry, server_context

log = logging.getLogger("slmops.service")
_STOP_GRACE_S = 3
_LAST_SPANS_WITHIN_S = 3.0
Opened = Callable[[], Awaitable[None]]
Task = Callable[[], Coroutine[Any, Any, None]]
Check = Callable[[], BaseModel | None]
Asgi = Callable[[Any, Any, Any], Awaitable[None]]


@dataclass
class Service:
    """A service composed by `app.py`. `opening` runs before the bus starts, `tasks` while it runs, `closing` after."""

    name: str
    settings: BusSettings
    bus: Bus
    opening: Sequence[Opened] = ()
    tasks: Sequence[Task] = ()
    closing: Sequence[Opened] = ()
    checks: Sequence[Check] = ()
    """Each returns what makes the service degraded now, or None. They do not wait."""
    http: Sequence[tuple[str, Asgi]] = ()
    """Further applications by path prefix (with a final slash), in addition to `/health` and `/metrics`."""
    failed: list[BaseException] = field(default_factory=list)
    _process: ServiceProcess | None = None

    def asgi(self) -> AsgiFastStream:
        """Returns the ASGI application: `/metrics`, and `/health`, which is 200 while the bus answers and every task
        runs.

        A full disk, or a database that does not answer, is reported as `degraded` with status 200: a supervisor that
        restarts unhealthy processes would restart this one in a loop, and change nothing.
        """
        running: list[asyncio.Task[None]] = []
        disks = DiskWatch(folders_of(self.settings), self.settings.disk_floor_bytes)

        @get
        async def health(_scope: Any) -> AsgiResponse:
            healthy = await self.bus.ping(2) and not any(task.done() for task in running)
            problems = [*await disks.problems(), *(check() for check in self.checks)]
            degraded = [problem.model_dump(mode="json") for problem in problems if problem is not None]
            code = self._process.model_dump(include={"version", "revision"}) if self._process else {}
            body = json.dumps({"service": self.name, "healthy": healthy, "degraded": degraded, **code}).encode()
            return AsgiResponse(body, 200 if healthy else 503, {"content-type": "application/json"})

        @asynccontextmanager
        async def lifespan() -> AsyncIterator[None]:
            for step in self.opening:
                await step()
            self._process = await asyncio.to_thread(this_process, self.name)
            await self.bus.start()
            await answer_roll_calls(self.bus.client, self._process)
            tasks = (*self.tasks, disks.run, lambda: watch_streams(self.bus.client, self.bus.durables))
            running.extend(asyncio.create_task(self._watched(task)) for task in tasks)
            try:
                yield
            finally:
                await cancel_and_wait(running)
                await self.bus.stop()
                for step in self.closing:
                    await step()

        self.bus.on_lost = self._lost
        app = FastStream(
            self.bus.broker,
            lifespan=lifespan,
            on_shutdown=[self.bus.begin_stop],  # FastStream stops the broker before `lifespan` goes on
            logger=None,
            specification=self.specification(),
        )
        return app.as_asgi(asgi_routes=[("/health", health), ("/metrics", make_asgi_app())])

    def specification(self) -> AsyncAPI:
        return AsyncAPI(title=f"slmops {self.name}", version="0.1.0", schema_version="3.0.0")

    def _lost(self) -> None:
        """Exits at once. Without the bus a service cannot work, and a restart cleans up as it does after a crash."""
        log.critical("the connection to the bus is closed permanently; exiting so that the supervisor restarts us")
        os._exit(TemporaryError.exit_code)

    async def _watched(self, task: Task) -> None:
        try:
            await task()
        except Exception as error:
            # A service without a background task is broken: stop, so that the supervisor restarts it.
            self.failed.append(error)
            log.exception("background task failed; stopping")
            signal_stop()
            raise

    def run(self) -> None:
        """Serves until SIGTERM or Ctrl-C. Exits with 75 after a temporary error at start, with 1 or more otherwise."""
        log_as_json(self.name, self.settings.log_level)
        provider = tracing.setup(self.name, self.settings)
        certificate = self.settings.http_tls_cert
        context = server_context(certificate, self.settings.http_tls_key) if certificate else None
        if certificate:
            publish_expiry(certificate, "http")
        config = uvicorn.Config(
            _starting(below(self.http, self.asgi()), self.failed),
            host=self.settings.http_host,
            port=self.settings.http_port,
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=_STOP_GRACE_S,
            ssl_context_factory=(lambda _config, _default: context) if context else None,
        )
        server = uvicorn.Server(config)
        # uvicorn stops cleanly on a signal and then raises it again for the previous handler. The default handler would
        # kill the process before the last spans are written and the exit code is chosen.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda _number, _frame: None)
        try:
            server.run()
        except SystemExit:  # uvicorn raises it only if it could not bind
            where = f"{self.settings.http_host}:{self.settings.http_port}"
            taken = PortTaken("/health cannot listen", where=where, fix="Free the port, or set SLMOPS_HTTP_PORT.")
            self.failed.append(taken)
        finally:
            tracing.stop(provider, _LAST_SPANS_WITHIN_S)
        for error in self.failed:
            log.error("stopped: %s", error)
            sys.exit(error.exit_code if isinstance(error, SlmopsError) else ExitCode.INTERNAL)


def below(apps: Sequence[tuple[str, Asgi]], other: Asgi) -> Asgi:
    """Returns an application that selects `apps` by path prefix, which FastStream's routes cannot do."""

    async def asgi(scope: Any, receive: Any, send: Any) -> None:
        path = scope.get("path", "") if scope["type"] == "http" else ""
        app = next((app for prefix, app in apps if path.startswith(prefix)), other)
        await app(scope, receive, send)

    return asgi


def _starting(app: Asgi, failed: list[BaseException]) -> Callable[..., Awaitable[None]]:
    """Records the exception of a failed start, which uvicorn drops, so that it can determine the exit code."""

    async def asgi(scope: Any, receive: Any, send: Any) -> None:
        async def watched(message: Any) -> None:
            if message["type"] == "lifespan.startup.failed":
                failed.append(sys.exc_info()[1] or RuntimeError(message.get("message", "start failed")))
            await send(message)

        await app(scope, receive, watched)

    return asgi


def signal_stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
