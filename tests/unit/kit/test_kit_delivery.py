"""What is tried again and what is not."""

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
def test_what_will_fail_again_is_not_tried_again(error: Exception) -> None:
    assert classify(error, delivered=1) is None


@pytest.mark.parametrize("delivered", range(1, MAX_DELIVER))
def test_a_passing_failure_is_tried_again(delivered: int) -> None:
    error = Unreachable("x", delay=timedelta(seconds=9))
    assert classify(error, delivered) is error


@pytest.mark.parametrize("error", [Conflict("x"), KeyError("x")], ids=lambda e: type(e).__name__)
def test_the_last_delivery_is_the_last(error: Exception) -> None:
    assert classify(error, MAX_DELIVER) is None


def test_a_consumer_may_have_its_own_last_delivery() -> None:
    assert classify(Conflict("x"), MAX_DELIVER, max_deliver=MAX_DELIVER + 1) is not None
    assert classify(Conflict("x"), MAX_DELIVER + 1, max_deliver=MAX_DELIVER + 1) is None


def test_a_defect_is_tried_again_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    found = classify(KeyError("hunter2"), delivered=1)
    assert type(found) is TemporaryError
    assert "KeyError" in found.what
    assert "hunter2" not in str(found)
    assert caplog.records[0].exc_info


def test_each_redelivery_has_a_delay_and_they_grow() -> None:
    assert len(BACKOFF_S) == MAX_DELIVER - 1
    assert list(BACKOFF_S) == sorted(BACKOFF_S)


@pytest.mark.parametrize(("text", "names"), [('{"age":"hunter2"}', "age"), ("{hunter2", "payload")])
def test_a_refusal_names_the_field_and_never_its_value(text: str, names: str) -> None:
    error = not_json(refused(text))
    assert names in error.what
    assert "hunter2" not in error.what
