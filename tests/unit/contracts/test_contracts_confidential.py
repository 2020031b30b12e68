"""A message with a secret is marked, so that nothing keeps its payload."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel, SecretStr

from slmops.contracts.commands import COMMANDS, EnrolGateway
from slmops.contracts.events import EVENTS

SECRET = re.compile(r"token|secret|password|passphrase|seed|private|credential")


def secrets_of(kind: type[BaseModel]) -> Iterator[str]:
    for name, info in kind.model_fields.items():
        hidden = info.repr is False or info.annotation is SecretStr
        if hidden or SECRET.search(name):
            yield name


def test_the_enrolment_token_is_recognised_as_a_secret() -> None:
    assert list(secrets_of(EnrolGateway)) == ["token"]


@pytest.mark.parametrize("kind", COMMANDS.values(), ids=lambda kind: kind.name)
def test_a_command_with_a_secret_is_confidential(kind: Any) -> None:
    assert kind.confidential is bool(list(secrets_of(kind)))


@pytest.mark.parametrize("kind", EVENTS.values(), ids=lambda kind: kind.type)
def test_no_event_contains_a_secret(kind: Any) -> None:
    assert list(secrets_of(kind)) == []
