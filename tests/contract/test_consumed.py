"""The table of rights on JetStream names exactly the consumers that the services have."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from slmops.contracts.permissions import SERVICE_PERMISSIONS
from slmops.contracts.subjects import CONSUMED, durable_name
from slmops.kit.bus.gaps import Durable
from slmops.kit.service import Service


@pytest.mark.parametrize("name", SERVICE_PERMISSIONS)
def test_a_service_has_rights_on_exactly_the_consumers_that_it_has(name: str) -> None:
    kind = importlib.import_module(f"slmops.{name}.settings").Settings
    required = {field: Path("unused") for field, info in kind.model_fields.items() if info.is_required()}
    service: Service = importlib.import_module(f"slmops.{name}.app").build(kind(**required))
    own = {durable.consumer for durable in service.bus.durables}
    assert own == {durable_name(name, subject) for subject in CONSUMED[name]}
    granted = [right for right in SERVICE_PERMISSIONS[name].publish if ".CONSUMER.MSG.NEXT." in right]
    assert {Durable(*right.split(".")[-2:]) for right in granted} == set(service.bus.durables)


@pytest.mark.parametrize("name", SERVICE_PERMISSIONS)
def test_a_service_reads_by_sequence_only_streams_of_facts(name: str) -> None:
    """The server does not limit this right to a subject, so the stream must hold no secrets."""
    prefix = "$JS.API.DIRECT.GET."
    rights = [right.removeprefix(prefix) for right in SERVICE_PERMISSIONS[name].publish if right.startswith(prefix)]
    assert {right for right in rights if "." not in right} <= {"EVENTS", "ENROLMENTS", "REVOCATIONS"}
