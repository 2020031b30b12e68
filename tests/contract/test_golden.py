"""Encoded messages equal the golden files, and golden files can be read, also those of a newer sender."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from contract import wire_commands
from contract import wire_examples as examples
from contract.golden_files import FOLDER, all_golden, command_file, envelope_of, render, wire
from pydantic import BaseModel

from slmops.contracts.cloudevent import Envelope
from slmops.contracts.commands import COMMANDS, Command
from slmops.contracts.events import EVENTS, Event

HOW_TO_MAKE = "make it with: cd tests && python -m contract.golden_files"
DOCUMENTS = [pytest.param(name, model, id=name) for name, model in examples.DOCUMENTS.items()]
by_type = pytest.mark.parametrize("event", examples.EVENTS, ids=lambda e: e.type)
by_command = pytest.mark.parametrize(
    ("command", "result"), wire_commands.COMMANDS, ids=lambda m: m.name if isinstance(m, Command) else ""
)


def snake(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


def golden(name: str) -> dict[str, Any]:
    path = FOLDER / name
    assert path.exists(), f"{name} is missing; {HOW_TO_MAKE}"
    return json.loads(path.read_text())  # type: ignore[no-any-return]


def with_unknown_fields(value: Any) -> Any:
    """Returns the same value with an unknown field in every object of our own types."""
    if isinstance(value, list):
        return [with_unknown_fields(item) for item in value]
    if not isinstance(value, dict):
        return value
    free = {
        "labels",
        "selector",
        "annotations",
        "measured",
        "urls",
        "desired_because",
        "tasks",
        "params",
        "min_accuracy",
        "md5",
        "expires",
        "problems",
        "counts",
    }
    known = {key: item if key in free else with_unknown_fields(item) for key, item in value.items()}
    return known | {"added_in_a_later_release": {"x": 1}}


def read(like: BaseModel, data: Any) -> list[BaseModel]:
    """Parses `data` unchanged and as from a newer sender."""
    return [type(like).model_validate_json(json.dumps(sent)) for sent in (data, with_unknown_fields(data))]


def test_every_event_has_one_example_and_one_golden_file() -> None:
    assert sorted(event.type for event in examples.EVENTS) == sorted(EVENTS)
    assert {path.name for path in FOLDER.glob("slmops.*")} == {f"{kind}.json" for kind in EVENTS}, HOW_TO_MAKE


def test_every_command_has_one_example_and_one_golden_file() -> None:
    assert sorted(type(command).subject_template() for command, _ in wire_commands.COMMANDS) == sorted(COMMANDS)
    assert {path.name for path in FOLDER.glob("cmd.*")} == {command_file(kind) for kind in COMMANDS.values()}, (
        HOW_TO_MAKE
    )


def test_no_golden_file_is_left_over() -> None:
    assert {path.name for path in FOLDER.iterdir()} == set(all_golden())


@pytest.mark.parametrize("kind", EVENTS.values(), ids=lambda k: k.__name__)
def test_an_event_has_one_name_end_to_end(kind: type[Event]) -> None:
    _, aggregate, event, version = kind.type.split(".")
    assert (snake(kind.__name__), version) == (f"{aggregate}_{event}", "v1")
    assert kind.subject_template().startswith(kind.type)


@pytest.mark.parametrize("kind", COMMANDS.values(), ids=lambda k: k.__name__)
def test_a_command_has_one_name_end_to_end(kind: type[Command[Any]]) -> None:
    name = snake(kind.__name__)
    assert name == kind.name or name.startswith(f"{kind.name}_")


@pytest.mark.parametrize(
    "model", [*examples.EVENTS, *(m for pair in wire_commands.COMMANDS for m in pair)], ids=lambda m: ""
)
def test_an_example_sets_every_field(model: BaseModel) -> None:
    assert model.model_fields_set == set(type(model).model_fields)


@pytest.mark.parametrize("name", all_golden())
def test_encoding_gives_exactly_the_golden_text(name: str) -> None:
    golden(name)
    assert render(all_golden()[name]) == (FOLDER / name).read_text()


@by_type
def test_an_event_on_the_wire_is_the_golden_data_without_spaces(event: Event) -> None:
    compact = json.dumps(golden(f"{event.type}.json")["data"], ensure_ascii=False, separators=(",", ":"))
    assert wire(event) == compact.encode() == event.model_dump_json().encode()


@by_type
def test_an_event_of_a_newer_sender_is_read(event: Event) -> None:
    found = golden(f"{event.type}.json")
    assert read(event, found["data"]) == [event, event]
    assert Envelope.from_headers(found["headers"] | {"ce-addedlater": "x"}) == envelope_of(event)


@by_command
def test_a_command_and_its_result_of_a_newer_sender_are_read(command: Command[Any], result: BaseModel) -> None:
    found = golden(command_file(type(command)))
    assert read(command, found["data"]) == [command, command]
    assert read(result, found["result"]) == [result, result]
    assert type(result) is type(command).result_type()


@pytest.mark.parametrize(("name", "model"), DOCUMENTS)
def test_a_document_of_a_newer_sender_is_read(name: str, model: BaseModel) -> None:
    assert read(model, golden(f"{name}.json")["data"]) == [model, model]
