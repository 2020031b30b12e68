"""Envelopes in NATS headers: encoding can be read back, and foreign headers are checked."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from slmops.contracts.cloudevent import Envelope, event_id
from slmops.contracts.errors import InvalidMessage

AT = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
PARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
FULL = Envelope(
    id="e-1",
    source="slmops/registry",
    type="slmops.model.alias_moved.v1",
    time=AT,
    subject="m",
    traceparent=PARENT,
    actor="person:alice",
)
BARE = Envelope(id="e-1", source="slmops/registry", type="slmops.model.alias_moved.v1", time=AT)


@pytest.mark.parametrize("envelope", [FULL, BARE], ids=["full", "bare"])
def test_headers_read_back(envelope: Envelope) -> None:
    assert Envelope.from_headers(envelope.headers()) == envelope


def test_the_event_id_is_jetstreams_dedupe_key() -> None:
    assert FULL.headers()["Nats-Msg-Id"] == "e-1"


def test_header_names_are_read_whatever_their_case() -> None:
    assert Envelope.from_headers({key.upper(): value for key, value in FULL.headers().items()}) == FULL


@pytest.mark.parametrize("missing", ["ce-id", "ce-source", "ce-type", "ce-time"])
def test_a_missing_attribute_is_named(missing: str) -> None:
    headers = {key: value for key, value in FULL.headers().items() if key != missing}
    with pytest.raises(InvalidMessage, match=missing.removeprefix("ce-")):
        Envelope.from_headers(headers)


@pytest.mark.parametrize(
    ("header", "value"),
    [
        ("ce-id", ""),
        ("ce-source", ""),
        ("ce-type", "com.example.happened"),
        ("ce-time", "yesterday"),
        ("ce-time", "2026-01-02T03:04:05"),  # without a time zone it is ambiguous
        ("ce-specversion", "2.0"),
    ],
)
def test_a_malformed_attribute_is_named(header: str, value: str) -> None:
    with pytest.raises(InvalidMessage, match=header.removeprefix("ce-")):
        Envelope.from_headers(FULL.headers() | {header: value})


@pytest.mark.parametrize("headers", [None, {}, {"content-type": "application/json"}])
def test_missing_headers_are_not_a_cloudevent(headers: dict[str, str] | None) -> None:
    with pytest.raises(InvalidMessage):
        Envelope.from_headers(headers)


def test_the_trace_is_read_from_the_cloudevents_extension() -> None:
    other = PARENT.replace("4bf9", "aaaa")
    assert Envelope.from_headers(BARE.headers() | {"ce-traceparent": PARENT}).traceparent == PARENT
    assert Envelope.from_headers(FULL.headers() | {"ce-traceparent": other}).traceparent == PARENT


def test_an_unknown_extension_is_ignored() -> None:
    assert Envelope.from_headers(FULL.headers() | {"ce-partitionkey": "x", "ce-with space": "y"}) == FULL


def test_only_the_same_parts_give_the_same_event_id() -> None:
    assert event_id("a", "b") == event_id("a", "b")
    assert len({event_id("a", "b"), event_id("ab"), event_id("a", "b", ""), event_id("b", "a")}) == 4
