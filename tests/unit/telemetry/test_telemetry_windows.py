"""Each batch is published in a window once, whenever and however often it arrives. Uses a database, but no broker."""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import create_engine

from slmops.contracts.descriptor import Descriptor, digest_of
from slmops.contracts.errors import InvalidMessage, PermanentError
from slmops.contracts.events import CohortMeasured, Event
from slmops.contracts.measurement import CohortWindow, MeasurementBatch
from slmops.contracts.plan import Identity, Plan, Release
from slmops.kit.bus.batches import Received
from slmops.kit.bus.service_bus import MessageContext
from slmops.kit.journal import Journal
from slmops.telemetry import sums
from slmops.telemetry.domain.expectation import Enrolled
from slmops.telemetry.domain.windows import (
    MAX_AGE,
    MAX_AHEAD,
    Pending,
    check,
    closing_before,
    window_of,
    window_start,
)
from slmops.telemetry.handlers import CONSUMED_KEPT, WINDOWS_KEPT, Handlers
from slmops.telemetry.store import MIGRATIONS, project, schema

T0 = datetime(2030, 1, 1, tzinfo=UTC)
DAY = 24 * 3600
WINDOW, GRACE = timedelta(seconds=5), timedelta(seconds=1)


KEY = "U" + "A" * 55


def at(seconds: float) -> datetime:
    return T0 + timedelta(seconds=seconds)


def batch(
    identity: str, ended: float, gateway_id: str = "gw-1", version: str = "1.0.0", **changes: Any
) -> MeasurementBatch:
    values = {
        "batch_id": identity,
        "gateway_id": gateway_id,
        "blueprint": "edge-chat",
        "release": digest_of(version.encode()),
        "version": version,
        "started_at": at(ended - 1),
        "ended_at": at(ended),
        "requests": 2,
        "failed_requests": 0,
        "prompt_tokens": 10,
        "completion_tokens": 40,
        "decode_seconds": 1.0,
        "ttft_seconds": 0.5,
    }
    return MeasurementBatch(**(values | changes))


def release(version: str) -> Release:
    manifest = Descriptor.of(version.encode(), "application/vnd.oci.image.manifest.v1+json")
    return Release(revision=1, model="m", version=version, manifest=manifest, signature=manifest, size_bytes=1)


class Known:
    """All gateways are enrolled, `kiosk-…` under a separate blueprint. Both blueprints have had two releases."""

    async def enrolled(self, gateway_id: str) -> Enrolled | None:
        blueprint = "kiosk" if gateway_id.startswith("kiosk") else "edge-chat"
        return Enrolled(Identity(gateway_id=gateway_id, blueprint=blueprint), KEY, T0)

    async def plan(self, blueprint: str) -> Plan | None:
        return Plan(blueprint=blueprint, generation=2, stable=release("1.0.1"), previous=release("1.0.0"))

    async def rollouts(self, after: int) -> AsyncIterator[tuple[int, Event]]:
        for nothing in ():
            yield nothing


@dataclass
class Telemetry:
    """The handlers on a journal, and a clock that a test advances."""

    database: Path
    now: datetime = T0
    journal: Journal = field(init=False)
    handlers: Handlers = field(init=False)

    def __post_init__(self) -> None:
        url = f"sqlite:///{self.database}"
        self.journal = Journal(
            url,
            service="telemetry",
            metadata=schema(),
            migrations=MIGRATIONS,
            project=project,
            clock=lambda: self.now,
        )
        self.handlers = Handlers(self.journal, Known(), lambda: self.now, WINDOW, GRACE)

    async def receive(
        self, *batches: MeasurementBatch, subject: str | None = None, ahead: timedelta | None = None
    ) -> None:
        """Receives batches now. `ahead`: how far the gateway's clock is ahead, if it says when it sent them."""

        async def keepalive() -> None: ...

        received = []
        for one in batches:
            sent_at = None if ahead is None else self.now + ahead
            delivered = MessageContext(
                one.batch_id,
                subject or f"measure.{one.gateway_id}",
                None,
                keepalive,
                arrived_at=self.now,
                sent_at=sent_at,
            )
            received.append(Received(one, delivered))
        for error in (await self.handlers.on_batches(received)).values():
            raise error

    async def closed(self, seconds: float) -> list[CohortWindow]:
        """Advances the clock and returns all windows published so far."""
        self.now = at(seconds)
        await self.handlers.close_windows()
        events = [recorded.event for recorded in await self.journal.outbox()]
        return [event.window for event in events if isinstance(event, CohortMeasured)]


@pytest.fixture
async def telemetry(tmp_path: Path) -> AsyncIterator[Telemetry]:
    service = Telemetry(tmp_path / "telemetry.db")
    await service.journal.open()
    yield service
    await service.journal.close()


async def test_a_window_sums_all_gateways_of_a_release(telemetry: Telemetry) -> None:
    await telemetry.receive(batch("a", 1), batch("b", 3, failed_requests=1), batch("a", 2, "gw-2"))
    [window] = await telemetry.closed(6)
    assert (window.started_at, window.ended_at) == (at(0), at(5))
    assert (window.gateways, window.requests, window.failed_requests, window.completion_tokens) == (2, 6, 1, 120)
    assert (window.tokens_per_s, window.error_rate) == (40, 1 / 6)


async def test_releases_and_blueprints_are_kept_apart(telemetry: Telemetry) -> None:
    await telemetry.receive(batch("a", 1), batch("b", 1, version="1.0.1"), batch("c", 1, "kiosk-2", blueprint="kiosk"))
    windows = await telemetry.closed(6)
    assert sorted((w.blueprint, w.version, w.requests) for w in windows) == [
        ("edge-chat", "1.0.0", 2),
        ("edge-chat", "1.0.1", 2),
        ("kiosk", "1.0.0", 2),
    ]


async def test_a_window_is_published_once_after_its_grace(telemetry: Telemetry) -> None:
    await telemetry.receive(batch("a", 4.9), batch("b", 5))
    assert await telemetry.closed(5.9) == []
    assert len(await telemetry.closed(6)) == 1
    assert len(await telemetry.closed(10.9)) == 1
    assert [w.started_at for w in await telemetry.closed(11)] == [at(0), at(5)]
    assert len(await telemetry.closed(1000)) == 2


async def test_a_batch_that_arrives_twice_counts_once_also_after_its_window_was_published(telemetry: Telemetry) -> None:
    await telemetry.receive(batch("a", 1), batch("a", 1))
    [window] = await telemetry.closed(6)
    assert window.requests == 2
    await telemetry.receive(batch("a", 1))
    assert len(await telemetry.closed(60)) == 1


async def test_the_same_batch_id_of_another_gateway_is_another_batch(telemetry: Telemetry) -> None:
    await telemetry.receive(batch("a", 1), batch("a", 1, "gw-2"))
    [window] = await telemetry.closed(6)
    assert window.requests == 4


async def test_a_late_batch_is_published_as_a_separate_window(telemetry: Telemetry) -> None:
    await telemetry.receive(batch("a", 1))
    await telemetry.closed(6)
    await telemetry.receive(batch("late", 2, "gw-2", requests=7))
    first, second = await telemetry.closed(7)
    assert (first.started_at, first.requests, first.gateways) == (at(0), 2, 1)
    assert (second.started_at, second.requests, second.gateways) == (at(0), 7, 1)


async def test_batches_out_of_order_are_in_the_windows_of_their_ends(telemetry: Telemetry) -> None:
    await telemetry.receive(batch("c", 12), batch("a", 1), batch("b", 7))
    assert [w.started_at for w in await telemetry.closed(20)] == [at(0), at(5), at(10)]


async def test_received_batches_survive_a_restart(telemetry: Telemetry) -> None:
    await telemetry.receive(batch("a", 1))
    reborn = Telemetry(telemetry.database)
    await reborn.journal.open()
    await reborn.receive(batch("a", 1))
    [window] = await reborn.closed(6)
    assert window.requests == 2
    assert len(await telemetry.closed(7)) == 1, "the other process sees it told"
    await reborn.journal.close()


async def test_an_interrupted_close_publishes_and_deletes_nothing(
    telemetry: Telemetry, monkeypatch: pytest.MonkeyPatch
) -> None:
    await telemetry.receive(batch("a", 1), batch("b", 1, version="1.0.1"))
    with monkeypatch.context() as patch:
        patch.setattr("slmops.telemetry.handlers.window_of", _second_call_breaks())
        with pytest.raises(ZeroDivisionError):
            await telemetry.closed(6)
    assert sum(w.requests for w in await telemetry.closed(6)) == 4


def _second_call_breaks() -> Any:
    calls: list[object] = []

    def broken(*arguments: Any) -> CohortWindow:
        calls.append(arguments)
        return window_of(*arguments) if len(calls) == 1 else 1 / 0  # type: ignore[return-value]

    return broken


async def test_only_the_id_of_a_published_batch_is_kept(telemetry: Telemetry) -> None:
    await telemetry.receive(batch("a", 1))
    await telemetry.closed(6)
    with sqlite3.connect(telemetry.database) as connection:
        counts = [connection.execute(f"SELECT count(*) FROM {t}").fetchone()[0] for t in ("window_sums", "consumed")]
    assert counts == [0, 1]


async def test_what_was_consumed_and_published_long_ago_is_forgotten(telemetry: Telemetry) -> None:
    def rows(table: str) -> int:
        with sqlite3.connect(telemetry.database) as connection:
            return int(connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0])

    await telemetry.receive(batch("a", 1), batch("b", 7))
    await telemetry.closed(13)
    await telemetry.journal.published([recorded.position for recorded in await telemetry.journal.outbox()])
    await telemetry.handlers.forget_old()
    assert (rows("consumed"), rows("journal")) == (2, 2)
    telemetry.now += WINDOWS_KEPT + WINDOW
    await telemetry.handlers.forget_old()
    assert (rows("consumed"), rows("journal")) == (2, 1), "the newest event numbers the next one"
    telemetry.now += CONSUMED_KEPT + WINDOW
    await telemetry.receive(batch("c", 8))
    await telemetry.handlers.forget_old()
    assert (rows("consumed"), rows("journal")) == (1, 1)


async def test_windows_that_are_not_published_yet_are_kept(telemetry: Telemetry) -> None:
    await telemetry.receive(batch("a", 1), batch("b", 7))
    await telemetry.closed(13)
    telemetry.now += 2 * WINDOWS_KEPT
    await telemetry.handlers.forget_old()
    assert len(await telemetry.journal.outbox()) == 2


async def test_a_batch_on_another_gateways_subject_is_refused(telemetry: Telemetry) -> None:
    with pytest.raises(PermanentError, match="the batch of gw-1 is on another"):
        await telemetry.receive(batch("a", 1), subject="measure.gw-2")
    assert await telemetry.closed(60) == []


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"failed_requests": 3}, "more failed requests"),
        ({"synthetic_requests": 3}, "synthetic"),
        ({"decode_seconds": 1e300}, "a figure is above"),
        ({"completion_tokens": 10**400}, "a figure is above"),
    ],
)
def test_impossible_figures_are_rejected(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidMessage, match=says):
        check(batch("a", 1, **wrong), "measure.gw-1")


@pytest.mark.parametrize(
    "wrong",
    [
        {"ended_at": at(1) + MAX_AHEAD + timedelta(days=3)},
        {"started_at": at(0) - 2 * MAX_AGE, "ended_at": at(0) - MAX_AGE - WINDOW},
        {"started_at": at(2)},
        {"started_at": datetime.min.replace(tzinfo=UTC), "ended_at": datetime.max.replace(tzinfo=UTC)},
    ],
    ids=["ahead", "behind", "set back in between", "the longest"],
)
async def test_a_batch_of_a_wrong_clock_counts_when_it_arrived(telemetry: Telemetry, wrong: dict[str, Any]) -> None:
    """It was dead-lettered, and would be again however often it was replayed."""
    telemetry.now = at(2)
    await telemetry.receive(batch("a", 1, **wrong))
    [window] = await telemetry.closed(7)
    assert (window.started_at, window.ended_at, window.requests) == (at(0), at(5), 2)


@pytest.mark.parametrize("ahead", [timedelta(days=3), timedelta(days=-3), timedelta(days=9999)])
async def test_batches_that_waited_are_placed_by_how_wrong_the_clock_is(telemetry: Telemetry, ahead: timedelta) -> None:
    waited = [batch(str(n), n).model_copy(update={"ended_at": at(n) + ahead}) for n in (1, 7)]
    telemetry.now = at(3600)
    await telemetry.receive(*waited, ahead=ahead)
    windows = await telemetry.closed(3610)
    assert [w.started_at for w in windows] == [at(0), at(5)]


@pytest.mark.parametrize(
    ("ended", "window"),
    [
        (at(-3 * DAY), at(-3 * DAY)),  # the time it waited is unknown: a window that no gate reads any more
        (at(3600 + 3 * DAY), at(3600)),
        (datetime(1970, 1, 1, tzinfo=UTC), at(3600)),
    ],
    ids=["forward", "back", "from 1970"],
)
async def test_a_clock_that_is_set_while_a_batch_waits_counts_the_batch_and_keeps_no_window_open(
    telemetry: Telemetry, ended: datetime, window: datetime
) -> None:
    telemetry.now = at(3600)
    await telemetry.receive(batch("a", 1, requests=1, ended_at=ended, started_at=ended), ahead=timedelta(0))
    await telemetry.receive(batch("b", 3600, requests=1), ahead=timedelta(0))
    windows = await telemetry.closed(3606)
    assert sorted((w.started_at, w.requests) for w in windows) == sorted(
        Counter([window_start(window, WINDOW), at(3600)]).items()
    )


async def test_a_clock_is_compared_with_the_arrival_also_within_a_minute(telemetry: Telemetry) -> None:
    """Otherwise a clock that is 50 s ahead would keep its windows open for so long."""
    telemetry.now = at(2)
    await telemetry.receive(batch("a", 51), ahead=timedelta(seconds=50))
    [window] = await telemetry.closed(6)
    assert window.started_at == at(0)


async def test_a_wrong_clock_is_named_once_until_it_was_right(
    telemetry: Telemetry, caplog: pytest.LogCaptureFixture
) -> None:
    days, right = timedelta(days=3), timedelta(seconds=1)
    for ahead in (days, days, right, -days, -days):
        await telemetry.receive(batch(str(len(caplog.records)), 1), ahead=ahead)
    named = [record.getMessage() for record in caplog.records if "clock" in record.getMessage()]
    assert len(named) == 2
    assert "gw-1 is 3 days and 0:00:00 ahead" in named[0]
    assert "gw-1 is 3 days and 0:00:00 behind" in named[1]


async def test_an_impossible_time_of_sending_loses_no_batch(telemetry: Telemetry) -> None:
    telemetry.now = at(2)
    await telemetry.receive(batch("a", 1), ahead=datetime.min.replace(tzinfo=UTC) - at(2))
    assert sum(w.requests for w in await telemetry.closed(7)) == 2


SQLITE = create_engine("sqlite://")
schema().create_all(SQLITE)


@settings(deadline=None, max_examples=50)
@given(
    st.lists(
        st.tuples(st.floats(-100, 100), st.sampled_from(["gw-1", "gw-2"]), st.sampled_from(["1.0.0", "1.0.1"])),
        max_size=20,
    )
)
def test_every_batch_is_in_exactly_one_window_and_no_request_is_lost(items: list[tuple[float, str, str]]) -> None:
    batches = [batch(str(n), *item) for n, item in enumerate(items)]
    with SQLITE.begin() as connection:
        for part in (batches[::2], batches[1::2]):
            sums.add(connection, [Pending(one, one.ended_at) for one in part], WINDOW)
        windows = [window_of(ended, WINDOW) for ended in sums.take_ended(connection, at(1000), WINDOW)]
        assert sums.any_ended(connection, at(1000)) is False
    expected: dict[tuple[str, datetime], list[MeasurementBatch]] = {}
    for one in batches:
        expected.setdefault((one.version, window_start(one.ended_at, WINDOW)), []).append(one)
    found = {(w.version, w.started_at): (w.gateways, w.requests, w.decode_seconds) for w in windows}
    assert len(windows) == len(found)
    assert found == {
        key: (len({one.gateway_id for one in of}), sum(one.requests for one in of), len(of) * 1.0)
        for key, of in expected.items()
    }


@given(
    st.datetimes(min_value=datetime(1971, 1, 1), max_value=datetime(2200, 1, 1), timezones=st.just(UTC)),
    st.integers(1, 3600),
)
def test_windows_tile_time_and_close_after_their_grace(now: datetime, seconds: int) -> None:
    length = timedelta(seconds=seconds)
    start = window_start(now, length)
    assert start <= now < start + length
    assert start.timestamp() % seconds == 0
    assert now - length - GRACE < closing_before(now, length, GRACE) <= now - GRACE
