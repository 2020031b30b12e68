"""The agent, which follows the desired release. It runs at most one update at a time and reports its phases."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from datetime import timedelta

from slmops.contracts.descriptor import Digest
from slmops.contracts.errors import PermanentError, Problem, SlmopsError, TemporaryError
from slmops.contracts.plan import Desired, Plan, Release, Side
from slmops.gateway.domain import Phase, should_update
from slmops.gateway.install.slots import Slots
from slmops.gateway.install.updater import Updater
from slmops.gateway.report.clock_check import ClockCheck
from slmops.gateway.report.reporter import Reporter, Status
from slmops.gateway.serving.releases import Serving
from slmops.kit.tracing import span

log = logging.getLogger(__name__)
_LOOK_EVERY_S = 30.0
"""How often the status is compared with the last report, because the clock and the spool change without an event."""


class Agent:
    """Reconciles the running release with the desired one. Level-triggered: only the newest desired state counts."""

    def __init__(
        self,
        slots: Slots,
        updater: Updater,
        serving: Serving,
        reporter: Reporter,
        retry: timedelta,
        factory: Release | None = None,
        clocks: ClockCheck | None = None,
    ) -> None:
        self._slots = slots
        self._updater = updater
        self._serving = serving
        self._reporter = reporter
        self._retry = retry
        self._factory = factory
        self._clocks = clocks
        self._planned: Release | None = None
        self._generation = 0
        self._rollout = ""
        self._traceparent: str | None = None
        self._refused: Problem | None = None
        """Why the newest plan was rejected."""
        self._changed = asyncio.Event()
        self._started = asyncio.Event()
        updater.on_phase = self.report

    def desired_changed(self, desired: Desired, plan: Plan) -> None:
        """Follows a new plan or overlay."""
        self._refused = None
        self._planned = desired.release
        self._generation = plan.generation
        self._traceparent = plan.traceparent
        self._rollout = plan.candidate.rollout if plan.candidate and desired.side is Side.CANDIDATE else ""
        log.info("desired: %s, %s", desired.side, "; ".join(desired.explain.values()))
        self._changed.set()

    def moved(self) -> None:
        """Keeps what is installed without a desired release until the plan of the new blueprint is read. An update
        under way is withdrawn."""
        self._planned, self._refused = None, None
        self._generation, self._rollout, self._traceparent = 0, "", None
        self._changed.set()
        if self.started:
            self.report()

    def plan_refused(self, error: SlmopsError) -> None:
        """Keeps the previous desired release and reports why the newest plan was rejected."""
        log.error("rejected the plan: %s", error)
        self._refused = Problem.of(error)
        if self.started:
            self.report()

    @property
    def _desired(self) -> Release | None:
        """The release that the plan names. Without one: the factory release, until a release is installed."""
        installed = self._slots.active is not None and not self._slots.on_trial
        return self._planned or (None if installed else self._factory)

    @property
    def started(self) -> bool:
        """Whether the start is complete: the installed or factory release serves, was rejected, or does not exist."""
        return self._started.is_set()

    async def run(self) -> None:
        """Serves the installed release, then follows the desired one. Runs until cancelled."""
        await self._updater.restore()
        if self._desired is not None and self._desired is self._factory:
            await self._reconcile()
        self._started.set()
        self.report()
        while True:
            self._changed.clear()
            pause = await self._reconcile()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), pause.total_seconds() if pause else None)

    async def _reconcile(self) -> timedelta | None:
        """Takes one step towards the desired release. Returns the pause before the next; None: wait for a change."""
        wanted = self._desired
        digest = wanted.manifest.digest if wanted else None
        active = self._slots.active.digest if self._slots.active else None
        if digest and self._updater.failed_in(digest) not in (None, self._rollout):
            await self._updater.allow_retry(digest)
        attempts = self._slots.attempts(digest) if digest else 0
        go = should_update(
            desired=digest, active=active, failed=self._slots.failed, phase=self._updater.phase, attempts=attempts
        )
        if wanted is None or not go:
            return await self._apply_settings(wanted)
        with span("update", parent=self._traceparent, version=wanted.version):
            return await self._update_unless_changed(wanted)

    async def _apply_settings(self, wanted: Release | None) -> timedelta | None:
        """Applies changed settings of the release that is already installed."""
        pause = None
        if wanted is not None:
            try:
                await self._updater.refresh(wanted)
            except SlmopsError as error:
                log.warning("could not apply the new settings, retrying: %s", error)
                self._updater.problems[wanted.manifest.digest] = Problem.of(error)
                pause = self._retry
        self.report()
        return pause

    async def _update_unless_changed(self, wanted: Release) -> timedelta | None:
        update = asyncio.create_task(self._updater.update(wanted, self._rollout))
        watch = asyncio.create_task(self._wait_until_unwanted(wanted.manifest.digest))
        try:
            await asyncio.wait((update, watch), return_when=asyncio.FIRST_COMPLETED)
        finally:
            watch.cancel()
            if not update.done():
                update.cancel()
        return await self._await_outcome(update, wanted.manifest.digest)

    async def _await_outcome(self, update: asyncio.Task[None], digest: Digest) -> timedelta | None:
        try:
            await update
        except asyncio.CancelledError:
            current = asyncio.current_task()
            if current is not None and current.cancelling():
                raise
            log.info("the update was withdrawn")
            return timedelta()
        except TemporaryError as error:
            log.warning("could not update, retrying: %s", error)
            self._updater.problems[digest] = Problem.of(error)
            self.report()
            return max(self._retry, error.delay)
        except PermanentError:
            pass  # the updater keeps the problem, and the report below contains it
        except Exception as error:
            # A bug in the gateway must neither stop it from serving nor be counted as a failure of the release.
            log.exception("the update failed unexpectedly")
            self._updater.problems[digest] = Problem.of(error)
            self.report()
            return self._retry
        else:
            self._updater.problems.pop(digest, None)
        self.report()
        return None

    async def _wait_until_unwanted(self, digest: Digest) -> None:
        while self._desired is not None and self._desired.manifest.digest == digest:
            self._changed.clear()
            await self._changed.wait()

    def report(self) -> None:
        """Reports the status if it changed. A failed release is reported as failed for as long as it is desired."""
        self._reporter.report_changes(self._status())

    def _status(self) -> Status:
        wanted = self._desired.manifest.digest if self._desired else None
        serving = self._serving.release
        phase, problem = self._updater.phase, self._updater.problems.get(wanted) if wanted else None
        if phase is Phase.IDLE and serving is not None and serving.digest == wanted:
            phase = Phase.COMMITTED
        failed = wanted is not None and self._updater.failed_in(wanted) == self._rollout
        if failed and self._updater.phase in (Phase.IDLE, Phase.COMMITTED):
            phase = Phase.FAILED
            problem = problem or Problem.of(PermanentError("this release failed on this gateway earlier"))
        return Status(
            phase=phase,
            running=serving.digest if serving else None,
            running_version=serving.version if serving else None,
            target=wanted,
            problem=self._clocks.explained(problem or self._refused) if self._clocks else problem or self._refused,
            plan_generation=self._generation,
            measured=self._updater.measured,
        )

    async def report_periodically(self, every: timedelta) -> None:
        """Reports every change, and at least once in an interval, at a random time in its last quarter, because a whole
        fleet may have started at the same moment. Runs until cancelled."""
        await self._started.wait()
        while True:
            due = time.monotonic() + every.total_seconds() * random.uniform(0.75, 1)
            while (left := due - time.monotonic()) > 0:
                await asyncio.sleep(min(left, _LOOK_EVERY_S))
                self.report()
            self._reporter.report(self._status())

    async def measure_periodically(self) -> None:
        """Queues measurement batches at the interval that the blueprint sets. Runs until cancelled."""
        await self._started.wait()
        while True:
            await asyncio.sleep(self._desired.telemetry.every_s if self._desired else 2.0)
            self.measure()

    def measure(self) -> None:
        """Passes the measurements since the last call to the reporter."""
        golden, taken = self._updater.take_golden(), self._serving.take_measurements()
        if not golden and not taken:
            return
        releases = {digest: self._updater.release(digest) for digest in taken.keys() | golden.keys()}
        versions = {digest: release.version for digest, release in releases.items() if release}
        with span("measure", parent=self._traceparent):
            self._reporter.measure(taken, versions, golden)
