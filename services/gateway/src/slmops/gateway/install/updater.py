"""Carries one release from wanted to committed, or back: download, verify, load, probe, swap, soak, commit.

Success is proved here, at the edge. Whatever goes wrong, the release that served before serves on (or again), and the
cloud is not needed for that.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable
from contextlib import aclosing
from datetime import timedelta
from pathlib import Path

from slmops.contracts.descriptor import Digest
from slmops.contracts.errors import InferenceFailed, PermanentError, Problem, SlmopsError
from slmops.contracts.golden import GoldenPrompt, parse_golden
from slmops.contracts.manifest import GOLDEN_PATH
from slmops.contracts.plan import Release
from slmops.gateway.disk_full import raise_disk_full
from slmops.gateway.domain import MAX_ATTEMPTS, Event, Phase, next_phase
from slmops.gateway.install.acquire import Acquirer
from slmops.gateway.install.probe import ProbeBudget, ProbeReport, probe
from slmops.gateway.install.slots import Slots
from slmops.gateway.report.reporter import Golden
from slmops.gateway.serving.inference import ChatMessage, Done, InferenceRequest
from slmops.gateway.serving.inference import Release as ServedRelease
from slmops.gateway.serving.releases import Serving
from slmops.gateway.serving.runner import ProcessRunner, RunnerOptions
from slmops.kit.tracing import span

log = logging.getLogger(__name__)
_NO_LIMIT_BYTES = 1 << 62


class Updater:
    """One update at a time. `phase` is where it is; `on_phase` is told of each step."""

    def __init__(self, slots: Slots, acquirer: Acquirer, serving: Serving, releases: Path) -> None:
        self._slots = slots
        self._acquirer = acquirer
        self._serving = serving
        self._releases = releases
        self.phase = Phase.COMMITTED if slots.active and not slots.on_trial else Phase.IDLE
        self.measured: dict[str, float] = {}
        self.problems: dict[Digest, Problem] = {}
        self.golden: dict[Digest, Golden] = {}
        self.on_phase: Callable[[], None] = lambda: None

    def take_golden(self) -> dict[Digest, Golden]:
        """Golden prompts asked while soaking, since the last call."""
        taken, self.golden = self.golden, {}
        return taken

    async def restore(self) -> None:
        """After a start: serve what the slots say. A release that was on trial goes back; it may be tried again."""
        trial = self._slots.active
        if self._slots.on_trial and trial is not None:
            # Once may be a power cut; a release under which the gateway goes down every time is at fault.
            at_fault = self._slots.attempts(trial.digest) >= MAX_ATTEMPTS
            if at_fault:
                why = InferenceFailed(f"the gateway went down {MAX_ATTEMPTS} times while this release soaked")
                self.problems[trial.digest] = Problem.of(why)
            self._slots.revert(failed=at_fault)
        if self._slots.active is not None:
            await self._serve_active()
            self.phase = Phase.COMMITTED

    async def refresh(self, release: Release) -> None:
        """The package that serves is wanted with other settings: serve it with those. Nothing is down meanwhile."""
        slot = self._slots.active
        known = self.release(release.manifest.digest)
        if slot is None or slot.digest != release.manifest.digest or known == release:
            return
        self._remember(release)
        if known is None or known.runtime != release.runtime:
            runner = _runner(release, slot.path)
            await runner.start()
            await self._serving.swap(runner)

    def failed_in(self, digest: Digest) -> str | None:
        """The rollout in which this release failed here; None when it did not."""
        file = self._failure(digest)
        return file.read_text() if digest in self._slots.failed and file.exists() else None

    def forgive(self, digest: Digest) -> None:
        """It may be tried again: somebody started another rollout of it."""
        self._slots.forget_failed(digest)
        self.problems.pop(digest, None)

    async def update(self, release: Release, rollout: str) -> None:
        """Install `release`. Raises `TemporaryError` when it may work later, `PermanentError` after it was rejected;
        both, and a cancellation, leave what served before serving."""
        digest = release.manifest.digest
        self._step(Event.UPDATE_WANTED)
        candidate: ProcessRunner | None = None
        try:
            self._remember(release)
            with raise_disk_full("to remember a rollout", self._releases):
                self._failure(digest).write_text(rollout)
            with span("install", release=str(digest)):
                slot = await self._acquirer.acquire(release)
            self._step(Event.INSTALL_SUCCEEDED)
            candidate = _runner(release, slot.path)
            with span("load"):
                await candidate.start()
            self._step(Event.LOAD_SUCCEEDED)
            golden = _golden(slot.path)
            with span("probe", prompts=len(golden)):
                await self._probe(candidate, golden, release)
            self._step(Event.PROBE_PASSED)
            self._slots.activate()
            await self._serving.swap(candidate)
            self._step(Event.SWAPPED)
            with span("soak", seconds=release.soak.seconds):
                await self._soak(candidate, golden, release)
            self._slots.commit()
            self._step(Event.SOAK_PASSED)
            self._acquirer.prune()
        except PermanentError as error:
            await asyncio.shield(self._give_up(release, candidate, error))
            raise
        except BaseException:
            await asyncio.shield(self._withdraw(candidate))
            raise

    async def _probe(self, candidate: ProcessRunner, golden: tuple[GoldenPrompt, ...], release: Release) -> None:
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
                f"the probe refused {release.model}:{release.version}: {'; '.join(report.reasons)}",
                fix="Look at what changed in the model; the gateway stays on its release.",
            )

    async def _soak(self, candidate: ProcessRunner, golden: tuple[GoldenPrompt, ...], release: Release) -> None:
        """Golden prompts on the serving path, for as long as the blueprint says, users' requests beside them."""
        loop = asyncio.get_running_loop()
        until = loop.time() + release.soak.seconds
        for prompt in itertools.cycle(golden):
            right = prompt.passes(await self._answer(prompt))
            asked = self.golden.setdefault(release.manifest.digest, Golden())
            asked.passed, asked.failed = asked.passed + right, asked.failed + (not right)
            if not right:
                raise InferenceFailed("a golden prompt failed while soaking")
            if not candidate.alive:
                raise InferenceFailed("the model runner died while soaking")
            if loop.time() >= until:
                return
            await asyncio.sleep(min(release.soak.golden_every_s, max(0.0, until - loop.time())))

    async def _answer(self, prompt: GoldenPrompt) -> str:
        request = InferenceRequest(
            messages=(ChatMessage(role="user", content=prompt.prompt),), max_tokens=prompt.max_tokens, stream=False
        )
        async with aclosing(self._serving.generate(request)) as items:
            async for _, item in items:
                if isinstance(item, Done):
                    return item.text
        raise InferenceFailed("the runner ended an answer without its end")

    async def _give_up(self, release: Release, candidate: ProcessRunner | None, error: SlmopsError) -> None:
        """The release is at fault: it is not tried again, and what served before serves."""
        log.error("%s:%s failed: %s", release.model, release.version, error)
        digest = release.manifest.digest
        self.problems[digest] = Problem.of(error)
        self.phase = next_phase(self.phase, Event.STEP_FAILED)  # reported when it is behind us, with what runs then
        if self._slots.on_trial:
            self._slots.revert()
            await self._serve_active()
        elif (there := self._slots.candidate) is not None and there.digest == digest:
            self._slots.reject()
        else:
            self._slots.fail(digest)
        await self._stop_unused(candidate)
        self._step(Event.REVERTED)

    async def _withdraw(self, candidate: ProcessRunner | None) -> None:
        """Not the release's fault, or nobody wants it any more: as before, and it may be tried again."""
        if self._slots.on_trial:
            self._slots.revert(failed=False)
            await self._serve_active()
        await self._stop_unused(candidate)
        if self.phase not in (Phase.IDLE, Phase.COMMITTED):
            self._step(Event.RESTARTED)

    async def _serve_active(self) -> None:
        slot = self._slots.active
        if slot is None:
            await self._serving.stop()
            return
        release = self.release(slot.digest)
        if release is None:
            raise PermanentError("the active slot's release document is missing", where=str(self._releases))
        if self._serving.release is None or self._serving.release.digest != slot.digest:
            runner = _runner(release, slot.path)
            await runner.start()
            await self._serving.swap(runner)

    async def _stop_unused(self, candidate: ProcessRunner | None) -> None:
        if candidate is not None and self._serving.release != candidate.release:
            await candidate.stop(timedelta())

    def release(self, digest: Digest) -> Release | None:
        """What is known of a release that this gateway once wanted."""
        path = self._document(digest)
        return Release.model_validate_json(path.read_bytes()) if path.exists() else None

    def _remember(self, release: Release) -> None:
        """So that it can be served after a restart without a network."""
        path = self._document(release.manifest.digest)
        with raise_disk_full("to remember a release", self._releases):
            path.parent.mkdir(parents=True, exist_ok=True)
            new = path.with_suffix(".new")
            new.write_text(release.model_dump_json())
            new.replace(path)

    def _document(self, digest: Digest) -> Path:
        return self._releases / f"{digest.removeprefix('sha256:')}.json"

    def _failure(self, digest: Digest) -> Path:
        """Names the rollout of the latest attempt; a failure if the slots say that it failed."""
        return self._document(digest).with_suffix(".rollout")

    def _step(self, event: Event) -> None:
        self.phase = next_phase(self.phase, event)
        self.on_phase()


def _runner(release: Release, path: Path) -> ProcessRunner:
    served = ServedRelease(release.manifest.digest, release.model, release.version)
    return ProcessRunner(served, path, _options(release))


def _options(release: Release) -> RunnerOptions:
    return RunnerOptions(context_tokens=release.runtime.context_tokens, max_tokens=release.runtime.max_tokens)


def _golden(path: Path) -> tuple[GoldenPrompt, ...]:
    file = path / GOLDEN_PATH
    return parse_golden(file.read_text()) if file.exists() else ()


def _figures(report: ProbeReport) -> dict[str, float]:
    figures = {"tokens_per_s": report.tokens_per_s, "ttft_s": report.ttft_s, "peak_rss_bytes": report.peak_rss_bytes}
    return {name: float(value) for name, value in figures.items() if value is not None}
