"""Which errors are retried."""

from __future__ import annotations

from datetime import timedelta

import pytest
from pydantic import BaseModel, ValidationError

from slmops.contracts.errors import Conflict, InvalidMessage, NotFound, TemporaryError, Unreachable
from slmops.kit.bus.delivery import BACKOFF_S, MAX_DELIVER, classify, not_json


class Person(BaseModel):
    age: int


def refused(text: str) -> ValidationError:
    with pytest.raises(ValidationError) as caught:
        Person.model_validate_json(text)
    return caught.value


@pytest.mark.parametrize("error", [NotFound("x"), InvalidMessage("x"), refused("{}")], ids=lambda e: type(e).__name__)
def test_a_permanent_error_is_not_retried(error: Exception) -> None:
    assert classify(error, delivered=1) is None


@pytest.mark.parametrize("delivered", range(1, MAX_DELIVER))
def test_a_temporary_error_is_retried(delivered: int) -> None:
    error = Unreachable("x", delay=timedelta(seconds=9))
    assert classify(error, delivered) is error


@pytest.mark.parametrize("error", [Conflict("x"), KeyError("x")], ids=lambda e: type(e).__name__)
def test_nothing_is_retried_after_the_last_delivery(error: Exception) -> None:
    assert classify(error, MAX_DELIVER) is None


def test_a_consumer_may_have_its_own_delivery_limit() -> None:
    assert classify(Conflict("x"), MAX_DELIVER, max_deliver=MAX_DELIVER + 1) is not None
    assert classify(Conflict("x"), MAX_DELIVER + 1, max_deliver=MAX_DELIVER + 1) is None


def test_an_unexpected_exception_is_retried_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    found = classify(KeyError("hunter2"), delivered=1)
    assert type(found) is TemporaryError
    assert "KeyError" in found.what
    assert "hunter2" not in str(found)
    assert caplog.records[0].exc_info


def test_redelivery_delays_grow() -> None:
    assert len(BACKOFF_S) == MAX_DELIVER - 1
    assert list(BACKOFF_S) == sorted(BACKOFF_S)


@pytest.mark.parametrize(("text", "names"), [('{"age":"hunter2"}', "age"), ("{hunter2", "payload")])
def test_a_validation_error_names_the_field_without_its_value(text: str, names: str) -> None:
    error = not_json(refused(text))
    assert names in error.what
    assert "hunter2" not in error.what
