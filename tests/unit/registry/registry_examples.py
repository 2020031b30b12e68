"""A model with versions, for the tests of the registry."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from slmops.contracts.commands import RegisterVersion
from slmops.contracts.descriptor import digest_of
from slmops.contracts.events import Event
from slmops.contracts.model import ModelFile
from slmops.registry.domain.versions import Model, evolve, register

T0 = datetime(2030, 1, 1, tzinfo=UTC)
UPLOAD = "0" * 32


def at(seconds: float) -> datetime:
    return T0 + timedelta(seconds=seconds)


def file(path: str, content: str) -> ModelFile:
    return ModelFile(path=path, digest=digest_of(content.encode()), size_bytes=len(content))


GOLDEN = file("golden.jsonl", "questions")


def pushed(
    version: str, content: str = "weights", golden: ModelFile | None = None, *more: ModelFile
) -> RegisterVersion:
    return RegisterVersion(
        model="smollm2",
        version=version,
        upload=UPLOAD,
        format="gguf",
        architecture="llama",
        files=(file("model.gguf", content), *more),
        golden=golden,
    )


def told(model: Model, *events: Event) -> Model:
    for event in events:
        model = evolve(model, event)
    return model


def with_versions(*commands: RegisterVersion) -> Model:
    model = Model("smollm2")
    for seconds, command in enumerate(commands):
        model = told(model, *register(model, command, at(seconds)))
    return model
