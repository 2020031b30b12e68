"""The steps of the demo, in the order in which a new user takes them."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import httpx

from slmops.console.commands.push import push
from slmops.contracts.blueprint import Blueprint
from slmops.contracts.commands import (
    ApplyBlueprint,
    GatewayView,
    ListGateways,
    ListRollouts,
    ListVersions,
    RolloutView,
    StartRollout,
    VersionView,
)
from slmops.contracts.errors import NotFound, TemporaryError, Unreachable
from slmops.contracts.events import UpdatePhase
from slmops.kit import tracing
from slmops.kit.bus.client import BusClient
from slmops.local.damage import damage
from slmops.local.demo.ask import QUESTION, Traffic, ask
from slmops.local.demo.report import GatewayReport, ModelReport, Report
from slmops.local.demo.story import Step, Story
from slmops.local.demo.traces import summarize
from slmops.local.demo.weights import fetch_weights
from slmops.local.layout import ADMIN
from slmops.local.system import System

MODEL, GOOD, BAD = "smollm2", "1.0.0", "1.0.1"
GOLDEN = Path(__file__).parent / "data" / "golden.jsonl"
ENDED = {"completed", "rolled_back", "aborted"}
# After this time a step has failed. It is several times what the step takes on two slow cores.
OPTIMIZED_WITHIN = timedelta(minutes=15)
ROLLED_OUT_WITHIN = timedelta(minutes=5)
_POLL_S = 0.5
T = TypeVar("T")


class Demo:
    """One run of the demo. `report.failures` lists the unmet expectations; the run succeeded if it is empty."""

    def __init__(self, story: Story, system: System, *, model: Path | None, golden: Path | None, work: Path) -> None:
        self.story = story
        self.system = system
        self.report = Report()
        self._model = model
        self._golden = golden or GOLDEN
        self._work = work
        self._client: BusClient | None = None

    async def run(self) -> None:
        """Runs all steps and always stops the system. Raises the error that ended the run early."""
        try:
            await self._start()
            with tracing.span("demo") as root:
                trace_id = f"{root.get_span_context().trace_id:032x}"
                source = await self._push_good()
                self.story.chapter("3. Optimize, evaluate, gate, package")
                await self._optimize(GOOD)
                await self._roll_out_good()
                await self._ask_all_gateways()
                await self._bad_version(source)
            await self._check_final_state(trace_id)
        finally:
            with self.story.step("stop", "Stopping everything"):
                if self._client is not None:
                    await self._client.close()
                await self.system.stop()
            self.report.timings_s = self.story.timings_s

    async def _start(self) -> None:
        self.story.chapter("1. The whole system on this machine")
        with self.story.step("start", "Starting NATS, S3, six services and three gateways") as step:
            await self.system.start(lambda state: step.progress(f"{state.name} {state.status}"))
        for state in self.system.states():
            self.story.tell(f"[dim]{state.name:10} pid {state.pid}[/]")
        settings = self.system.bus_settings(ADMIN, trace_file=self.system.layout.trace("console"))
        tracing.setup("console", settings)
        self._client = await BusClient.connect(settings, name="demo")

    @property
    def client(self) -> BusClient:
        assert self._client is not None, "connected by _start"
        return self._client

    async def _push_good(self) -> Path:
        self.story.chapter(f"2. Register a model: {MODEL} {GOOD}")
        source = self._model
        if source is None:
            with self.story.step("fetch", "Fetching SmolLM2-135M-Instruct (GGUF, Q4_1)"):
                source, cached = await fetch_weights(_cache())
            self.story.tell(f"[dim]{source.name}, {source.stat().st_size:,} bytes{', cached' if cached else ''}[/]")
        pushed = await self._push(source, GOOD)
        self.report.model = ModelReport(name=MODEL, version=GOOD, digest=pushed.digest)
        return source

    async def _push(self, source: Path, version: str) -> VersionView:
        with self.story.step("push", f"Pushing {MODEL}:{version}") as step:
            pushed = await push(
                self.client,
                source,
                name=MODEL,
                version=version,
                golden=self._golden,
                on_progress=lambda what, done, of: step.progress(f"{what} {done / max(of, 1):.0%}"),
            )
        self.story.tell(f"[dim]{pushed.architecture}, {pushed.size_bytes:,} bytes, {pushed.digest[:19]}…[/]")
        return pushed

    async def _optimize(self, version: str) -> None:
        async def look(step: Step) -> VersionView | None:
            view = await self._version(version)
            step.progress(view.progress or view.stage)
            return view if view.stage in ("packaged", "refused") else None

        with self.story.step(f"optimize {version}", "int8 and int4 against full precision") as step:
            view = await self._until(look, step, OPTIMIZED_WITHIN)
        for variant in view.variants:
            mark = "[green]chosen[/]" if variant.chosen else variant.gate
            self.story.tell(f"{variant.recipe}: {mark}; {variant.reason}")
        for package in view.packages:
            self.story.tell(f"signed package {package.manifest.digest[:19]}…, {package.size_bytes:,} bytes")
        self.report.add_version(view)
        self._expect(view.stage == "packaged", f"{version} was not packaged: {view.stage}")
        if view.stage != "packaged":
            raise NotFound(f"there is no package of {MODEL}:{version}", fix="See the reasons above.")

    async def _version(self, version: str) -> VersionView:
        return (await self.client.request(ListVersions(model=MODEL, version=version))).versions[0]

    async def _roll_out_good(self) -> None:
        self.story.chapter("4. A blueprint and a staged rollout: one canary, a gate, then the rest")
        applied = await self.client.request(ApplyBlueprint(spec=self._blueprint()))
        self.story.tell(f"blueprint {applied.spec.name} revision {applied.revision}: profile {applied.spec.profile}")
        ended = await self._roll_out(GOOD)
        self._expect(ended.state == "completed", f"the rollout of {GOOD} ended {ended.state}: {ended.reason}")

    def _blueprint(self) -> Blueprint:
        return Blueprint(name=self.system.gateways[0].blueprint, model=MODEL)

    async def _roll_out(self, version: str) -> RolloutView:
        started = await self._retried(
            lambda: self.client.request(StartRollout(blueprint=self._blueprint().name, version=version))
        )

        async def look(step: Step) -> RolloutView | None:
            rollouts = (await self.client.request(ListRollouts(blueprint=started.blueprint))).rollouts
            view = next(r for r in rollouts if r.rollout == started.rollout)
            stage = view.stages[min(view.stage, len(view.stages) - 1)]
            step.progress(f"stage {stage.name}: {stage.committed} of {stage.targets} committed; {stage.waiting}")
            return view if view.state in ENDED else None

        with self.story.step(f"rollout {version}", f"Rolling out {version}") as step:
            view = await self._until(look, step, ROLLED_OUT_WITHIN)
        self.story.tell(f"{version}: [bold]{view.state}[/]; {view.reason}")
        self.report.add_rollout(view)
        return view

    async def _ask_all_gateways(self) -> None:
        self.story.chapter(f"5. Ask each gateway: {QUESTION}")
        self.report.gateways = []
        async with httpx.AsyncClient(timeout=60) as http:
            with self.story.step("ask", "Asking"):
                for view in await self._fleet():
                    answer = await ask(http, self.system.api_url(view.gateway_id))
                    self.report.gateways.append(
                        GatewayReport(
                            id=view.gateway_id,
                            version=view.running_version,
                            answer=answer.text,
                            tokens_per_s=answer.tokens_per_s,
                            failed_requests=0,
                        )
                    )
        for gateway in self.report.gateways:
            self.story.tell(f"{gateway.id} ({gateway.version}): {gateway.answer} [dim]{gateway.tokens_per_s} tok/s[/]")
            self._expect(gateway.version == GOOD, f"{gateway.id} runs {gateway.version}, not {GOOD}")
            if self._model is None:
                self._expect("Paris" in gateway.answer, f"{gateway.id} does not know the capital of France")

    async def _bad_version(self, source: Path) -> None:
        self.story.chapter(f"6. A bad version: {BAD} loads, is fast, and gives nonsense answers")
        with self.story.step("damage", "Damaging the weights"):
            damaged = await asyncio.to_thread(damage, source, self._work / f"damaged-{source.name}")
        await self._push(damaged, BAD)
        await self._optimize(BAD)
        canary = self.system.gateways[0].id
        async with Traffic(self.system.api_url(canary)) as traffic:
            ended = await self._roll_out(BAD)
            await asyncio.sleep(2)  # also count requests after the rollback
        self.story.tell(f"{traffic.requests} requests to {canary} meanwhile, {traffic.failed} failed")
        self.report.gateways[0].failed_requests = traffic.failed
        self._expect(ended.state == "rolled_back", f"the rollout of {BAD} ended {ended.state}, not rolled_back")
        self._expect(traffic.requests > 0, "no request reached the canary during the bad rollout")
        self._expect(traffic.failed == 0, f"{traffic.failed} requests failed: {traffic.last_error}")
        if self._model is None:
            self._expect(traffic.wrong == 0, f"{traffic.wrong} answers to users were nonsense")

    async def _check_final_state(self, trace_id: str) -> None:
        self.story.chapter("7. Check what each gateway runs now")
        manifests = {p.manifest.digest for p in (await self._version(BAD)).packages}
        for view in await self._fleet():
            is_canary = view.labels.get("ring") == "canary"
            self.story.tell(f"{view.gateway_id}: {view.running_version}, {view.phase}")
            self._expect(view.running_version == GOOD, f"{view.gateway_id} is on {view.running_version}, not {GOOD}")
            seen = await asyncio.to_thread(self._ever_wanted, view.gateway_id, manifests)
            self._expect(seen == is_canary, f"{view.gateway_id} {'saw' if seen else 'never saw'} {BAD}")
        await asyncio.sleep(1)  # span exporters write every half second
        self.report.trace = summarize(self.system.layout.traces, trace_id)
        wanted = {"console", "registry", "optimizer", "packager", "rollout", "telemetry", "gateway"}
        missing = wanted - set(self.report.trace.services)
        self._expect(not missing, f"the trace has no spans from {', '.join(sorted(missing))}")

    def _ever_wanted(self, gateway: str, manifests: set[str]) -> bool:
        """Returns whether one of these packages was ever desired on the gateway, which stores every desired release."""
        releases = self.system.layout.home(gateway) / "releases"
        return any((releases / f"{manifest.removeprefix('sha256:')}.json").exists() for manifest in manifests)

    async def _fleet(self) -> list[GatewayView]:
        async def settled(_step: Step | None = None) -> list[GatewayView] | None:
            views = (await self.client.request(ListGateways())).gateways
            resting = all(v.phase in (UpdatePhase.COMMITTED, UpdatePhase.IDLE) and v.running_version for v in views)
            return sorted(views, key=lambda v: v.gateway_id) if resting else None

        return await self._until(settled, None, timedelta(seconds=60))

    async def _until(self, look: Callable[[Step], Awaitable[T | None]], step: Step | None, within: timedelta) -> T:
        deadline = asyncio.get_running_loop().time() + within.total_seconds()
        while asyncio.get_running_loop().time() < deadline:
            try:
                if (found := await look(step)) is not None:  # type: ignore[arg-type]
                    return found
            except TemporaryError:
                pass  # a service restarts; try again until the deadline
            await asyncio.sleep(_POLL_S)
        detail = step.detail if step else ""
        raise Unreachable(f"the step did not finish within {within}: {detail}", fix=f"Logs: {self.system.layout.logs}")

    async def _retried(self, work: Callable[[], Awaitable[T]]) -> T:
        """Repeats `work`, because a package that was just published may not have reached the rollout service yet."""
        for _ in range(20):
            try:
                return await work()
            except (NotFound, TemporaryError):
                await asyncio.sleep(_POLL_S)
        return await work()

    def _expect(self, holds: bool, otherwise: str) -> None:
        if not holds:
            self.report.failures.append(otherwise)


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "slmops"
