"""The error tree crosses the wire and comes back as the same error."""

from __future__ import annotations

import re
from datetime import timedelta

import pytest

from slmops.contracts import errors
from slmops.contracts.errors import InternalError, PermanentError, Problem, SlmopsError, TemporaryError


def below(root: type[SlmopsError]) -> list[type[SlmopsError]]:
    return [root, *(found for child in root.__subclasses__() for found in below(child))]


TREE = [kind for kind in below(SlmopsError) if kind.__module__ == errors.__name__]


@pytest.mark.parametrize("kind", TREE, ids=lambda k: k.__name__)
def test_an_error_survives_the_wire(kind: type[SlmopsError]) -> None:
    problem = Problem.of(kind("no room", where="/data", fix="Free some."))
    again = Problem.model_validate_json(problem.model_dump_json()).error()
    assert type(again) is kind
    assert (again.what, again.where, again.fix) == ("no room", "/data", "Free some.")
    assert str(again) == "no room (at /data). Free some."


def test_no_code_is_used_twice() -> None:
    codes = [kind.code for kind in TREE]
    assert len(set(codes)) == len(codes)
    assert all(re.fullmatch(r"[a-z_]+", code) for code in codes)


def test_every_error_says_whether_to_retry() -> None:
    for kind in set(TREE) - {SlmopsError}:
        assert issubclass(kind, TemporaryError) != issubclass(kind, PermanentError), kind
        assert kind.exit_code == 75 if issubclass(kind, TemporaryError) else 0 < kind.exit_code < 128


def test_the_docstring_draws_the_whole_tree() -> None:
    drawn = set(re.findall(r"[A-Z]\w+", (errors.__doc__ or "").split("Codes go over")[0]))
    assert {kind.__name__ for kind in TREE} <= drawn


def test_an_unknown_code_is_permanent_and_keeps_its_text() -> None:
    error = Problem(code="from_the_future", what="odd", fix="Upgrade.").error()
    assert type(error) is PermanentError
    assert str(error) == "odd. Upgrade."


def test_a_foreign_exception_is_reported_by_its_type_without_its_text() -> None:
    problem = Problem.of(ValueError("password=hunter2"))
    assert problem.code == InternalError.code
    assert "ValueError" in problem.what
    assert "hunter2" not in problem.model_dump_json()


def test_a_temporary_error_carries_its_retry_delay() -> None:
    assert errors.NotReady("soon", delay=timedelta(seconds=7)).delay == timedelta(seconds=7)
    assert errors.Conflict("again").delay == timedelta(seconds=2)
