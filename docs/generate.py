"""Generates docs/events.md, docs/states/*.md and docs/asyncapi/*.json from the code. Needs no connection.

python docs/generate.py            writes the files
python docs/generate.py --check    exits with 1 and names each file that does not match the code
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import pkgutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import unquote

from pydantic import BaseModel, TypeAdapter
from pydantic.json_schema import models_json_schema

from slmops.contracts.commands import COMMANDS, Command
from slmops.contracts.descriptor import Digest
from slmops.contracts.errors import Problem
from slmops.contracts.events import EVENTS, Event
from slmops.contracts.freshness import GatewayPresence
from slmops.contracts.jobs import OptimizeJob
from slmops.contracts.measurement import MeasurementBatch
from slmops.contracts.names import NAME_PATTERN, VERSION_PATTERN
from slmops.contracts.permissions import COMMAND_ROLES, GATEWAY_PERMISSIONS, SERVICE_PERMISSIONS
from slmops.contracts.subjects import matches
from slmops.kit.service import Service

ROOT = Path(__file__).parents[1]
SERVICES = sorted(path.parent.name for path in ROOT.glob("services/*/pyproject.toml"))
WITHOUT_BUS = {"console", "gateway"}
"""They send requests and publish, but consume nothing."""
STORED: tuple[type[BaseModel], ...] = (MeasurementBatch, GatewayPresence, OptimizeJob)
"""Messages on streams that are not events."""
PARAMETERS = {
    "gateway_id": "The sending gateway",
    "public_key": "The key that the event is about",
    "role": "The role of the person who sends it, or `service`",
    "sender": "The person or service that sends it",
}
"""Placeholders in subjects."""
Schema = dict[str, Any]


# ---- traffic of the services ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Traffic:
    """Subjects that one service consumes or answers → the name of the message's class, as FastStream documents it."""

    service: str
    receives: dict[str, str]


def traffic_of(name: str) -> Traffic:
    app = importlib.import_module(f"slmops.{name}.app")
    kind = importlib.import_module(f"slmops.{name}.settings").Settings
    required = {field: Path("unused") for field, info in kind.model_fields.items() if info.is_required()}
    service: Service = app.build(kind(**required))
    receives = {}
    for broker in (service.bus.broker, service.bus.answering):
        specification = service.specification().add_broker(broker).to_specification()
        found: Schema = json.loads(specification.to_json())
        for channel in found["channels"].values():
            (reference,) = channel["messages"].values()
            message = found["components"]["messages"][_target(reference)]
            receives[channel["address"]] = _target(message["payload"])
    return Traffic(name, dict(sorted(receives.items())))


def _target(reference: Schema) -> str:
    """Returns the last part of a JSON reference."""
    return unquote(str(reference.get("$ref", ""))).rpartition("/")[2]


def emitter(event: type[Event]) -> str:
    """Returns who may publish an event by the server's permissions: the owning service, or otherwise the gateways."""
    subject = event.subject_template().replace("{gateway_id}", "gw")
    for service, permissions in SERVICE_PERMISSIONS.items():
        if any(matches(pattern, subject) for pattern in permissions.publish):
            return service
    assert any(matches(p.replace("{{name()}}", "gw"), subject) for p in GATEWAY_PERMISSIONS.publish), event.type
    return "gateway"


def consumers(event: type[Event], traffic: list[Traffic]) -> list[str]:
    subject = event.subject_template().replace("{gateway_id}", "*").replace("{public_key}", "*")
    return [t.service for t in traffic if subject in t.receives]


# ---- events.md --------------------------------------------------------------------------------------------

_WORDS = {
    NAME_PATTERN: "name",
    VERSION_PATTERN: "version",
    TypeAdapter(Digest).json_schema()["pattern"]: "digest",
}


def kind_of(schema: Schema) -> str:
    """Describes a JSON schema in a few words, with links to the types below."""
    if "$ref" in schema:
        name = _target(schema)
        return f"[{name}](#{name.lower()})"
    if "anyOf" in schema:
        return " or ".join(kind_of(part) for part in schema["anyOf"])
    if "const" in schema:
        return f"always `{json.dumps(schema['const'])}`"
    match schema.get("type"):
        case "array":
            return f"list of {kind_of(schema['items'])}"
        case "object":
            return f"map of {kind_of(schema.get('additionalProperties', {}))}"
        case "string":
            return _string(schema)
        case "integer" | "number":
            return str(schema["type"]) + "".join(_limits(schema))
        case other:
            return str(other or "any")


def _string(schema: Schema) -> str:
    return _WORDS.get(schema.get("pattern", ""), "time" if schema.get("format") == "date-time" else "string")


def _limits(schema: Schema) -> Iterator[str]:
    for key, sign in (("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"), ("exclusiveMaximum", "<")):
        if key in schema:
            yield f" {sign} {schema[key]:g}"


def fields(schema: Schema) -> list[str]:
    if "enum" in schema:
        return ["One of " + ", ".join(f"`{value}`" for value in schema["enum"]) + ".", ""]
    if not schema.get("properties"):
        return ["No fields.", ""]
    lines = ["| field | type | default | |", "| --- | --- | --- | --- |"]
    for name, field in schema["properties"].items():
        default = "required" if name in schema.get("required", ()) else _default(field)
        note = " ".join(field.get("description", "").split()).replace("|", "\\|")
        lines.append(f"| `{name}` | {kind_of(field)} | {default} | {note} |")
    return [*lines, ""]


def _default(field: Schema) -> str:
    if "default" not in field:
        return "empty"
    text = json.dumps(field["default"], ensure_ascii=False)
    return f"`{text}`" if len(text) <= 40 else "see the type"


def schemas() -> dict[str, Schema]:
    """Returns the schemas of all models that cross the wire, by class name, with references between them."""
    commands = [model for kind in COMMANDS.values() for model in (kind, kind.result_type())]
    models = {model.__name__: model for model in (*EVENTS.values(), *commands, *STORED, Problem)}
    wanted = [(model, "validation") for model in models.values()]
    found: Schema = models_json_schema(wanted, ref_template="#/components/schemas/{model}")[1]["$defs"]  # type: ignore[arg-type]
    return dict(sorted(found.items()))


def summary(model: type[BaseModel]) -> str:
    """Returns the first paragraph of a class's own docstring."""
    own = vars(model).get("__doc__") or ""
    return " ".join(own.split("\n\n")[0].split())


def events_page(traffic: list[Traffic]) -> str:
    known = schemas()
    lines = [
        "# Events and commands",
        "",
        "Generated by `make docs` from the contracts; do not edit. On the wire an event is a CloudEvent in binary",
        "mode: its attributes are `ce-*` headers, its fields the JSON payload. Readers ignore unknown fields.",
        "",
        "## Events",
        "",
    ]
    for event in EVENTS.values():
        lines += [f"### {event.__name__}", "", *_paragraph(summary(event))]
        readers = ", ".join(consumers(event, traffic)) or "no service yet"
        lines += [f"`{event.subject_template()}`, emitted by {emitter(event)}, consumed by {readers}.", ""]
        lines += fields(known[event.__name__])
    lines += [
        "## Commands",
        "",
        "Commands are requests with a reply. On an error the reply is a [Problem](#problem). The subject of a command",
        "ends in its sender: `cmd.<service>.<name>.<role>.<person>` or `cmd.<service>.<name>.service.<service>`.",
        "",
    ]
    for command in COMMANDS.values():
        answer = command.result_type().__name__
        lines += [f"### {command.__name__}", "", *_paragraph(summary(command))]
        lines += [
            f"`{command.subject_template()}`, answered by {command.service} with [{answer}](#{answer.lower()})."
            + role(command),
            "",
        ]
        lines += fields(known[command.__name__])
    lines += ["## Types", ""]
    done = {model.__name__ for model in (*EVENTS.values(), *COMMANDS.values())}
    for name in (name for name in known if name not in done):
        lines += [f"### {name}", "", *_paragraph(known[name].get("description", "").split("\n\n")[0])]
        lines += fields(known[name])
    return "\n".join(lines)


def role(command: type[Command[Any]]) -> str:
    needed = COMMAND_ROLES.get(command.subject_template())
    return f" Needs the role {needed}." if needed else ""


def address(command: type[Command[Any]]) -> str:
    """Returns the subject with placeholders for its sender."""
    base = command.subject_template()
    return base if command.anonymous or command.per_gateway else f"{base}.{{role}}.{{sender}}"


def _paragraph(text: str) -> list[str]:
    return [" ".join(text.split()), ""] if text else []


# ---- states -----------------------------------------------------------------------------------------------


def tables(service: str) -> list[tuple[ModuleType, dict[tuple[Enum, Enum], Enum]]]:
    """Returns every `TRANSITIONS` table of a service's domain with its module."""
    name = f"slmops.{service}.domain"
    if importlib.util.find_spec(name) is None:
        return []
    domain = importlib.import_module(name)
    below = sorted(info.name for info in pkgutil.iter_modules(getattr(domain, "__path__", ())))
    modules = [domain, *(importlib.import_module(f"{name}.{module}") for module in below)]
    own = [m for m in modules if "TRANSITIONS" in vars(m) and "\nTRANSITIONS" in Path(str(m.__file__)).read_text()]
    return [(module, module.TRANSITIONS) for module in own]


def diagram(table: dict[tuple[Enum, Enum], Enum]) -> list[str]:
    """Draws a table with Mermaid. Its first state is the initial one; states without outgoing transitions are final."""
    edges: dict[tuple[str, str], list[str]] = {}
    for (state, trigger), target in table.items():
        edges.setdefault((str(state.value), str(target.value)), []).append(str(trigger.value).replace("_", " "))
    left = {source for source, _ in edges}
    ends = dict.fromkeys(target for _, target in edges if target not in left)
    return [
        "stateDiagram-v2",
        f"    [*] --> {next(iter(edges))[0]}",
        *(f"    {source} --> {target}: {', '.join(triggers)}" for (source, target), triggers in edges.items()),
        *(f"    {end} --> [*]" for end in ends),
    ]


def states_page(service: str) -> str | None:
    lines = [f"# States in {service}", "", "Generated by `make docs` from the transition tables; do not edit.", ""]
    found = tables(service)
    for module, table in found:
        lines += [f"## {module.__name__}", "", *_paragraph((module.__doc__ or "").split("\n\n")[0])]
        lines += ["```mermaid", *diagram(table), "```", ""]
    return "\n".join(lines) if found else None


# ---- asyncapi ---------------------------------------------------------------------------------------------


def asyncapi(traffic: Traffic) -> Schema:
    """Returns a service's AsyncAPI 3.0.0 document: what FastStream consumes and answers, and the events."""
    document = _Document(traffic.service)
    classes: dict[str, type[BaseModel]] = {model.__name__: model for model in (*EVENTS.values(), *STORED)}
    commands = {kind.pattern(): kind for kind in COMMANDS.values()}
    for subject, name in traffic.receives.items():
        if subject in commands:
            document.answer(commands[subject])
        else:
            stored = next((e.subject_template() for e in EVENTS.values() if e.__name__ == name), None)
            document.operation("receive", classes[name], stored or subject.replace("*", "{gateway_id}"))
    for event in EVENTS.values():
        if emitter(event) == traffic.service:
            document.operation("send", event, event.subject_template())
    return document.finished()


class _Document:
    def __init__(self, service: str) -> None:
        self.channels: Schema = {}
        self.operations: Schema = {}
        self.models: dict[str, type[BaseModel]] = {}
        self.info = {"title": f"slmops {service}", "version": "0.1.0"}

    def operation(self, action: str, model: type[BaseModel], address: str | None) -> Schema:
        name = self._channel(model, address)
        self.operations[f"{action}.{name}"] = {"action": action, **_on(name)}
        return self.operations[f"{action}.{name}"]  # type: ignore[no-any-return]

    def answer(self, command: type[Command[Any]]) -> None:
        asked = self.operation("receive", command, address(command))
        # A reply goes to the inbox that the request names, so its channel has no address.
        asked["reply"] = _on(self._channel(command.result_type(), None))

    def _channel(self, model: type[BaseModel], address: str | None) -> str:
        name = model.__name__
        self.models[name] = model
        self.channels[name] = {"address": address, "messages": {name: {"$ref": f"#/components/messages/{name}"}}}
        if address and (found := [part for part in PARAMETERS if f"{{{part}}}" in address]):
            self.channels[name]["parameters"] = {part: {"description": PARAMETERS[part]} for part in found}
        return name

    def finished(self) -> Schema:
        known, wanted = schemas(), set(self.models)
        while more := {ref for name in wanted for ref in _references(known[name])} - wanted:
            wanted |= more
        messages = {name: _message(model) for name, model in sorted(self.models.items())}
        return {
            "asyncapi": "3.0.0",
            "info": self.info,
            "defaultContentType": "application/json",
            "channels": dict(sorted(self.channels.items())),
            "operations": dict(sorted(self.operations.items())),
            "components": {"messages": messages, "schemas": {name: known[name] for name in sorted(wanted)}},
        }


def _on(channel: str) -> Schema:
    return {
        "channel": {"$ref": f"#/channels/{channel}"},
        "messages": [{"$ref": f"#/channels/{channel}/messages/{channel}"}],
    }


def _message(model: type[BaseModel]) -> Schema:
    found: Schema = {"name": model.__name__, "payload": {"$ref": f"#/components/schemas/{model.__name__}"}}
    if summary(model):
        found["summary"] = summary(model)
    if issubclass(model, Event):
        attributes = ["ce-specversion", "ce-id", "ce-source", "ce-type", "ce-time"]
        properties: Schema = {name: {"type": "string"} for name in attributes}
        properties["ce-type"] = {"const": model.type}
        found["headers"] = {"type": "object", "required": attributes, "properties": properties}
    return found


def _references(schema: Any) -> set[str]:
    if isinstance(schema, list):
        return {name for part in schema for name in _references(part)}
    if not isinstance(schema, dict):
        return set()
    own = {_target(schema)} if "$ref" in schema else set()
    return own | {name for part in schema.values() for name in _references(part)}


# ---- files ------------------------------------------------------------------------------------------------


def generate() -> dict[Path, str]:
    """Returns all generated files: path below docs/ → text."""
    for variable in [name for name in os.environ if name.startswith("SLMOPS_")]:
        del os.environ[variable]  # the same documents on every machine
    traffic = [traffic_of(name) for name in SERVICES if name not in WITHOUT_BUS]
    pages = {Path("states", f"{name}.md"): page for name in SERVICES if (page := states_page(name))}
    interfaces = {Path("asyncapi", f"{t.service}.json"): json.dumps(asyncapi(t), indent=2) + "\n" for t in traffic}
    return {Path("events.md"): events_page(traffic)} | pages | interfaces


def stale(folder: Path, wanted: dict[Path, str]) -> list[Path]:
    """Returns the files that are missing, changed or obsolete."""
    present = {p.relative_to(folder) for name in ("states", "asyncapi") for p in folder.glob(f"{name}/*")}
    changed = {p for p, text in wanted.items() if not (folder / p).exists() or (folder / p).read_text() != text}
    return sorted(changed | (present - set(wanted)))


def main() -> None:
    arguments = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    arguments.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a file is stale")
    arguments.add_argument("--into", type=Path, default=ROOT / "docs", help="folder of the documents")
    options = arguments.parse_args()
    wanted = generate()
    old = stale(options.into, wanted)
    if options.check:
        for path in old:
            print(f"{options.into / path} does not match the code. Run: make docs", file=sys.stderr)
        sys.exit(bool(old))
    for path in old:
        (options.into / path).unlink(missing_ok=True)
        if path in wanted:
            (options.into / path).parent.mkdir(parents=True, exist_ok=True)
            (options.into / path).write_text(wanted[path])
            print(f"wrote {options.into / path}")


if __name__ == "__main__":
    main()
