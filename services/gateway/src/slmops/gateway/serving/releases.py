"""The router between the API and the runners. It hides swaps, rollbacks and crashes from clients."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from datetime import timedelta

from slmops.contracts.descriptor import Digest
from slmops.contracts.errors import InferenceFailed, NotReady, PromptRefused, RunnerDied, SlmopsError
from slmops.gateway.serving.inference import Done, InferenceRequest, Release, Token, TokenLimits, ToolFormat
from slmops.gateway.serving.measurements import Measurements, ReleaseMeasurement
from slmops.gateway.serving.runner import Runner
from slmops.kit.cancellation import cancel_and_wait

_log = logging.getLogger(__name__)

Answered = Callable[[Release, Done], None]


@dataclass(frozen=True, slots=True)
class ServingLimits:
    drain: timedelta = timedelta(seconds=60)
    """How long a replaced runner may finish its answers."""
    patience: timedelta = timedelta(seconds=30)
    """How long a request waits for a runner that is restarting. While no release is active, requests do not wait."""
    backoff: timedelta = timedelta(milliseconds=500)
    """Pause before the first restart after a crash. It doubles after each run that is shorter than `stable`."""
    max_backoff: timedelta = timedelta(seconds=30)
    stable: timedelta = timedelta(minutes=1)
    max_requests: int = 64
    """Requests in work or waiting. Further requests are rejected, because they would wait too long."""


class Serving:
    """Holds the active runner. New requests go to the newest runner; a replaced runner drains and then stops.

    A request whose runner died before it sent anything to the client is retried once. A dead active runner is
    restarted.
    """

    def __init__(self, limits: ServingLimits | None = None, *, on_answer: Answered | None = None) -> None:
        self._limits = limits or ServingLimits()
        self._on_answer = on_answer or (lambda release, done: None)
        self._active: Runner | None = None
        self._available = asyncio.Event()
        self._keeper: asyncio.Task[None] | None = None
        self._measurements = Measurements()
        self._requests = 0
        self.answered = 0
        """The number of complete answers of all releases so far."""

    @property
    def release(self) -> Release | None:
        """The release that answers new requests."""
        return self._active.release if self._active else None

    @property
    def limits(self) -> TokenLimits | None:
        """The limits of one request to the release that answers new requests."""
        return self._active.limits if self._active else None

    @property
    def tool_format(self) -> ToolFormat | None:
        """How the model of this release writes calls of tools; None if it does not know tools."""
        return self._active.tool_format if self._active else None

    @property
    def ready(self) -> bool:
        return self._active is not None and self._active.alive

    @property
    def peak_rss_bytes(self) -> int:
        return self._active.peak_rss_bytes() if self._active else 0

    async def swap(self, new: Runner) -> None:
        """Makes `new` the active runner. Returns when the old one has drained and stopped.

        If `new` does not run, it is started like a runner that died, and requests wait.
        """
        old = await self._replace(new)
        _log.info("serving %s %s", new.release.model, new.release.version)
        if old:
            try:
                await old.stop(self._limits.drain)
            except BaseException:  # cancelled while it drains: nobody else knows it, so it would run for ever
                await asyncio.shield(old.stop(timedelta()))
                raise

    async def stop(self) -> None:
        """Stops serving. Running answers may finish."""
        if old := await self._replace(None):
            await old.stop(self._limits.drain)

    def take_measurements(self) -> dict[Digest, ReleaseMeasurement]:
        """Returns the measurements since the last call, by release."""
        return self._measurements.take()

    async def generate(self, request: InferenceRequest) -> AsyncGenerator[tuple[Release, Token | Done], None]:
        """Yields the items of `Runner.generate`, each with the release that made it. Also raises `NotReady`."""
        if self._requests >= self._limits.max_requests:
            raise NotReady("too many requests are waiting", delay=timedelta(seconds=5))
        self._requests += 1
        try:
            async with aclosing(self._retried(request)) as items:
                async for item in items:
                    yield item
        finally:
            self._requests -= 1

    async def _retried(self, request: InferenceRequest) -> AsyncGenerator[tuple[Release, Token | Done], None]:
        for last_try in (False, True):
            runner, seen = await self._runner(), False
            try:
                async with aclosing(runner.generate(request)) as items:
                    async for item in items:
                        seen = True
                        if isinstance(item, Done):
                            self.answered += 1
                            self._measurements.of(runner.release.digest).add(item)
                            self._on_answer(runner.release, item)
                        yield runner.release, item
                return
            except PromptRefused:
                raise
            except InferenceFailed as error:
                if not (isinstance(error, RunnerDied) and not seen and not last_try):
                    self._measurements.of(runner.release.digest).add_failure()
                    raise

    async def _runner(self) -> Runner:
        if self._active is None:
            raise NotReady("this gateway does not serve a model yet", fix="Wait for its first release.")
        if not self.ready:
            self._available.clear()
        try:
            await asyncio.wait_for(self._available.wait(), self._limits.patience.total_seconds())
        except TimeoutError:
            raise NotReady("the model runner is restarting", delay=timedelta(seconds=5)) from None
        if self._active is None:
            raise NotReady("the gateway is stopping")
        return self._active

    async def _replace(self, new: Runner | None) -> Runner | None:
        old, self._active = self._active, new
        keeper, self._keeper = self._keeper, None
        if new:
            self._keeper = asyncio.create_task(self._keep(new), name="runner keeper")
        self._available.set()  # if nothing is active, waiting requests fail at once
        if keeper:
            await cancel_and_wait([keeper])
        return old

    async def _keep(self, runner: Runner) -> None:
        """Restarts `runner` whenever it dies, with increasing pauses."""
        loop, pause = asyncio.get_running_loop(), self._limits.backoff
        while True:
            since = loop.time()
            await runner.dead()
            self._available.clear()
            if loop.time() - since > self._limits.stable.total_seconds():
                pause = self._limits.backoff
            _log.warning("the model runner died; restarting in %.1f s", pause.total_seconds())
            await asyncio.sleep(pause.total_seconds())
            pause = min(pause * 2, self._limits.max_backoff)
            try:
                await runner.start()
                self._available.set()
            except SlmopsError as error:
                _log.warning("the model runner did not start: %s", error)
            except Exception:  # without its keeper a dead runner would never answer again
                _log.exception("the model runner did not start")
