"""Runs one update: download, verify, load, probe, swap, soak, and commit or revert.

Success is proved here, at the edge. After any failure the previous release keeps serving or serves again. This does not
need a network.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable
from contextlib import aclosing
from datetime import timedelta
from functools import partial
from pathlib import Path

from slmops.contracts.descriptor import Digest
from slmops.contracts.errors import InferenceFailed, NotReady, PermanentError, Problem, SlmopsError, TemporaryError
from slmops.contracts.plan import Release
from slmops.gateway.domain import MAX_ATTEMPTS, Event, Phase, next_phase
from slmops.gateway.install.acquire import Acquirer
from slmops.gateway.install.documents import ReleaseDocuments
from slmops.gateway.install.golden import GoldenPrompts, read_golden
from slmops.gateway.install.probe import ProbeBudget, ProbeReport, probe
from slmops.gateway.install.slots import Slots
from slmops.gateway.report.reporter import Golden
from slmops.gateway.serving.inference import Done, InferenceRequest
from slmops.gateway.serving.inference import Release as ServedRelease
from slmops.gateway.serving.releases import Serving
from slmops.gateway.serving.runner import ProcessRunner, RunnerOptions
from slmops.kit.tracing import span

log = logging.getLogger(__name__)
_NO_LIMIT_BYTES = 1 << 62
_ANSWER_WITHIN = timedelta(minutes=2)
"""How long a golden prompt may take while soaking, as in the probe for all prompts together."""
_BUSY_FOR = timedelta(minutes=10)
"""How much longer than planned a soak may last because the gateway has no time for golden prompts."""
_SHORTEST_PAUSE_S = 0.05


class Updater:
    """Runs one update at a time. `phase` is its current phase; `on_phase` is called after each step."""

    def __init__(self, slots: Slots, acquirer: Acquirer, serving: Serving, releases: Path) -> None:
        self._slots = slots
        self._acquirer = acquirer
        self._serving = serving
        self._documents = ReleaseDocuments(releases)
        self._on_disk = slots.disk.complete
        self.phase = Phase.COMMITTED if slots.active and not slots.on_trial else Phase.IDLE
        self._applied: Release | None = None
        """The release whose settings the serving runner has."""
        self.measured: dict[str, float] = {}
        self.problems: dict[Digest, Problem] = {}
        self.golden: dict[Digest, Golden] = {}
        self.on_phase: Callable[[], None] = lambda: None

    def take_golden(self) -> dict[Digest, Golden]:
        """Returns the counts of golden prompts asked in service since the last call."""
        taken, self.golden = self.golden, {}
        return taken

    async def restore(self) -> None:
        """Serves the active slot after a start. Reverts a release that was on trial; it may be tried again."""
        trial = self._slots.active
        if self._slots.on_trial and trial is not None:
            # One crash may be a power cut. If the gateway goes down in every soak, the release is at fault.
            at_fault = self._slots.attempts(trial.digest) >= MAX_ATTEMPTS
            if at_fault:
                why = InferenceFailed(f"the gateway went down {MAX_ATTEMPTS} times while this release soaked")
                self.problems[trial.digest] = Problem.of(why)
            await self._on_disk(partial(self._slots.revert, failed=at_fault))
        if self._slots.active is not None:
            await self._serve_active()
            self.phase = Phase.COMMITTED

    async def refresh(self, release: Release) -> None:
        """Applies changed settings to the package that already serves, without downtime. May be repeated after an
        error."""
        slot = self._slots.active
        if slot is None or slot.digest != release.manifest.digest:
            return
        stored = await self._on_disk(partial(self.release, slot.digest))
        applied = self._applied or stored
        changed = applied is None or applied.runtime != release.runtime
        if changed:
            runner = _runner(release, slot.path)
            await runner.start()
            await self._serving.swap(runner)
            self._applied = release
        if stored != release:
            await self._on_disk(partial(self._documents.remember, release))
        if changed:
            await self._measure_settings(release, await self._on_disk(partial(read_golden, slot.path)))

    async def _measure_settings(self, release: Release, golden: GoldenPrompts) -> None:
        """Asks each golden prompt once with new settings. Otherwise an idle gateway would measure nothing in its stage.

        Wrong answers are only counted: the settings serve already, and the fleet's gate decides about them.
        """
        for prompt in golden.prompts:
            try:
                right = prompt.passes(await self._answer(golden.request(prompt)))
            except TemporaryError:  # too busy: then users' requests are measured
                continue
            except InferenceFailed:
                right = False
            self._count(release.manifest.digest, right)

    def _count(self, digest: Digest, right: bool) -> None:
        asked = self.golden.setdefault(digest, Golden())
        asked.passed, asked.failed = asked.passed + right, asked.failed + (not right)

    def failed_in(self, digest: Digest) -> str | None:
        """Returns the rollout in which this release failed here; None if it did not fail."""
        return self._documents.rollout(digest) if digest in self._slots.failed else None

    async def allow_retry(self, digest: Digest) -> None:
        """Clears the release's failure, because a new rollout of it was started."""
        await self._on_disk(partial(self._slots.clear_failure, digest))
        self.problems.pop(digest, None)

    async def update(self, release: Release, rollout: str) -> None:
        """Installs `release`. The previous release keeps serving after an error or a cancellation.

        Raises `TemporaryError` when the update may succeed later, `PermanentError` after the release was rejected.
        """
        digest = release.manifest.digest
        self._step(Event.UPDATE_WANTED)
        candidate: ProcessRunner | None = None
        try:
            await self._on_disk(partial(self._documents.remember, release))
            await self._on_disk(partial(self._documents.remember_attempt, digest, rollout))
            with span("install", release=str(digest)):
                slot = await self._acquirer.acquire(release)
            self._step(Event.INSTALL_SUCCEEDED)
            candidate = _runner(release, slot.path)
            with span("load"):
                await candidate.start()
            self._step(Event.LOAD_SUCCEEDED)
            golden = await self._on_disk(partial(read_golden, slot.path))
            with span("probe", prompts=len(golden.prompts)):
                await self._probe(candidate, golden, release)
            self._step(Event.PROBE_PASSED)
            await self._on_disk(self._slots.activate)
            await self._serving.swap(candidate)
            self._applied = release
            self._step(Event.SWAPPED)
            with span("soak", seconds=release.soak.seconds):
                await self._soak(candidate, golden, release)
            await self._on_disk(self._slots.commit)
            self._step(Event.SOAK_PASSED)
            await self._on_disk(self._acquirer.prune)
        except PermanentError as error:
            await asyncio.shield(self._give_up(release, candidate, error))
            raise
        except BaseException:
            await asyncio.shield(self._withdraw(candidate))
            raise

    async def _probe(self, candidate: ProcessRunner, golden: GoldenPrompts, release: Release) -> None:
        budget = ProbeBudget(
            min_tokens_per_s=release.min_tokens_per_s,
            max_ttft_s=release.probe.max_ttft_s,
            max_rss_bytes=release.max_rss_bytes or _NO_LIMIT_BYTES,
            min_pass_share=release.probe.min_pass_share,
        )
        report = await probe(candidate, golden, budget)
        self.measured = _figures(report) | {"fetched_bytes": float(self._acquirer.fetched_bytes)}
        if not report.passed:
            raise InferenceFailed(
                f"{release.model}:{release.version} failed the probe: {'; '.join(report.reasons)}",
                fix="Check what changed in the model; the gateway keeps its previous release.",
            )

    async def _soak(self, candidate: ProcessRunner, golden: GoldenPrompts, release: Release) -> None:
        """Runs golden prompts on the serving path, beside users' requests, for the time that the blueprint sets.

        A gateway that is too busy for a golden prompt asks again later, because that is not the release's fault. Raises
        `NotReady` if it is busy for `_BUSY_FOR` after the soak, and `InferenceFailed`.
        """
        loop = asyncio.get_running_loop()
        until = loop.time() + release.soak.seconds
        for prompt in itertools.cycle(golden.prompts):
            busy: NotReady | None = None
            try:
                right = prompt.passes(await self._answer(golden.request(prompt)))
            except NotReady as error:
                busy = error
            else:
                self._count(release.manifest.digest, right)
                if not right:
                    raise InferenceFailed("a golden prompt failed while soaking")
            if not candidate.alive:
                raise InferenceFailed("the model runner died while soaking")
            if busy is not None and loop.time() >= until + _BUSY_FOR.total_seconds():
                raise busy
            if busy is None and loop.time() >= until:
                return
            await asyncio.sleep(min(release.soak.golden_every_s, max(_SHORTEST_PAUSE_S, until - loop.time())))

    async def _answer(self, request: InferenceRequest) -> str:
        """Returns the answer. Raises `NotReady` if the gateway is busy, and `InferenceFailed` if it answers nobody."""
        answered = self._serving.answered
        try:
            async with asyncio.timeout(_ANSWER_WITHIN.total_seconds()):
                return await self._generated(request)
        except TimeoutError:
            if self._serving.answered > answered:
                raise NotReady("the gateway is too busy for a golden prompt") from None
            within = f"{_ANSWER_WITHIN.total_seconds():g} s"
            raise InferenceFailed(f"the model answered nothing within {within} while soaking") from None

    async def _generated(self, request: InferenceRequest) -> str:
        async with aclosing(self._serving.generate(request)) as items:
            async for _, item in items:
                if isinstance(item, Done):
                    return item.text
        raise InferenceFailed("the runner's answer stopped before it was complete")

    async def _give_up(self, release: Release, candidate: ProcessRunner | None, error: SlmopsError) -> None:
        """Records the release as failed, so that it is not tried again, and serves the previous one."""
        log.error("%s:%s failed: %s", release.model, release.version, error)
        digest = release.manifest.digest
        self.problems[digest] = Problem.of(error)
        self.phase = next_phase(self.phase, Event.STEP_FAILED)  # reported after the revert
        try:
            if self._slots.on_trial:
                await self._on_disk(self._slots.revert)
                await self._serve_active()
            elif (there := self._slots.candidate) is not None and there.digest == digest:
                await self._on_disk(self._slots.reject)
            else:
                await self._on_disk(partial(self._slots.fail, digest))
        finally:  # whatever fails, no process is left behind, and the next update can start
            await self._stop_unused(candidate)
            self._step(Event.REVERTED)

    async def _withdraw(self, candidate: ProcessRunner | None) -> None:
        """Undoes an update that was cancelled or failed through no fault of the release. It may be tried again."""
        try:
            if self._slots.on_trial:
                await self._on_disk(partial(self._slots.revert, failed=False, counts=False))
                await self._serve_active()
        finally:
            await self._stop_unused(candidate)
            if self.phase not in (Phase.IDLE, Phase.COMMITTED):
                self._step(Event.RESTARTED)

    async def _serve_active(self) -> None:
        slot = self._slots.active
        if slot is None:
            await self._serving.stop()
            return
        release = await self._on_disk(partial(self.release, slot.digest))
        if release is None:  # the plan brings the document again (`refresh`)
            log.error("the release document of the active slot is missing or damaged")
            await self._serving.stop()
        elif self._serving.release is None or self._serving.release.digest != slot.digest:
            runner = _runner(release, slot.path)
            try:
                await runner.start()
            except SlmopsError as error:  # `Serving` starts it again and again; meanwhile the gateway follows its plan
                log.error("%s:%s does not start: %s", release.model, release.version, error)
            await self._serving.swap(runner)
            self._applied = release

    async def _stop_unused(self, candidate: ProcessRunner | None) -> None:
        if candidate is not None and self._serving.release != candidate.release:
            await candidate.stop(timedelta())

    def release(self, digest: Digest) -> Release | None:
        """Returns the stored document of a release that was desired here before; None if there is none, or a damaged
        one."""
        return self._documents.release(digest)

    def _step(self, event: Event) -> None:
        self.phase = next_phase(self.phase, event)
        self.on_phase()


def _runner(release: Release, path: Path) -> ProcessRunner:
    served = ServedRelease(release.manifest.digest, release.model, release.version)
    return ProcessRunner(served, path, _options(release))


def _options(release: Release) -> RunnerOptions:
    return RunnerOptions(context_tokens=release.runtime.context_tokens, max_tokens=release.runtime.max_tokens)


def _figures(report: ProbeReport) -> dict[str, float]:
    figures = {"tokens_per_s": report.tokens_per_s, "ttft_s": report.ttft_s, "peak_rss_bytes": report.peak_rss_bytes}
    return {name: float(value) for name, value in figures.items() if value is not None}
