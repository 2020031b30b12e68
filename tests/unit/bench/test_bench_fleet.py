"""The parts of the benchmark of a fleet that need no server: its client's parser, its percentiles, its document."""

from __future__ import annotations

import asyncio
import math

import pytest
from bench import fleet_offline
from bench.fleet_figures import ROWS, figures_of, judged
from bench.fleet_gateway import UPDATE, Gateway
from bench.fleet_simulator import Wave
from bench.fleet_wire import Wire

from slmops.contracts.errors import IllegalTransition
from slmops.contracts.events import UpdatePhase
from slmops.contracts.identity import Identity
from slmops.kit.bus.nats_auth import creds_text, new_user_seed

WHOLE = {
    "gateways": 100_000,
    "writes_per_stage": 1,
    "raw_fanout_p99_s": 1.0,
    "decided_p99_s": 1.9,
    "reports_per_s": 2_500,
    "raw_pull_per_s": 4_000,
    "cpu_ms_per_report": 0.23,
    "judgement_ms": 4.0,
    "reports_lost": 0,
    "hub_bytes_per_gateway": 900,
    "rollout_s": 400,
    "enrolments_per_s": 150,
    "telemetry": {"measurement_batches_per_s": 2_100, "samples_per_s": 84_000},
}
SMALL = WHOLE | {"gateways": 1_000, "cpu_ms_per_report": 0.2, "judgement_ms": 3.0}
PARTS = {"fleet-1000": SMALL, "fleet-100000": WHOLE, "idle": {"bytes_per_idle_gateway_per_s": 12.0}}


def test_the_document_has_every_figure() -> None:
    assert figures_of(PARTS, 100_000) == {
        "gateways": 100_000,
        "writes_per_stage": 1,
        "raw_fanout_p99_s": 1.0,
        "decided_p99_s": 1.9,
        "reports_per_s": 2_500,
        "raw_pull_per_s": 4_000,
        "cpu_ms_per_report": {"1000": 0.2, "100000": 0.23},
        "judgement_ms": {"1000": 3.0, "100000": 4.0},
        "measurement_batches_per_s": 2_100,
        "samples_per_s": 84_000,
        "reports_lost": 0,
        "bytes_per_idle_gateway_per_s": 12.0,
        "hub_bytes_per_gateway": 900,
        "rollout_s": 400,
        "enrolments_per_s": 150,
    }


def test_all_bounds_are_met_by_good_figures() -> None:
    figures = figures_of(PARTS, 100_000)
    assert [row.what for row in ROWS if row.good and not judged(row, figures)[1]] == []


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"writes_per_stage": 2}, "writes of the plan per stage"),
        ({"decided_p99_s": 2.1}, "99% have decided"),
        ({"reports_per_s": 1_999}, "reports, rollout service"),
        ({"raw_pull_per_s": 6_000}, "reports, rollout service"),
        ({"cpu_ms_per_report": 0.25}, "the same, largest fleet against smallest"),
        ({"judgement_ms": 51}, "evaluating a gate, by gateways"),
        ({"reports_lost": 1}, "reports lost"),
        ({"hub_bytes_per_gateway": 30_001}, "memory of our services per gateway"),
        ({"telemetry": {"measurement_batches_per_s": 1_999, "samples_per_s": 80_000}}, "measurement batches"),
    ],
)
def test_a_figure_beyond_its_bound_is_marked(changed: dict[str, object], what: str) -> None:
    figures = figures_of(PARTS | {"fleet-100000": WHOLE | changed}, 100_000)
    assert [row.what for row in ROWS if judged(row, figures)[1] is False] == [
        row.what for row in ROWS if row.what.startswith(what)
    ]


def test_what_was_not_measured_is_neither_good_nor_bad() -> None:
    figures = figures_of({}, 100_000)
    assert {judged(row, figures) for row in ROWS} == {("not measured", None)}


def test_a_gateway_that_never_decided_makes_the_percentile_infinite() -> None:
    wave = Wave(None, 10.0, [10.0 + number / 100 for number in range(99)])
    assert wave.percentile(0.99, 100) == pytest.approx(0.98)
    del wave.at[-1]
    assert wave.percentile(0.99, 100) == math.inf


def test_an_update_follows_the_gateways_own_table() -> None:
    gateway = Gateway(Identity(gateway_id="gw-1", blueprint="edge-chat"))
    seen = [gateway.phase for _ in gateway.update()]
    assert len(seen) == len(UPDATE)
    assert seen[-1] is gateway.phase is UpdatePhase.COMMITTED
    gateway.phase = UpdatePhase.SOAKING
    with pytest.raises(IllegalTransition):
        next(gateway.update())


async def test_stages_have_the_size_of_their_percentage() -> None:
    found = await fleet_offline.measure(5_000, lambda _: None, (10, 50, 100))
    assert [stage["percent"] for stage in found["stages"]] == [10, 50, 100]
    assert found["off_by_percent_at_most"] < 10
    assert found["stages"][-1]["gateways"] == 5_000


@pytest.mark.parametrize("size", [1, 7, 64, 10_000])
async def test_messages_are_parsed_wherever_the_stream_is_cut(size: int) -> None:
    wire = Wire(creds_text("jwt", new_user_seed()), "_INBOX_bench", 8)
    sent: list[bytes] = []
    wire._write = sent.append  # type: ignore[method-assign]
    got: list[tuple[int, bytes, bytes]] = []
    wire.on_message = lambda sid, headers, payload: got.append((sid, headers, payload))
    stream = (
        b'INFO {"nonce":"abc"}\r\nPING\r\n'
        b"HMSG twin 7 15 21\r\nNATS/1.0\r\nA\r\n\r\n\r\nab\r\n\r\n"
        b"MSG twin 8 4\r\nMSG \r\n"
        b"MSG _INBOX_bench.1 1 11\r\n" + b'{"seq":123}' + b"\r\nPONG\r\n"
    )
    wire.publish("subject", {}, b"x")
    pong = asyncio.get_running_loop().create_future()
    wire._pongs.append(pong)
    for start in range(0, len(stream), size):
        wire.data_received(stream[start : start + size])
    assert got == [(7, b"NATS/1.0\r\nA\r\n\r\n", b"\r\nab\r\n"), (8, b"", b"MSG ")]
    assert b"PONG\r\n" in sent
    assert pong.done()
    assert (wire.acknowledged, wire.refused) == (1, 0)
    await wire.settled()
