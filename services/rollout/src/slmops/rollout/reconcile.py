"""Reconciles rollouts: evaluates the gates of open stages, and writes each blueprint's plan to the twin's bucket.

It is level-triggered. An event that changes a rollout's progress marks its blueprint, and one loop judges the marked
blueprints, each at most once per 0.2 s however many events there are. The tick repairs what a crash or an unreachable
server left undone, because it compares the actual state with the desired one and needs no list of pending work.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from contextlib import suppress
from datetime import datetime, timedelta
from functools import partial

from prometheus_client import Histogram

from slmops.contracts import subjects
from slmops.contracts.errors import Conflict, TemporaryError
from slmops.kit.bus.service_bus import Bus
from slmops.kit.clock import Clock
from slmops.kit.journal import Journal, UnitOfWork
from slmops.kit.tracing import span
from slmops.rollout import progress_rows, store
from slmops.rollout.domain.clocks import with_clocks
from slmops.rollout.domain.decide import follow_gate
from slmops.rollout.domain.gate import Verdict, assess, measured_since
from slmops.rollout.domain.stages import NAMED
from slmops.rollout.presence_rows import wrong_clocks
from slmops.rollout.signing import PlanSigner

log = logging.getLogger("slmops.rollout")
_ATTEMPTS = 5
_AT_MOST_EVERY = timedelta(seconds=0.2)
"""How often a blueprint is judged at most."""
_JUDGEMENT = Histogram("slmops_judgement_seconds", "Time to evaluate a gate once, inside its transaction")


class Reconciler:
    def __init__(self, journal: Journal, bus: Bus, signer: PlanSigner, clock: Clock, tick_every: timedelta) -> None:
        self._journal = journal
        self._bus = bus
        self._signer = signer
        self._clock = clock
        self._tick_every = tick_every
        self._publishing = asyncio.Lock()
        self._marked: set[str] = set()
        self._wake = asyncio.Event()
        self._filling = False

    async def open(self) -> None:
        """Prepares the rollouts under way, before any report is consumed."""
        await self._journal.transact(store.count_places)

    def mark(self, blueprints: Iterable[str]) -> None:
        """Notes that something changed in the rollouts of these blueprints, so that they are judged soon."""
        self._marked.update(blueprints)
        if self._marked:
            self._wake.set()

    async def run(self) -> None:
        """Runs until cancelled."""
        loop = asyncio.get_running_loop()
        next_tick = loop.time()
        while True:
            self._wake.clear()
            marked, self._marked = self._marked, set()
            try:
                if loop.time() >= next_tick:
                    next_tick = loop.time() + self._tick_every.total_seconds()
                    await self._reconcile()
                else:
                    for blueprint in sorted(marked):
                        await self.judge(blueprint)
                await self.fill()
            except TemporaryError as error:
                log.warning("could not reconcile, retrying at the next tick: %s", error)
            await asyncio.sleep(0 if self._filling else min(_AT_MOST_EVERY, self._tick_every).total_seconds())
            with suppress(TimeoutError):
                async with asyncio.timeout_at(next_tick):
                    await self._wake.wait()

    async def _reconcile(self) -> None:
        for row in await self._journal.read(store.plans):
            await self.judge(row.name)
            await self.publish(row.name)

    async def fill(self) -> None:
        """Gives a page of gateways their places in each rollout that has just started."""
        self._filling = False
        for blueprint in await self._journal.read(progress_rows.unfilled):
            work = partial(_fill_page, blueprint=blueprint)
            self._filling |= await self._journal.transact(work)
            self.mark([blueprint])  # go on with the next page, or judge

    async def judge(self, blueprint: str) -> None:
        """Evaluates the gate of the blueprint's rollout, if it has one, and applies the decision.

        A blueprint that cannot be evaluated, for example one of an earlier release, holds up no other one.
        """
        try:
            await self._judge(blueprint)
        except TemporaryError:
            raise
        except Exception:
            log.exception("could not evaluate the gate of %s, trying again at the next tick", blueprint)

    async def _judge(self, blueprint: str) -> None:
        row = await self._journal.read(lambda connection: store.plan_row(connection, blueprint))
        if row is None or not row.judged:
            return
        if await self._journal.transact(lambda unit: _judge(unit, blueprint, self._clock())):
            await self.publish(blueprint)

    async def publish(self, blueprint: str) -> None:
        """Writes the plan to the bucket if it is not there. If the bus is unreachable, the next tick writes it."""
        try:
            async with self._publishing:
                for _ in range(_ATTEMPTS):
                    with suppress(Conflict):  # another process of this service wrote first: read both again
                        return await self._publish(blueprint)
                log.warning("other processes keep writing the plan of %s; retrying at the next tick", blueprint)
        except TemporaryError as error:
            log.warning("could not write the plan of %s, retrying at the next tick: %s", blueprint, error)

    async def _publish(self, blueprint: str) -> None:
        """Writes the plan if the bucket does not hold it. Raises `Conflict` if the bucket changed in between."""
        key = subjects.blueprint_key(blueprint)
        # Read the bucket first: its plan was committed before, so the row that is read next is not older. Write only if
        # the bucket has not changed since, so that a slow process never restores an older plan.
        held = await self._bus.client.read_desired(key)
        row = await self._journal.read(lambda connection: store.plan_row(connection, blueprint))
        plan, now = store.plan_in(row), self._clock()
        if plan is None or (held is not None and self._signer.still_good(held[0], plan, now)):
            return
        await self._bus.client.write_desired(key, self._signer.sign(plan, now), held[1] if held else 0)
        log.info("plan of %s written", blueprint)


def _fill_page(unit: UnitOfWork, blueprint: str) -> bool:
    return progress_rows.fill_page(unit.connection, blueprint)


@_JUDGEMENT.time()
def _judge(unit: UnitOfWork, blueprint: str, now: datetime) -> bool:
    """Evaluates the gate and commits its decision; returns whether there was one.

    Growth: the history of the blueprint, the stages and the windows of the open one, whatever the size of the fleet.
    """
    connection, state = unit.connection, store.load(unit, blueprint)
    store.begin_if_unknown(unit, state)
    rollout, row = state.under_way, store.plan_row(connection, blueprint)
    plan = store.plan_in(row)
    if rollout is None or row is None or plan is None:
        return False
    progress = progress_rows.progress_of(connection, rollout.id, rollout.stage, NAMED, complete=row.filled)
    measured = store.windows(connection, blueprint, measured_since(rollout, progress))
    decision = assess(state, rollout, progress, measured, now)
    if decision.verdict is Verdict.OVERDUE:
        decision = with_clocks(decision, wrong_clocks(connection, now, blueprint))
    events = follow_gate(state, rollout, decision, now)
    if not events:
        return False
    # Continue the trace of the command that started the rollout, so all stages of a rollout are in one trace.
    with span("judge rollout", parent=plan.traceparent, rollout=rollout.id, verdict=decision.verdict.value):
        store.commit(unit, state, events, now)
    log.info("rollout %s: %s: %s", rollout.id, decision.verdict, decision.reason)
    return True
