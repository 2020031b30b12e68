"""Versions and aliases of one model: decides which events a command causes, and applies events.

Rules
1. A version's files never change: registering the same files again is the same version, other files are rejected.
2. An alias names a registered version. A retired version cannot get an alias, and one with an alias cannot be retired.
3. A command whose result already exists causes no event, so repeating it is harmless.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import reduce

from slmops.contracts.commands import RegisterVersion, RetireVersion, SetAlias
from slmops.contracts.descriptor import Descriptor, Digest
from slmops.contracts.errors import AlreadyExists, IllegalTransition, InternalError, InvalidMessage, NotFound
from slmops.contracts.events import Event, ModelAliasMoved, ModelVersionRegistered, ModelVersionRetired
from slmops.contracts.manifest import DATASET
from slmops.contracts.model import ModelFile, collision, files_digest
from slmops.registry.domain.lifecycle import State, Trigger, next_state


@dataclass(frozen=True)
class Registered:
    """A registered or retired version."""

    state: State
    event: ModelVersionRegistered


@dataclass(frozen=True)
class Model:
    """The state of a model. `versions` are in the order of their registration."""

    name: str
    versions: Mapping[str, Registered] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)

    def state_of(self, version: str) -> State:
        return self.versions[version].state if version in self.versions else State.ABSENT

    def version(self, version: str) -> Registered:
        """Returns a version. Raises `NotFound`."""
        if version not in self.versions:
            known = ", ".join(self.versions) or "none"
            raise NotFound(f"there is no {self.name}:{version}", fix=f"Registered versions: {known}.")
        return self.versions[version]

    @property
    def newest_golden(self) -> Descriptor | None:
        """Golden prompts of the version that was registered last and is not retired."""
        current = [v.event for v in self.versions.values() if v.state is State.REGISTERED]
        return current[-1].golden if current else None


def replay(name: str, events: Iterable[Event]) -> Model:
    return reduce(evolve, events, Model(name))


def evolve(model: Model, event: Event) -> Model:
    match event:
        case ModelVersionRegistered(version=version):
            made = Registered(next_state(model.state_of(version), Trigger.REGISTER), event)
            return replace(model, versions={**model.versions, version: made})
        case ModelAliasMoved(alias=alias, version=version):
            next_state(model.state_of(version), Trigger.SET_ALIAS)
            return replace(model, aliases={**model.aliases, alias: version})
        case ModelVersionRetired(version=version):
            retired = Registered(next_state(model.state_of(version), Trigger.RETIRE), model.versions[version].event)
            return replace(model, versions={**model.versions, version: retired})
    raise InternalError(f"{event.type} does not belong to a model")


def check_files(files: Iterable[ModelFile]) -> None:
    """Raises `InvalidMessage` for files that cannot be in one folder, also one that ignores case."""
    both = collision(file.path for file in files)
    if both is None:
        return
    if both[0] == both[1]:
        raise InvalidMessage(f"the file {both[0]} is named twice", fix="Name every file once.")
    raise InvalidMessage(f"{both[0]} and {both[1]} cannot be in one folder everywhere", fix="Rename one of them.")


def holds(model: Model, version: str, files: Iterable[ModelFile]) -> bool:
    """Returns whether this version is registered with these files. Raises `AlreadyExists` if it has other files.

    Golden prompts, texts and tasks may be among `files`, because an upload lists all files together. They are not part
    of the identity.
    """
    there = model.versions.get(version)
    if there is None:
        return False
    named, beside = tuple(files), _beside(there.event)
    weights = tuple(f for f in named if f.digest not in beside)
    if there.event.digest not in (files_digest(named), files_digest(weights)):
        raise AlreadyExists(
            f"{model.name}:{version} is registered with other files",
            where=f"{model.name}:{version}, {there.event.digest}",
            fix="A version never changes: choose a new version.",
        )
    return True


def register(model: Model, command: RegisterVersion, at: datetime) -> list[Event]:
    """Decides `RegisterVersion`. Raises `AlreadyExists`, `InvalidMessage`."""
    data = command.data.files if command.data else ()
    check_files((*command.files, *(file for file in data if file not in command.files)))
    beside = {command.golden, *data}
    weights = tuple(sorted((f for f in command.files if f not in beside), key=lambda file: file.path))
    if not weights:
        raise InvalidMessage("golden prompts alone are not a model", fix="Name the model's files too.")
    if holds(model, command.version, weights):
        _check_same_golden(model, command)
        _check_same_data(model, command)
        return []
    registered = ModelVersionRegistered(
        model=command.model,
        version=command.version,
        digest=files_digest(weights),
        format=command.format,
        architecture=command.architecture,
        files=weights,
        golden=_descriptor(command.golden) if command.golden else model.newest_golden,
        data=command.data if data else None,
        at=at,
    )
    next_state(model.state_of(command.version), Trigger.REGISTER)
    return [registered]


def set_alias(model: Model, command: SetAlias, at: datetime) -> list[Event]:
    """Decides `SetAlias`. Raises `NotFound`, `IllegalTransition`."""
    model.version(command.version)
    previous = model.aliases.get(command.alias)
    if previous == command.version:
        return []
    next_state(model.state_of(command.version), Trigger.SET_ALIAS)
    moved = ModelAliasMoved(model=command.model, alias=command.alias, version=command.version, previous=previous, at=at)
    return [moved]


def retire(model: Model, command: RetireVersion, at: datetime) -> list[Event]:
    """Decides `RetireVersion`. Raises `NotFound`, `IllegalTransition` while an alias names the version."""
    if model.version(command.version).state is State.RETIRED:
        return []
    if named := sorted(alias for alias, version in model.aliases.items() if version == command.version):
        raise IllegalTransition(
            f"{model.name}:{command.version} is named by the alias {', '.join(named)}",
            fix="Move the alias to another version first.",
        )
    next_state(model.state_of(command.version), Trigger.RETIRE)
    return [ModelVersionRetired(model=command.model, version=command.version, reason=command.reason, at=at)]


def _descriptor(golden: ModelFile) -> Descriptor:
    return Descriptor(media_type=DATASET, digest=golden.digest, size=golden.size_bytes)


def _beside(event: ModelVersionRegistered) -> set[Digest]:
    """Returns the blobs of a version that are not part of its identity."""
    golden = [event.golden.digest] if event.golden else []
    return {*golden, *(file.digest for file in (event.data.files if event.data else ()))}


def _check_same_golden(model: Model, command: RegisterVersion) -> None:
    there = model.version(command.version).event.golden
    if command.golden and (there is None or there.digest != command.golden.digest):
        raise AlreadyExists(
            f"{model.name}:{command.version} is registered with other golden prompts",
            where=f"{model.name}:{command.version}",
            fix="A version never changes: choose a new version.",
        )


def _check_same_data(model: Model, command: RegisterVersion) -> None:
    there = model.version(command.version).event.data
    if command.data and command.data.files and (there is None or there.identity != command.data.identity):
        raise AlreadyExists(
            f"{model.name}:{command.version} is registered with other texts and tasks",
            where=f"{model.name}:{command.version}",
            fix="Choose a new version, or give them to a single optimization: slmops optimize --texts FILE.",
        )
