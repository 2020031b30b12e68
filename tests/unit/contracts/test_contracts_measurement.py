"""Means are computed from sums, and missing data is not zero."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
from pydantic import ValidationError

from slmops.contracts.blueprint import Blueprint, GatePolicy
from slmops.contracts.measurement import CohortWindow, MeasurementBatch

AT = datetime(2026, 1, 2, tzinfo=UTC)


def window(**changes: Any) -> CohortWindow:
    values = {
        "blueprint": "edge-chat",
        "release": "sha256:" + "a" * 64,
        "version": "1.0.0",
        "started_at": AT,
        "ended_at": AT,
        "gateways": 1,
        "requests": 10,
        "failed_requests": 2,
        "completion_tokens": 100,
        "decode_seconds": 4.0,
        "ttft_seconds": 2.0,
    }
    return CohortWindow(**(values | changes))


def test_rates_come_from_sums() -> None:
    assert (window().error_rate, window().tokens_per_s, window().ttft_s) == (0.2, 25.0, 0.25)


def test_no_data_is_none() -> None:
    silent = window(requests=0, failed_requests=0, completion_tokens=0, decode_seconds=0)
    assert (silent.error_rate, silent.tokens_per_s, silent.ttft_s) == (None, None, None)


def test_a_cohort_whose_every_request_failed_has_an_error_rate_and_no_latency() -> None:
    broken = window(failed_requests=10)
    assert (broken.error_rate, broken.ttft_s) == (1.0, None)


@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), -1.0])
def test_an_impossible_number_of_seconds_is_rejected(seconds: float) -> None:
    with pytest.raises(ValidationError):
        window(decode_seconds=seconds)


def test_a_batch_of_negative_requests_is_refused() -> None:
    fields = window().model_dump(exclude={"gateways"}) | {"batch_id": "b", "gateway_id": "gw-1", "prompt_tokens": 1}
    assert MeasurementBatch(**fields).requests == 10
    with pytest.raises(ValidationError):
        MeasurementBatch(**(fields | {"requests": -1}))


def test_a_misspelt_field_of_a_blueprint_is_refused_where_a_person_wrote_it() -> None:
    written = {"name": "edge-chat", "model": "smollm2", "gate": {"max_eror_rate": 0}}
    with pytest.raises(ValidationError, match="max_eror_rate"):
        Blueprint.model_validate(written, extra="forbid")
    assert Blueprint.model_validate(written).gate == GatePolicy()  # as an older reader of a newer document does
