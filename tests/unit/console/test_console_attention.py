"""The items of `slmops attention`, made from the state of streams, dead letters and rollouts."""

from __future__ import annotations

from datetime import timedelta
from math import ceil

import pytest
from unit.console.console_examples import AT, rollout

from slmops.console.commands.attention import certificate_items, items
from slmops.console.render.stream_view import ConsumerView, StreamView
from slmops.contracts.commands import StorageStatus
from slmops.kit.bus.deadletters import DeadLetter
from slmops.kit.bus.gaps import Gap

GIB = 1 << 30


def stream(name: str = "EVENTS", share: float = 0.1, *, refuses: bool = True, messages: int = 0) -> StreamView:
    return StreamView(
        name=name,
        subjects=(),
        messages=messages,
        size_bytes=ceil(share * GIB),
        limit_bytes=GIB,
        max_age=None,
        refuses=refuses,
    )


def letter(sequence: int, subject: str = "measure.gw-1", code: str = "invalid_message") -> DeadLetter:
    return DeadLetter(
        sequence=sequence,
        subject=subject,
        consumer="telemetry/measure.{gateway_id}",
        code=code,
        reason=f"reason {sequence}",
        at=AT + timedelta(seconds=sequence),
        size_bytes=2,
        payload=b"{}",
        headers={},
    )


def kinds(*views: StreamView) -> list[tuple[str, str]]:
    return [(item.kind, item.where) for item in items(views, (), ())]


def test_a_healthy_system_needs_no_attention() -> None:
    assert items([stream()], [], [rollout()]) == []


@pytest.mark.parametrize(("days", "listed"), [(22, False), (20, True), (-1, True), (None, False)])
def test_a_certificate_of_nats_that_ends_soon_is_listed(days: int | None, listed: bool) -> None:
    expires = None if days is None else AT + timedelta(days=days)
    assert [item.kind for item in certificate_items(expires, "nats:4222", AT)] == ["certificate"] * listed


@pytest.mark.parametrize(("share", "listed"), [(0.69, False), (0.7, True), (1.0, True)])
def test_a_stream_that_refuses_messages_is_listed_from_70_percent_on(share: float, listed: bool) -> None:
    assert kinds(stream(share=share)) == ([("stream_full", "EVENTS")] if listed else [])


def test_a_stream_that_drops_messages_or_has_no_limit_is_never_listed() -> None:
    unlimited = stream(share=5).model_copy(update={"limit_bytes": None})
    assert kinds(stream("WINDOWS", 1, refuses=False), unlimited) == []


def test_the_fix_of_a_full_stream_is_a_resize_command() -> None:
    (item,) = items([stream(share=0.8)], (), ())
    assert item.what.startswith("80% of 1GiB used")
    assert item.fix == "slmops stream resize EVENTS 2GiB"


def test_each_consumer_with_a_gap_is_listed() -> None:
    gap = Gap(first=3, last=9, why="removed", found_at=AT)
    consumers = (ConsumerView(name="registry-x", pending=0, gap=gap), ConsumerView(name="packager-x", pending=4))
    (item,) = items([stream().model_copy(update={"consumers": consumers})], (), ())
    assert (item.kind, item.where, item.what) == ("gap", "EVENTS for registry-x", "messages 3 to 9: removed")
    assert "slmops stream accept EVENTS" in item.fix


def test_dead_letters_are_grouped_by_consumer_code_and_gateway_newest_first() -> None:
    letters = [letter(1), letter(2, "measure.gw-2"), letter(3), letter(4, code="denied")]
    found = items([stream("DLQ", messages=4, refuses=False)], letters, ())
    assert [(item.where, item.what.partition(",")[0]) for item in found] == [
        ("measure.gw-1 for telemetry", "1 × denied"),
        ("measure.gw-1 for telemetry", "2 × invalid_message"),
        ("measure.gw-2 for telemetry", "1 × invalid_message"),
    ]
    assert found[1].what.endswith("reason 3")
    assert found[1].fix == "Fix the cause, then run: slmops dlq replay 3 (and the others)"


def test_the_number_of_unread_dead_letters_is_listed() -> None:
    found = items([stream("DLQ", messages=1200, refuses=False)], [letter(1200)], ())
    assert found[-1].what == "1199 older dead letters were not read"


def test_a_held_rollout_is_listed() -> None:
    (item,) = items((), (), [rollout("held"), rollout("completed")])
    assert (item.kind, item.where) == ("rollout_held", "edge-chat")
    assert "slmops rollout abort edge-chat" in item.fix


def test_damaged_blobs_and_failed_scheduled_work_are_listed() -> None:
    storage = StorageStatus(corrupt=2, missing=1, damaged=("sha256:" + "a" * 64,), problems={"collect garbage": "lost"})
    found = items((), (), (), storage)
    assert [(item.kind, item.what.partition(" ")[0]) for item in found] == [
        ("blobs_corrupt", "2"),
        ("blobs_missing", "1"),
        ("scheduled", "could"),
    ]
    assert "slmops storage verify --repair" in found[0].fix
    assert items((), (), (), StorageStatus()) == []


@pytest.mark.parametrize(
    ("role", "days", "listed"),
    [
        ("root", 61, False),
        ("root", 60, True),
        ("targets", -1, True),
        ("revoked", 59, True),
        ("timestamp", 1, False),
        ("timestamp", -1, True),
    ],
)
def test_trust_metadata_that_expires_within_60_days_or_has_expired_is_listed(
    role: str, days: int, listed: bool
) -> None:
    found = items((), (), (), None, {role: AT + timedelta(days=days)}, AT)
    assert [item.where for item in found] == ([f"trust {role}"] if listed else [])
    if listed:
        assert ("expired" if days < 0 else f"in {days} days") in found[0].what
        renewed = "targets" if role == "revoked" else role
        assert (f"slmops trust rotate {renewed} --keep-keys" in found[0].fix) == (role != "timestamp")
