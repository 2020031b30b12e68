"""The permission table covers every event and command of the contracts. Each has exactly one owner."""

from __future__ import annotations

import pytest

from slmops.contracts.commands import COMMANDS, Command
from slmops.contracts.events import EVENTS, Event
from slmops.contracts.permissions import (
    ANSWERING_PERMISSIONS,
    ENROL_PERMISSIONS,
    GATEWAY_PERMISSIONS,
    SERVICE_PERMISSIONS,
    may_be_answered,
    requesters,
)
from slmops.contracts.subjects import measurements, optimize_job

NAME = "{{name()}}"
OWNERS = {name: row for name, row in SERVICE_PERMISSIONS.items() if name != "console"} | {
    "gateway": GATEWAY_PERMISSIONS
}


def covered(patterns: tuple[str, ...], subject: str) -> bool:
    return any(_matches(pattern.split("."), subject.split(".")) for pattern in patterns)


def _matches(pattern: list[str], subject: list[str]) -> bool:
    if pattern[-1] == ">":
        return len(subject) >= len(pattern) and _matches(pattern[:-1], subject[: len(pattern) - 1])
    return len(pattern) == len(subject) and all(p in ("*", s) for p, s in zip(pattern, subject, strict=True))


def publishers(subject: str) -> list[str]:
    return [name for name, row in OWNERS.items() if covered(row.publish, subject)]


@pytest.mark.parametrize("event", EVENTS.values(), ids=EVENTS)
def test_an_event_has_exactly_one_publisher(event: type[Event]) -> None:
    subject = event.subject_template().replace("{gateway_id}", NAME)
    assert len(publishers(subject)) == 1


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_the_console_may_send_a_command_and_only_its_service_receives_it(command: type[Command[object]]) -> None:  # type: ignore[type-var]
    subject = command.subject_template().replace("{gateway_id}", NAME)
    everybody = OWNERS | {f"{name}-answers": row for name, row in ANSWERING_PERMISSIONS.items()}
    listeners = [name for name, row in everybody.items() if covered(row.subscribe, subject)]
    assert listeners == [f"{command.service}-answers"]
    assert covered(SERVICE_PERMISSIONS["console"].publish, subject)


def test_only_a_gateway_may_send_its_measurements_and_fetch_its_package() -> None:
    assert publishers(measurements(NAME)) == ["gateway"]
    assert publishers(f"cmd.packager.fetch.{NAME}") == ["gateway"]


def test_only_the_optimizer_may_queue_jobs_and_only_rollout_may_write_plans() -> None:
    assert publishers(optimize_job("edge")) == ["optimizer"]
    assert publishers("$KV.desired.blueprint.x") == ["rollout"]


def test_the_bootstrap_user_may_only_request_enrolment_and_renewal_by_a_signature() -> None:
    assert ENROL_PERMISSIONS.publish == ("cmd.rollout.enrol", "cmd.rollout.renew_expired")


def test_only_a_gateway_may_renew_its_credential_over_its_own_connection() -> None:
    assert publishers(f"cmd.rollout.renew.{NAME}") == ["gateway"]


def test_an_answering_user_may_publish_only_on_the_inboxes_of_its_requesters() -> None:
    assert ANSWERING_PERMISSIONS["rollout"].publish == ("_R_.>", "_INBOX.>")
    assert ANSWERING_PERMISSIONS["registry"].publish == ("_R_.>", "_INBOX_optimizer.>", "_INBOX.>")


def test_the_requesters_of_a_command_are_those_who_may_publish_it() -> None:
    assert requesters("cmd.registry.list_versions") == ("optimizer", "console")
    assert requesters("cmd.registry.retire_version") == ("console",)


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "_INBOX",
        "_INBOXES.x",
        "_INBOX_optimizer.x",
        "_INBOX_gw-1.x",
        "_R_",
        "_RX.x",
        "slmops.model.retired.v1",
        "$KV.desired.blueprint.edge-chat",
        "cmd.registry.retire_version",
        "$JS.API.STREAM.PURGE.EVENTS",
    ],
)
def test_only_inboxes_of_requesters_get_an_answer(reply: str) -> None:
    assert not may_be_answered("cmd.registry.retire_version", reply)
    assert may_be_answered("cmd.registry.retire_version", "_INBOX.x.y")
    assert may_be_answered("cmd.registry.retire_version", "_R_.x.y")
    assert may_be_answered("cmd.registry.list_versions", "_INBOX_optimizer.x")
