"""Golden files: the wire format of every event, command and document, as text that a change must not alter.

Only `cd tests && python -m contract.golden_files` writes missing files. It never overwrites an existing file, because
released versions use its format. To change a format, add a new version of the event.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from contract.wire_commands import COMMANDS
from contract.wire_examples import AT, DOCUMENTS, EVENTS, TRACEPARENT
from pydantic import BaseModel

from slmops.contracts.cloudevent import Envelope, event_id
from slmops.contracts.commands import Command
from slmops.contracts.events import Event
from slmops.contracts.identity import Actor, Role, person
from slmops.contracts.permissions import COMMAND_ROLES

FOLDER = Path(__file__).parent / "golden"


def data(model: BaseModel) -> Any:
    """Returns a model as JSON values in the order of the wire."""
    return json.loads(wire(model))


def wire(model: BaseModel) -> bytes:
    """Returns the bytes that `BusClient` and `Bus` send."""
    return model.model_dump_json(by_alias=True).encode()


def envelope_of(event: Event) -> Envelope:
    return Envelope(
        id=event_id("golden", event.type),
        source="slmops/golden",
        type=event.type,
        time=AT,
        subject=event.key,
        traceparent=TRACEPARENT,
    )


def command_file(kind: type[Command[Any]]) -> str:
    return f"cmd.{kind.service}.{kind.name}.json"


def sender(kind: type[Command[Any]]) -> Actor:
    """Returns the person of the least role that may send a command."""
    return person("alice", COMMAND_ROLES.get(kind.subject_template(), Role.ADMIN))


def all_golden() -> dict[str, dict[str, Any]]:
    """Returns file name → content for everything in `wire_examples`."""
    events = {
        f"{e.type}.json": {"subject": e.subject, "headers": envelope_of(e).headers(), "data": data(e)} for e in EVENTS
    }
    commands = {
        command_file(type(c)): {"subject": c.sent_by(sender(type(c))), "data": data(c), "result": data(result)}
        for c, result in COMMANDS
    }
    return events | commands | {f"{name}.json": {"data": data(document)} for name, document in DOCUMENTS.items()}


def render(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, content in all_golden().items():
        if not (FOLDER / name).exists():
            (FOLDER / name).write_text(render(content))
            print(f"new: {name}")


if __name__ == "__main__":
    main()
