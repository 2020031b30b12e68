"""Pages, filters and summaries of a fleet whose gateways enrolled and reported, on SQLite and on PostgreSQL."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from integration.test_kit_migrations import load_release
from sqlalchemy import func, select
from unit.rollout.rollout_examples import NAME, T0, blueprint, digest, package, report

from slmops.contracts.commands import (
    AbortRollout,
    ApplyBlueprint,
    Attention,
    GatewayView,
    ListBlueprints,
    ListGateways,
    ListRollouts,
    Standing,
    StartRollout,
    SummarizeFleet,
)
from slmops.contracts.errors import InvalidCursor, Problem
from slmops.contracts.events import (
    Event,
    GatewayEnrolled,
    GatewayMoved,
    GatewayRemoved,
    GatewayReported,
    GatewayRevoked,
    UpdatePhase,
)
from slmops.kit.bus.pages import PAGE_BYTES
from slmops.kit.journal import Journal, UnitOfWork
from slmops.rollout import inventory_rows, membership_rows, store
from slmops.rollout.domain.decide import apply_blueprint, operate, start_rollout
from slmops.rollout.domain.fleet import Sighting
from slmops.rollout.queries import Queries
from slmops.rollout.report_rows import Report, record_reports
from slmops.rollout.tables import GATEWAY_LABELS

NOW = T0 + timedelta(days=20)
MONTH = timedelta(days=30)
KEY = "U" + "A" * 55
HOSTILE = "a' OR 1=1 --\\ \" %_ \N{GRINNING FACE}"


def journal_at(url: str) -> Journal:
    return Journal(url, service="rollout", metadata=store.schema(), migrations=store.MIGRATIONS, project=store.project)


@pytest.fixture
async def journal(database_url: str) -> AsyncIterator[Journal]:
    journal = journal_at(database_url)
    await journal.open()
    yield journal
    await journal.close()


@pytest.fixture
async def file_journal(tmp_path: Path) -> AsyncIterator[Journal]:
    """For what does not depend on the database."""
    journal = Journal(
        f"sqlite:///{tmp_path}/f.db", service="rollout", metadata=store.schema(), migrations=None, project=store.project
    )
    await journal.open()
    yield journal
    await journal.close()


def enrolled(gateway_id: str, **changes: Any) -> GatewayEnrolled:
    values = {"gateway_id": gateway_id, "blueprint": NAME, "public_key": KEY, "at": T0}
    return GatewayEnrolled(**(values | changes))


def told(unit: UnitOfWork, *events: Event) -> None:
    for event in events:
        store.project(unit.connection, event)


def heard(unit: UnitOfWork, event: GatewayReported, age: timedelta, ahead_s: float | None = None) -> None:
    ahead = None if ahead_s is None else timedelta(seconds=ahead_s)
    recorded = record_reports(unit.connection, {1: Report(event, Sighting(NOW - age, ahead))})
    assert not recorded.refused and not recorded.unknown


def random_fleet(unit: UnitOfWork, size: int) -> None:
    """Enrols gateways of every kind; some report, some leave, some are revoked or moved."""
    some = random.Random(1)
    for number in range(size):
        name, place = f"gw-{number:04}", some.choice([NAME, "kiosk"])
        labels = {"ring": some.choice(["canary", "fleet"]), "site": some.choice(["a", "b", HOSTILE])}
        life = some.choice([None, MONTH, timedelta(days=21)])
        told(unit, enrolled(name, blueprint=place, labels=labels, expires_at=life and T0 + life))
        if some.random() < 0.9:
            phase = some.choice([UpdatePhase.COMMITTED, UpdatePhase.FAILED, UpdatePhase.SOAKING])
            event = report(
                name,
                phase,
                some.choice(["1.0.0", "1.0.1"]),
                1,
                blueprint=place,
                labels=some.choice([labels, {}, {"ring": "late"}]),
                dropped_measurements=some.choice([0, 0, 3]),
                problem=Problem(code="x", what="y") if phase is UpdatePhase.FAILED else None,
            )
            heard(unit, event, some.choice([timedelta(0), timedelta(days=2)]), some.choice([None, 1.0, -90.0, 7200.0]))
        match some.randrange(12):
            case 0:
                told(unit, GatewayRevoked(gateway_id=name, public_key=KEY, revoked_at=NOW, reason="stolen"))
            case 1:
                told(unit, GatewayMoved(gateway_id=name, previous=place, blueprint="lobby", at=NOW))
            case 2:
                told(unit, GatewayRemoved(gateway_id=name, blueprint=place, at=NOW))
            case 3:  # its device was replaced: nothing that the one before reported counts
                told(unit, enrolled(name, blueprint=place, public_key="U" + "B" * 55, enrolment=2, at=NOW))


async def listed(queries: Queries, **asked: Any) -> list[GatewayView]:
    """Returns the gateways of all pages. Checks the order, and the total of the first page."""
    found: list[GatewayView] = []
    page = await queries.list_gateways(ListGateways(**asked))
    total = page.total
    while True:
        found += page.gateways
        if page.cursor is None:
            break
        page = await queries.list_gateways(ListGateways(**asked, cursor=page.cursor))
        assert page.total is None
    assert total == len(found)
    assert [one.gateway_id for one in found] == sorted({one.gateway_id for one in found})
    return found


def silent(view: GatewayView) -> timedelta:
    return NOW - view.last_seen


def offline(view: GatewayView) -> bool:
    return silent(view) > timedelta(minutes=30)


FILTERS: list[tuple[dict[str, Any], Callable[[GatewayView], bool]]] = [
    ({"blueprint": "kiosk"}, lambda g: g.blueprint == "kiosk"),
    ({"gateway_id": "gw-0005"}, lambda g: g.gateway_id == "gw-0005"),
    ({"phase": UpdatePhase.SOAKING}, lambda g: g.phase is UpdatePhase.SOAKING),
    ({"phase": UpdatePhase.IDLE}, lambda g: g.phase is UpdatePhase.IDLE),
    ({"version": "1.0.1"}, lambda g: g.running_version == "1.0.1"),
    ({"online": True}, lambda g: not offline(g) and g.standing is not Standing.REVOKED),
    ({"online": False}, lambda g: offline(g) and g.standing is not Standing.REVOKED),
    ({"silent_for_s": 86400}, lambda g: silent(g) > timedelta(days=1)),
    ({"labels": {"ring": "canary"}}, lambda g: g.labels.get("ring") == "canary"),
    ({"labels": {"ring": "fleet", "site": HOSTILE}}, lambda g: g.labels == {"ring": "fleet", "site": HOSTILE}),
    ({"labels": {"ring": "can\0ary"}}, lambda g: False),
    ({"labels": {"ring": "x" * 500}}, lambda g: False),
    *(({"standing": one}, lambda g, one=one: g.standing is one) for one in Standing),
    *(({"attention": (one,)}, lambda g, one=one: one in g.attention) for one in Attention),
    ({"attention": tuple(Attention)}, lambda g: bool(g.attention)),
    (
        {"attention": (Attention.CLOCK, Attention.FAILED), "labels": {"site": "a"}, "blueprint": "kiosk"},
        lambda g: (
            not {"clock", "failed"}.isdisjoint(g.attention) and g.labels.get("site") == "a" and g.blueprint == "kiosk"
        ),
    ),
]


async def test_every_filter_gives_exactly_the_gateways_that_match(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    await journal.transact(lambda unit: random_fleet(unit, 80))
    queries = Queries(journal, lambda: NOW)
    everyone = await listed(queries, limit=1000)
    assert 60 < len(everyone) < 80, "removed ones are gone"
    for asked, matches in FILTERS:
        wanted = [one for one in everyone if matches(one)]
        # A condition on a time is checked in the order of ids, or read first.
        for rare in (0, 2000) if asked.keys() & {"online", "silent_for_s", "attention"} else (0,):
            monkeypatch.setattr(inventory_rows, "_RARE", rare)
            assert await listed(queries, **asked, limit=25) == wanted, asked
        assert wanted or "\0" in repr(asked) or "\\x00" in repr(asked) or "xxx" in repr(asked), f"{asked} tests nothing"


async def test_the_summary_counts_what_the_list_shows(journal: Journal) -> None:
    def fill(unit: UnitOfWork) -> None:
        random_fleet(unit, 80)
        state = store.load(unit, NAME)
        store.commit(unit, state, apply_blueprint(state, ApplyBlueprint(spec=blueprint()), T0), T0)

    await journal.transact(fill)
    queries = Queries(journal, lambda: NOW)
    for name in (None, "kiosk"):
        everyone = await listed(queries, blueprint=name)
        counting = [one for one in everyone if one.standing is not Standing.REVOKED]
        found = await queries.summarize_fleet(SummarizeFleet(blueprint=name))
        assert (found.gateways, found.offline) == (len(counting), sum(map(offline, counting)))
        assert found.online + found.offline == found.gateways
        assert found.standing.counts == Counter(one.standing.value for one in everyone)
        assert found.phase.counts == Counter(one.phase.value for one in counting)
        assert found.version.counts == Counter(one.running_version or "none" for one in counting)
        assert found.blueprint.counts == Counter(one.blueprint for one in counting)
        profiles = {NAME: "edge-small"}  # the other blueprint was not applied
        assert found.profile.counts == Counter(profiles.get(one.blueprint, "none") for one in counting)
        reasons = Counter(reason for one in everyone for reason in one.attention)
        assert found.attention.counts == {reason.value: reasons[reason] for reason in Attention}


async def test_pages_are_disjoint_and_complete_while_gateways_enrol_and_leave(file_journal: Journal) -> None:
    names = [f"gw-{number:03}" for number in range(60)]
    await file_journal.transact(lambda unit: told(unit, *map(enrolled, names)))
    queries, seen, turn = Queries(file_journal, lambda: NOW), [], 0
    page = await queries.list_gateways(ListGateways(limit=7))
    while True:
        seen += [one.gateway_id for one in page.gateways]
        if page.cursor is None:
            break
        # One that was shown leaves, one that is still to come leaves, and two enrol before and after the cursor.
        left = (names[turn * 5], names[59 - turn * 2])
        gone = [GatewayRemoved(gateway_id=name, blueprint=NAME, at=NOW) for name in left]
        new = [enrolled(f"gw-{turn * 5:03}-new"), enrolled(f"gw-{59 - turn:03}-new")]
        await file_journal.transact(lambda unit, events=(*gone, *new): told(unit, *events))
        turn += 1
        page = await queries.list_gateways(ListGateways(limit=7, cursor=page.cursor))
    assert len(seen) == len(set(seen))
    stayed = {one.gateway_id for one in await listed(queries)} & set(names)
    assert turn > 5
    assert stayed <= set(seen)
    assert names[59] not in seen, "it left before its page"


async def test_a_page_of_large_gateways_is_cut_and_the_next_one_continues(file_journal: Journal) -> None:
    large = {f"key-{number}": "x" * 1000 for number in range(200)}
    names = [f"gw-{number}" for number in range(8)]
    await file_journal.transact(lambda unit: told(unit, *(enrolled(name, labels=large) for name in names)))
    queries = Queries(file_journal, lambda: NOW)
    page = await queries.list_gateways(ListGateways())
    assert 0 < len(page.gateways) < 8
    assert len(page.model_dump_json()) < PAGE_BYTES + 1000
    assert [one.gateway_id for one in await listed(queries)] == names
    # Labels that are too long or too many are shown, and cannot be searched.
    assert len(page.gateways[0].labels) == 200
    assert await listed(queries, labels={"key-1": "x" * 1000}) == []


async def test_one_gateway_that_is_larger_than_a_page_is_a_page(file_journal: Journal) -> None:
    huge = {"blob": "x" * (PAGE_BYTES + 1), "n\0l": "a", "ring": "fleet"}
    events = [enrolled("gw-1"), enrolled("gw-2", labels=huge), enrolled("gw-3")]
    await file_journal.transact(lambda unit: told(unit, *events))
    queries = Queries(file_journal, lambda: NOW)
    assert [len(one.labels) for one in await listed(queries)] == [0, 3, 0]
    assert [one.gateway_id for one in await listed(queries, labels={"ring": "fleet"})] == ["gw-2"]


async def test_labels_of_a_report_replace_the_ones_before_in_searches(file_journal: Journal) -> None:
    queries = Queries(file_journal, lambda: NOW)

    async def found(**labels: str) -> bool:
        return bool(await listed(queries, labels=labels))

    await file_journal.transact(lambda unit: told(unit, enrolled("gw-1", labels={"ring": "canary"})))
    assert await found(ring="canary")
    changed = report("gw-1", UpdatePhase.IDLE, "1.0.0", 1, labels={"ring": "fleet", "site": "a"})
    await file_journal.transact(lambda unit: heard(unit, changed, timedelta(0)))
    assert (await found(ring="canary"), await found(ring="fleet"), await found(site="a")) == (False, True, True)
    none = changed.model_copy(update={"labels": {}, "sequence": 2, "running": digest("1.0.0")})
    await file_journal.transact(lambda unit: heard(unit, none, timedelta(0)))
    assert (await found(ring="canary"), await found(site="a")) == (True, False), "those of its enrolment count again"


async def test_rollouts_and_blueprints_are_listed_by_pages(journal: Journal) -> None:
    """Each blueprint has three rollouts that ended and one under way. They started in turn."""

    def start(unit: UnitOfWork, name: str, seconds: float, *, end: bool) -> None:
        now, state = T0 + timedelta(seconds=seconds), store.load(unit, name)
        command = StartRollout(blueprint=name, version="1.0.0")
        state = store.commit(unit, state, start_rollout(state, command, [package("1.0.0")], now), now)
        if end:
            store.commit(unit, state, operate(state, AbortRollout(blueprint=name), now), now)

    def fill(unit: UnitOfWork) -> None:
        for name in ("a", "b", "c"):
            state = store.load(unit, name)
            spec = blueprint().model_copy(update={"name": name})
            store.commit(unit, state, apply_blueprint(state, ApplyBlueprint(spec=spec), T0), T0)
        for turn in range(4):
            for number, name in enumerate(("a", "b")):
                start(unit, name, 10 * turn + number, end=turn < 3)

    await journal.transact(fill)
    queries = Queries(journal, lambda: NOW)

    async def all_pages(**asked: Any) -> list[str]:
        """Returns the rollouts of all pages, the newest first."""
        found, cursor = [], None
        while True:
            page = await queries.list_rollouts(ListRollouts(**asked, limit=3, cursor=cursor))
            assert len(page.rollouts) <= 3
            found += [view.rollout for view in reversed(page.rollouts)]
            if (cursor := page.cursor) is None:
                return found

    every = await all_pages()
    assert every == [f"{name}-{number}" for number in (4, 3, 2, 1) for name in ("b", "a")]
    assert await all_pages(blueprint="a") == ["a-4", "a-3", "a-2", "a-1"]
    assert await all_pages(under_way=True) == ["b-4", "a-4"]
    assert await all_pages(under_way=False) == every[2:]
    first = await queries.list_blueprints(ListBlueprints(limit=2))
    rest = await queries.list_blueprints(ListBlueprints(limit=2, cursor=first.cursor))
    assert [view.spec.name for view in (*first.blueprints, *rest.blueprints)] == ["a", "b", "c"]
    assert rest.cursor is None
    with pytest.raises(InvalidCursor):
        await queries.list_rollouts(ListRollouts(cursor=first.cursor))


async def test_only_some_labels_can_be_searched_and_those_of_a_removed_gateway_are_gone(journal: Journal) -> None:
    many = {f"key-{number:03}": "a" for number in range(200)}
    rows = select(func.count()).select_from(GATEWAY_LABELS)
    await journal.transact(lambda unit: told(unit, enrolled("gw-1", labels=many)))
    assert await journal.read(lambda c: c.execute(rows).scalar_one()) == inventory_rows.MOST_LABELS
    queries = Queries(journal, lambda: NOW)
    assert len(await listed(queries, labels={"key-000": "a"})) == 1
    assert await listed(queries, labels={"key-199": "a"}) == []
    await journal.transact(lambda unit: told(unit, GatewayRemoved(gateway_id="gw-1", blueprint=NAME, at=NOW)))
    assert await journal.read(lambda c: c.execute(rows).scalar_one()) == 0


async def test_a_renewed_credential_needs_no_attention(file_journal: Journal) -> None:
    await file_journal.transact(lambda unit: told(unit, enrolled("gw-1", expires_at=T0 + timedelta(days=21))))
    queries = Queries(file_journal, lambda: NOW)
    assert len(await listed(queries, attention=(Attention.CREDENTIAL,))) == 1
    renew = membership_rows.record_credential
    await file_journal.transact(lambda unit: renew(unit.connection, "gw-1", NOW, NOW + MONTH))
    assert await listed(queries, attention=(Attention.CREDENTIAL,)) == []


async def test_gateways_and_rollouts_of_an_earlier_release_are_found(database_url: str) -> None:
    """The revision fills the columns from the stored reports, enrolments and blueprints."""
    load_release("0.1", "rollout", database_url)
    journal = journal_at(database_url)
    await journal.open()
    queries = Queries(journal, lambda: NOW)
    asked = {"labels": {"ring": "canary"}, "phase": UpdatePhase.IDLE, "version": "1.0.0", "online": False}
    [found] = await listed(queries, **asked, attention=(Attention.FAILED,), standing=Standing.ENROLLED)
    assert found.gateway_id == "gw-1"
    assert (await queries.summarize_fleet(SummarizeFleet())).profile.counts == {"edge-small": 1}
    ended = (await queries.list_rollouts(ListRollouts(blueprint=NAME, under_way=False))).rollouts
    assert [view.rollout for view in ended] == ["edge-chat-1"]
    again = await queries.list_rollouts(ListRollouts(limit=1))
    assert (await queries.list_rollouts(ListRollouts(limit=1, cursor=again.cursor))).rollouts == ended
    await journal.close()
