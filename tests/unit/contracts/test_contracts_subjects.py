"""Subjects and streams: every stored subject has exactly one stream."""

from __future__ import annotations

from datetime import UTC, datetime
from itertools import combinations
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slmops.contracts import subjects
from slmops.contracts.commands import COMMANDS, Command
from slmops.contracts.events import (
    EVENTS,
    CohortMeasured,
    Event,
    GatewayEnrolled,
    GatewayMoved,
    GatewayReenrolmentAllowed,
    GatewayRemoved,
    GatewayReported,
    GatewayRevoked,
)
from slmops.contracts.subjects import STREAMS, matches, spec_of, stream_of, template


def overlap(one: list[str], other: list[str]) -> bool:
    """Returns whether some subject matches both patterns by the rules of NATS."""
    if not one or not other:
        return one == other
    if ">" in (one[0], other[0]):
        return True
    return (one[0] == other[0] or "*" in (one[0], other[0])) and overlap(one[1:], other[1:])


PATTERNS = [(stream.name, pattern) for stream in STREAMS for pattern in stream.subjects]


@pytest.mark.parametrize(("one", "other"), combinations(PATTERNS, 2), ids=lambda pair: pair[1])
def test_no_two_streams_store_the_same_subject(one: tuple[str, str], other: tuple[str, str]) -> None:
    assert not overlap(one[1].split("."), other[1].split("."))


ELSEWHERE = {
    GatewayEnrolled: "ENROLMENTS",
    GatewayRevoked: "REVOCATIONS",
    GatewayMoved: "FLEET",
    GatewayReenrolmentAllowed: "FLEET",
    GatewayRemoved: "FLEET",
    GatewayReported: "GATEWAYS",
    CohortMeasured: "WINDOWS",
}
"""Events that are not part of the system's history, or of which only the newest counts."""


def test_streams_of_facts_keep_every_message_forever() -> None:
    for name in ("EVENTS", "ENROLMENTS", "REVOCATIONS"):
        spec = spec_of(name)
        assert spec and spec.refuses and spec.max_age is None, name


def test_a_full_job_queue_refuses_and_the_dead_letter_queue_never_does() -> None:
    refusing = {stream.name for stream in STREAMS if stream.refuses}
    assert "JOBS" in refusing
    assert "DLQ" not in refusing, "a consumer keeps a message whose dead letter is refused, and stands still"


def test_a_fresh_system_reserves_no_more_than_5_gib() -> None:
    assert sum(stream.max_bytes for stream in STREAMS) <= 5 * subjects.GiB


def test_every_moved_subject_is_stored_by_another_stream() -> None:
    for stream, subject in subjects.MOVED:
        spec = spec_of(stream)
        assert spec and not any(overlap(subject.split("."), pattern.split(".")) for pattern in spec.subjects)
        assert stream_of(subject.replace(">", "x")) not in (None, stream)


def test_stream_names_are_unique() -> None:
    assert len({stream.name for stream in STREAMS}) == len(STREAMS)


@pytest.mark.parametrize("kind", EVENTS.values(), ids=lambda k: k.type)
def test_every_event_is_stored(kind: type[Event]) -> None:
    subject = kind.subject_template().replace("{gateway_id}", "gw-1")
    holders = [stream.name for stream in STREAMS if any(matches(pattern, subject) for pattern in stream.subjects)]
    assert holders == [ELSEWHERE.get(kind, "EVENTS")]
    assert stream_of(subject) == holders[0]
    assert template(subject) == kind.subject_template()
    assert stream_of(subjects.dead_letter(subject)) == "DLQ"


@pytest.mark.parametrize("kind", COMMANDS.values(), ids=lambda k: k.subject_template())
def test_no_command_is_stored(kind: type[Command[Any]]) -> None:
    subject = kind.subject_template().replace("{gateway_id}", "gw-1")
    assert stream_of(subject) is None
    assert template(subject) == kind.subject_template()
    assert stream_of(subjects.dead_letter(subject)) == "DLQ"


@pytest.mark.parametrize(
    ("subject", "stream"),
    [
        (subjects.measurements("gw-1"), "MEASUREMENTS"),
        (subjects.presence("gw-1"), "PRESENCE"),
        (subjects.optimize_job("edge-small"), "JOBS"),
        (subjects.twin(subjects.blueprint_key("edge-chat")), None),
        ("measure.gw-1.more", None),
        ("slmops.model", None),
        ("slmops.unknown.happened.v1", None),
        ("dlq", None),
        ("", None),
    ],
)
def test_each_subject_has_its_expected_stream(subject: str, stream: str | None) -> None:
    assert stream_of(subject) == stream


@pytest.mark.parametrize(
    ("subject", "labelled"),
    [
        ("measure.gw-1", "measure.{gateway_id}"),
        ("presence.gw-1", "presence.{gateway_id}"),
        ("slmops.gateway.reported.v1.gw-1", "slmops.gateway.reported.v1.{gateway_id}"),
        ("slmops.gateway.revoked.v1.gw-1.UAB", "slmops.gateway.revoked.v1.{gateway_id}.{public_key}"),
        ("dlq.slmops.gateway.reported.v1.gw-1", "dlq.slmops.gateway.reported.v1.{gateway_id}"),
        ("dlq.dlq.measure.gw-1", "dlq.dlq.measure.{gateway_id}"),
        ("cmd.packager.fetch.gw-1", "cmd.packager.fetch.{gateway_id}"),
        ("cmd.registry.list_versions", "cmd.registry.list_versions"),
        ("_INBOX_gw-1.abc.def", "_INBOX"),
        ("_INBOX.abc", "_INBOX"),
    ],
)
def test_a_metric_label_never_contains_a_gateway_id(subject: str, labelled: str) -> None:
    assert template(subject) == labelled


ALL: list[type[Event] | type[Command[Any]]] = [*EVENTS.values(), *COMMANDS.values()]


@given(st.from_regex(r"[a-z0-9-]{1,20}", fullmatch=True))
def test_labels_are_bounded_in_number(gateway_id: str) -> None:
    kinds = [kind.subject_template() for kind in ALL] + [subjects.MEASUREMENTS_TEMPLATE]
    assert [template(kind.format(gateway_id=gateway_id, public_key=gateway_id)) for kind in kinds] == kinds


def test_the_subject_of_a_gateways_event_ends_in_its_id() -> None:
    at = datetime(2026, 1, 2, tzinfo=UTC)
    event = GatewayEnrolled(gateway_id="gw-1", blueprint="edge-chat", public_key="U", at=at)
    assert event.subject == "slmops.gateway.enrolled.v1.gw-1"
