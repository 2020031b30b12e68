"""The places of gateways as rows: they say what listing the fleet says, and cost the same in every fleet."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import create_engine, delete, event, insert, select, update
from sqlalchemy.engine import Engine
from unit.rollout.rollout_examples import NAME, T0, at, blueprint, failure, listed, package, report

from slmops.contracts.blueprint import Stage
from slmops.contracts.commands import AbortRollout, ApplyBlueprint, PauseRollout, ResumeRollout, StartRollout
from slmops.contracts.errors import Denied
from slmops.contracts.events import (
    Event,
    GatewayEnrolled,
    GatewayMoved,
    GatewayRemoved,
    GatewayReported,
    GatewayRevoked,
    UpdatePhase,
)
from slmops.kit.bus.service_bus import Bus
from slmops.kit.journal import Journal, UnitOfWork
from slmops.kit.settings import BusSettings
from slmops.rollout import inventory_rows, progress_rows, store
from slmops.rollout.domain.blueprint import BlueprintState, Rollout
from slmops.rollout.domain.decide import apply_blueprint, follow_gate, operate, start_rollout
from slmops.rollout.domain.fleet import Sighting
from slmops.rollout.domain.gate import GateDecision, Verdict
from slmops.rollout.domain.stages import Progress, RolloutProgress
from slmops.rollout.reconcile import Reconciler, _judge
from slmops.rollout.report_rows import Recorded, Report, record_reports
from slmops.rollout.signing import PlanSigner
from slmops.rollout.tables import BLUEPRINTS, COUNTS, GATEWAYS, MEMBERS

STAGES = (
    Stage(name="canary", selector={"ring": "canary"}),
    Stage(name="half", percent=50),
    Stage(name="kiosks", selector={"ring": "kiosk"}),
)
KEY = "U" + "A" * 55
SEEN = Sighting(at(60))
PASSED = GateDecision(Verdict.PASSED, "passed")


def _journal(url: str) -> Journal:
    return Journal(url, service="rollout", metadata=store.schema(), migrations=None, project=store.project)


@pytest.fixture
async def journal(tmp_path: Path) -> AsyncIterator[Journal]:
    journal = _journal(f"sqlite:///{tmp_path}/j.db")
    await journal.open()
    yield journal
    await journal.close()


def apply(unit: UnitOfWork, name: str = NAME) -> None:
    state, command = store.load(unit, name), ApplyBlueprint(spec=blueprint().model_copy(update={"name": name}))
    store.commit(unit, state, apply_blueprint(state, command, T0), T0)


def start(unit: UnitOfWork, version: str = "1.0.0", name: str = NAME) -> None:
    state, command = store.load(unit, name), StartRollout(blueprint=name, version=version, stages=STAGES)
    store.commit(unit, state, start_rollout(state, command, [package(version)], T0), T0)


def decide(unit: UnitOfWork, decision: Callable[[BlueprintState, Rollout], list[Any]], name: str = NAME) -> None:
    state = store.load(unit, name)
    if state.under_way is not None:
        store.commit(unit, state, decision(state, state.under_way), T0)


def enrolled(gateway_id: str, ring: str = "fleet", number: int = 1, name: str = NAME, key: str = "U") -> Event:
    return GatewayEnrolled(
        gateway_id=gateway_id, blueprint=name, public_key=key, labels={"ring": ring}, enrolment=number, at=T0
    )


def record(unit: UnitOfWork, *events: GatewayReported) -> Recorded:
    return record_reports(unit.connection, {n: Report(event, SEEN) for n, event in enumerate(events)})


def kept(unit: UnitOfWork, name: str = NAME) -> RolloutProgress:
    """Returns the progress by the rows, without the counters that are 0."""
    rollout, row = store.load(unit, name).under_way, store.plan_row(unit.connection, name)
    assert rollout is not None
    assert row is not None
    found = progress_rows.progress_of(unit.connection, rollout.id, rollout.stage, 99, complete=row.filled)
    return replace(found, counts={key: number for key, number in found.counts.items() if number})


def by_listing(unit: UnitOfWork, name: str = NAME) -> RolloutProgress:
    rollout = store.load(unit, name).under_way
    assert rollout is not None
    return listed(rollout, inventory_rows.members(unit.connection, name))


# ---- the same as listing the fleet ------------------------------------------------------------------------

IDS = [f"gw-{number}" for number in range(1, 6)]
NAMES = [NAME, "kiosk"]
gateways, names = st.sampled_from(IDS), st.sampled_from(NAMES)
rings = st.sampled_from(["canary", "fleet", "kiosk", ""])
reports = st.fixed_dictionaries(
    {
        "phase": st.sampled_from([UpdatePhase.COMMITTED, UpdatePhase.FAILED, UpdatePhase.IDLE]),
        "version": st.sampled_from(["1.0.0", "1.0.1"]),
        "ring": rings,
        "later": st.integers(-1, 1),
        "sequence": st.integers(1, 9),
    }
)
steps = st.one_of(
    st.tuples(st.just("report"), gateways, names, reports),
    st.tuples(st.just("report"), gateways, names, reports),
    st.tuples(st.just("enrol"), gateways, names, rings, st.sampled_from("AB")),
    st.tuples(st.sampled_from(["revoke", "remove"]), gateways),
    st.tuples(st.just("move"), gateways, names),
    st.tuples(st.sampled_from(["start", "advance", "abort", "pause", "resume", "fill", "restart"]), names),
)


class Fleet:
    """Carries out steps on the tables, as the service does when it receives events and commands."""

    def __init__(self, unit: UnitOfWork) -> None:
        self.unit = unit
        self.versions = itertools.cycle(["1.0.0", "1.0.1"])
        self.numbers = itertools.count(1)
        for name in NAMES:
            apply(unit, name)

    def tell(self, event: Event) -> None:
        store.project(self.unit.connection, event)

    def report(self, gateway_id: str, name: str, how: dict[str, Any]) -> None:
        rollout = store.load(self.unit, name).latest
        generation = max(0, (rollout.generation if rollout else 0) + how["later"])
        make = failure if how["phase"] is UpdatePhase.FAILED else lambda *of: report(of[0], how["phase"], *of[1:])
        labels = {"ring": how["ring"]} if how["ring"] else {}
        made = make(gateway_id, how["version"], generation)
        record(self.unit, made.model_copy(update={"labels": labels, "blueprint": name, "sequence": how["sequence"]}))

    def enrol(self, gateway_id: str, name: str, ring: str, key: str) -> None:
        self.tell(enrolled(gateway_id, ring, next(self.numbers), name, key))

    def revoke(self, gateway_id: str) -> None:
        self.tell(GatewayRevoked(gateway_id=gateway_id, public_key=KEY, revoked_at=T0))

    def remove(self, gateway_id: str) -> None:
        self.tell(GatewayRemoved(gateway_id=gateway_id, blueprint=NAME, at=T0))

    def move(self, gateway_id: str, name: str) -> None:
        self.tell(GatewayMoved(gateway_id=gateway_id, previous=NAME, blueprint=name, at=T0))

    def start(self, name: str) -> None:
        if store.load(self.unit, name).under_way is None:
            start(self.unit, next(self.versions), name)

    def advance(self, name: str) -> None:
        state = store.load(self.unit, name)
        if state.under_way and state.under_way.state.value == "running":
            decide(self.unit, lambda s, r: follow_gate(s, r, PASSED, T0), name)

    def abort(self, name: str) -> None:
        decide(self.unit, lambda s, r: operate(s, AbortRollout(blueprint=name), T0), name)

    def pause(self, name: str) -> None:
        decide(self.unit, lambda s, r: operate(s, PauseRollout(blueprint=name), T0), name)

    def resume(self, name: str) -> None:
        decide(self.unit, lambda s, r: operate(s, ResumeRollout(blueprint=name), T0), name)

    def fill(self, name: str) -> None:
        progress_rows.fill_page(self.unit.connection, name)

    def restart(self, name: str) -> None:
        store.count_places(self.unit)

    def check(self) -> None:
        for name in NAMES:
            row = store.plan_row(self.unit.connection, name)
            if row and row.generation is not None and row.filled:
                assert kept(self.unit, name) == by_listing(self.unit, name)


@pytest.fixture(scope="module")
def tables() -> Iterator[UnitOfWork]:
    journal, engine = _journal("sqlite://"), create_engine("sqlite://")
    with engine.connect() as connection:
        journal.metadata.create_all(connection)
        connection.commit()
        yield UnitOfWork(journal, connection)


@settings(max_examples=20, deadline=None)
@given(history=st.lists(steps, min_size=5, max_size=20))
def test_rows_and_counters_say_what_listing_the_fleet_says(tables: UnitOfWork, history: list[Any]) -> None:
    with mock.patch.object(progress_rows, "PAGE", 2):
        fleet = Fleet(tables)
        for gateway_id, ring in zip(IDS, ("canary", "fleet", "fleet", "kiosk"), strict=False):
            fleet.enrol(gateway_id, NAME, ring, "A")
        fleet.start(NAME)
        for name, *arguments in history:
            getattr(fleet, name)(*arguments)
            fleet.check()
        while unfilled := progress_rows.unfilled(tables.connection):
            fleet.fill(unfilled[0])
        fleet.check()
        tables.connection.rollback()


# ---- single rules -----------------------------------------------------------------------------------------


async def test_a_place_follows_labels_and_reports_and_membership(journal: Journal) -> None:
    def work(unit: UnitOfWork) -> None:
        apply(unit)
        store.project(unit.connection, enrolled("gw-1", "canary"))
        start(unit)
        generation = store.load(unit, NAME).version
        assert kept(unit).counts == {(0, Progress.WAITING): 1}
        committed = report("gw-1", UpdatePhase.COMMITTED, "1.0.0", generation, labels={"ring": "canary"})
        assert record(unit, committed) == Recorded(changed={NAME})
        assert kept(unit).counts == {(0, Progress.COMMITTED): 1}
        again = committed.model_copy(update={"sequence": 2})
        assert record(unit, again) == Recorded(), "a repeated report changes nothing, so nothing is judged"
        kiosk = again.model_copy(update={"sequence": 3, "labels": {"ring": "kiosk"}, "phase": UpdatePhase.IDLE})
        assert record(unit, kiosk).changed == {NAME}
        [(stage, progress)] = kept(unit).counts
        assert (stage > 0, progress) == (True, Progress.WAITING)
        store.project(unit.connection, GatewayMoved(gateway_id="gw-1", previous=NAME, blueprint="kiosk", at=T0))
        assert kept(unit).counts == {}

    await journal.transact(work)


async def test_a_refused_report_changes_nothing_and_the_others_of_its_batch_are_recorded(journal: Journal) -> None:
    def work(unit: UnitOfWork) -> Recorded:
        apply(unit)
        for gateway_id, ring in (("gw-1", "canary"), ("gw-2", "fleet")):
            store.project(unit.connection, enrolled(gateway_id, ring))
        start(unit)
        generation = store.load(unit, NAME).version
        good = report("gw-1", UpdatePhase.COMMITTED, "1.0.0", generation)
        recorded = record(
            unit,
            failure("gw-2", "1.0.0", generation),  # the open stage does not give it the candidate
            good,
            good.model_copy(update={"gateway_id": "gw-9"}),
            good.model_copy(update={"blueprint": "kiosk", "sequence": 2}),
            report("gw-2", UpdatePhase.IDLE, "1.0.0", 0, sequence=2),
        )
        assert kept(unit).counts[0, Progress.COMMITTED] == 1
        sequences = select(GATEWAYS.c.sequence, GATEWAYS.c.failure).order_by(GATEWAYS.c.gateway_id)
        assert unit.connection.execute(sequences).all() == [(1, None), (2, None)]
        return recorded

    recorded = await journal.transact(work)
    assert {number: type(error) for number, error in recorded.refused.items()} == {0: Denied, 3: Denied}
    assert (recorded.unknown, recorded.changed) == ([2], {NAME})


@pytest.mark.parametrize("lost", ["rows", "counters"])
async def test_the_start_of_the_service_makes_the_rows_of_a_rollout_under_way(journal: Journal, lost: str) -> None:
    """An earlier release started it, or somebody changed the database."""

    def work(unit: UnitOfWork) -> tuple[RolloutProgress, RolloutProgress]:
        apply(unit)
        for number in range(30):
            store.project(unit.connection, enrolled(f"gw-{number:02}", "canary" if number % 3 else "fleet"))
        start(unit)
        before = kept(unit)
        if lost == "rows":
            unit.connection.execute(delete(MEMBERS))
            unit.connection.execute(delete(COUNTS))
            unit.connection.execute(update(BLUEPRINTS).values(generation=None))
        else:
            unit.connection.execute(update(COUNTS).values(gateways=7))
        store.count_places(unit)
        return before, kept(unit)

    before, after = await journal.transact(work)
    assert before == after
    assert before.targets(0).waiting == 20


async def test_filling_goes_on_after_a_crash_and_beside_another_process(
    journal: Journal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress_rows, "PAGE", 10)

    def begin(unit: UnitOfWork) -> int:
        apply(unit)
        for number in range(10, 45):
            store.project(unit.connection, enrolled(f"gw-{number}", "canary"))
        start(unit)
        return store.load(unit, NAME).version

    generation = await journal.transact(begin)
    other = _journal(f"sqlite:///{tmp_path}/j.db")
    first, second = (_reconciler(one, tmp_path) for one in (journal, other))
    await first.fill()

    def meanwhile(unit: UnitOfWork) -> None:
        assert not kept(unit).complete
        committed = [
            report(f"gw-{n}", UpdatePhase.COMMITTED, "1.0.0", generation, labels={"ring": "canary"}) for n in (11, 44)
        ]
        assert record(unit, *committed).refused == {}
        store.project(unit.connection, enrolled("gw-00", "canary"))
        store.project(unit.connection, enrolled("gw-99", "canary"))
        store.project(unit.connection, GatewayRevoked(gateway_id="gw-43", public_key=KEY, revoked_at=T0))
        assert not _judge(unit, NAME, at(10**6)), "no gate is decided on incomplete numbers, not even as overdue"

    await journal.transact(meanwhile)
    for _ in range(3):
        await asyncio.gather(first.fill(), second.fill())
    found = await journal.transact(kept)
    assert found == await journal.transact(by_listing)
    assert (found.complete, found.targets(0).committed, found.targets(0).waiting) == (True, 2, 34)
    await other.close()


def _reconciler(journal: Journal, folder: Path, kind: type[Reconciler] = Reconciler) -> Reconciler:
    bus, signer = Bus("rollout", BusSettings()), PlanSigner(folder / "none")
    return kind(journal, bus, signer, lambda: T0, timedelta(hours=1))


# ---- what it costs ----------------------------------------------------------------------------------------


@contextmanager
def statements() -> Iterator[list[str]]:
    found: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_rest: Any) -> None:
        found.append(statement)

    event.listen(Engine, "before_cursor_execute", note)
    try:
        yield found
    finally:
        event.remove(Engine, "before_cursor_execute", note)


@contextmanager
def database_steps(unit: UnitOfWork) -> Iterator[list[int]]:
    """Counts the instructions of SQLite's virtual machine: rows that are read cost some, whatever the machine does."""
    found = [0]

    def note() -> None:
        found[0] += 1

    driver: Any = unit.connection.connection.driver_connection
    driver.set_progress_handler(note, 10)
    try:
        yield found
    finally:
        driver.set_progress_handler(None, 0)


async def _fleet_of(journal: Journal, size: int) -> int:
    """Enrols gateways, of which half are canaries, and starts a rollout; returns its generation."""

    def work(unit: UnitOfWork) -> int:
        apply(unit)
        rows = [
            {
                "gateway_id": f"gw-{number:05}",
                "blueprint": NAME,
                "enrolled": enrolled(f"gw-{number:05}", ("canary", "fleet")[number % 2]).model_dump_json(),
            }
            for number in range(size)
        ]
        unit.connection.execute(insert(GATEWAYS), rows)
        start(unit)
        while progress_rows.fill_page(unit.connection, NAME):
            pass
        return store.load(unit, NAME).version

    return await journal.transact(work)


async def _cost(folder: Path, size: int, batch: int) -> dict[str, Any]:
    journal = _journal(f"sqlite:///{folder}/{size}-{batch}.db")
    await journal.open()
    generation = await _fleet_of(journal, size)

    def reports(unit: UnitOfWork) -> int:
        canaries = itertools.islice(itertools.cycle(range(0, size, 2)), batch)
        made = [
            report(f"gw-{n:05}", phase, "1.0.0", generation, labels={"ring": "canary"}, sequence=number)
            for number, (n, phase) in enumerate(
                zip(canaries, itertools.cycle([UpdatePhase.COMMITTED, UpdatePhase.FAILED]), strict=False), start=1
            )
        ]
        with statements() as found:
            assert record(unit, *made).changed == {NAME}
        return len(found)

    def judgement(unit: UnitOfWork) -> tuple[int, int]:
        with statements() as found, database_steps(unit) as steps:
            assert not _judge(unit, NAME, T0)
        return len(found), steps[0]

    def view(unit: UnitOfWork) -> tuple[int, int]:
        with statements() as found, database_steps(unit) as steps:
            shown = store.latest_view(unit, store.load(unit, NAME), T0)
        assert len(shown.attention) == 20
        return len(found), steps[0]

    cost = {"view": await journal.transact(view), "judgement": await journal.transact(judgement)}
    cost["reports"] = await journal.transact(reports)
    await journal.close()
    return cost


async def test_a_batch_a_judgement_and_a_view_cost_the_same_in_a_larger_fleet(tmp_path: Path) -> None:
    small, large = await _cost(tmp_path, 100, 16), await _cost(tmp_path, 2000, 256)
    assert small["reports"] == large["reports"] <= 13
    for kind in ("judgement", "view"):
        assert small[kind][0] == large[kind][0] <= 8
        assert large[kind][1] <= 1.2 * small[kind][1] + 5


async def test_many_changes_cause_one_judgement(journal: Journal, tmp_path: Path) -> None:
    judged: list[str] = []
    wanted = asyncio.Event()

    class Counting(Reconciler):
        async def judge(self, blueprint: str) -> None:
            judged.append(blueprint)
            if len(judged) == 1:
                self.mark([NAME])  # something changes while it is judged: once more, later
            else:
                wanted.set()

    reconciler = Counting(
        journal, Bus("rollout", BusSettings()), PlanSigner(tmp_path / "none"), lambda: T0, timedelta(hours=1)
    )
    running = asyncio.create_task(reconciler.run())
    await journal.read(store.plans)
    for _ in range(1000):
        reconciler.mark([NAME])
        reconciler.mark([])
    await asyncio.wait_for(wanted.wait(), 60)
    running.cancel()
    assert judged == [NAME, NAME]


async def test_a_blueprint_that_cannot_be_judged_stops_nothing(
    journal: Journal, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await journal.transact(lambda unit: (apply(unit), start(unit)))
    with mock.patch("slmops.rollout.reconcile.assess", side_effect=OverflowError("too long")):
        await _reconciler(journal, tmp_path).judge(NAME)
    assert f"could not evaluate the gate of {NAME}" in caplog.text


async def test_the_view_names_failed_gateways_and_then_those_that_wait_longest(journal: Journal) -> None:
    def work(unit: UnitOfWork) -> None:
        apply(unit)
        for number in range(40):
            store.project(unit.connection, enrolled(f"gw-{number:02}", "canary" if number >= 35 else "kiosk"))
        start(unit)
        generation = store.load(unit, NAME).version
        record(unit, failure("gw-37", "1.0.0", generation).model_copy(update={"labels": {"ring": "canary"}}))
        for _ in range(2):
            decide(unit, lambda s, r: follow_gate(s, r, PASSED, T0))
        view = store.latest_view(unit, store.load(unit, NAME), T0)
        shown = view.attention
        assert [one.gateway_id for one in shown[:5]] == ["gw-37", "gw-35", "gw-36", "gw-38", "gw-39"]
        assert (shown[0].failed, shown[0].problem, shown[0].last_seen) == (True, "it talks nonsense", SEEN.at)
        assert {one.stage for one in shown[:5]} == {"canary"}
        assert (len(shown), any(one.failed for one in shown[1:])) == (20, False)
        assert (view.stages[2].targets, view.stages[0].failed) == (40, 1)

    await journal.transact(work)
