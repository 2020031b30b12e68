"""The permission table covers every event and command of the contracts. Each has exactly one owner."""

from __future__ import annotations

import pytest

from slmops.contracts.commands import COMMANDS, Command, ListVersions, ResumeRollout, StartRollout
from slmops.contracts.errors import Denied
from slmops.contracts.events import EVENTS, Event
from slmops.contracts.identity import Role, gateway, person, service
from slmops.contracts.permissions import (
    ANSWERING_PERMISSIONS,
    COMMAND_ROLES,
    ENROL_PERMISSIONS,
    GATEWAY_PERMISSIONS,
    ROLE_PERMISSIONS,
    SERVICE_PERMISSIONS,
    authorize,
    may_be_answered,
)
from slmops.contracts.subjects import measurements, optimize_job, presence

NAME = "{{name()}}"
OWNERS = SERVICE_PERMISSIONS | {"gateway": GATEWAY_PERMISSIONS}


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


COMMANDS_OF_PEOPLE = [kind for kind in COMMANDS.values() if not (kind.anonymous or kind.per_gateway)]


def test_every_command_of_people_has_a_role() -> None:
    assert {kind.subject_template() for kind in COMMANDS_OF_PEOPLE} == set(COMMAND_ROLES)


@pytest.mark.parametrize("command", COMMANDS_OF_PEOPLE, ids=lambda kind: kind.name)
def test_a_person_may_send_a_command_in_the_roles_that_cover_it_and_only_its_service_receives_it(
    command: type[Command[object]],  # type: ignore[type-var]
) -> None:
    everybody = OWNERS | {f"{name}-answers": row for name, row in ANSWERING_PERMISSIONS.items()}
    for role in Role:
        subject = f"{command.subject_template()}.{role}.{NAME}"
        listeners = [name for name, row in everybody.items() if covered(row.subscribe, subject)]
        assert listeners == [f"{command.service}-answers"]
        senders = [other for other, row in ROLE_PERMISSIONS.items() if covered(row.publish, subject)]
        allowed = role.covers(COMMAND_ROLES[command.subject_template()])
        assert senders == ([role] if allowed else []), subject


@pytest.mark.parametrize("role", Role)
def test_nobody_sends_a_command_in_another_role_or_name(role: Role) -> None:
    own = [subject for subject in ROLE_PERMISSIONS[role].publish if subject.startswith("cmd.") and NAME in subject]
    assert own and all(subject.endswith(f".{role}.{NAME}") for subject in own)
    assert ROLE_PERMISSIONS[role].subscribe == (f"_INBOX_person.{NAME}.>", "services.answer.*")


def test_only_an_admin_publishes_events_and_changes_streams() -> None:
    changing = ("slmops.", "measure.", "presence.", "jobs.", "$KV.", "$JS.API.STREAM.UPDATE", "$JS.API.CONSUMER.CREATE")
    for role in (Role.VIEWER, Role.OPERATOR, Role.APPROVER):
        assert not [subject for subject in ROLE_PERMISSIONS[role].publish if subject.startswith(changing)], role
    assert covered(ROLE_PERMISSIONS[Role.ADMIN].publish, "slmops.gateway.reported.v1.gw-1")


ALICE, BOB = person("alice", Role.OPERATOR), person("bob", Role.VIEWER)


def test_the_service_refuses_a_command_and_names_the_role_that_is_needed() -> None:
    authorize(StartRollout, ALICE)
    authorize(ListVersions, BOB)
    authorize(ListVersions, service("optimizer"))
    with pytest.raises(Denied, match="bob has the role viewer, and this command requires the role operator"):
        authorize(StartRollout, BOB)
    with pytest.raises(Denied, match="requires the role approver"):
        authorize(ResumeRollout, ALICE)
    for sender in (service("optimizer"), service("packager"), gateway("gw-1"), None):
        with pytest.raises(Denied, match="may not send"):
            authorize(StartRollout, sender)


@pytest.mark.parametrize("name", [*SERVICE_PERMISSIONS, "alice"])
@pytest.mark.parametrize("command", COMMANDS_OF_PEOPLE, ids=lambda kind: kind.name)
def test_a_service_is_authorized_exactly_where_the_server_lets_it(command: type[Command[object]], name: str) -> None:  # type: ignore[type-var]
    row = SERVICE_PERMISSIONS.get(name)
    may = row is not None and covered(row.publish, f"{command.subject_template()}.service.{name}")
    try:
        authorize(command, service(name))
    except Denied:
        assert not may
    else:
        assert may


def test_only_a_gateway_may_send_its_measurements_and_fetch_its_package() -> None:
    assert publishers(measurements(NAME)) == ["gateway"]
    assert publishers(presence(NAME)) == ["gateway"]
    assert publishers(f"cmd.packager.fetch.{NAME}") == ["gateway"]


def test_only_the_optimizer_may_queue_jobs_and_only_rollout_may_write_plans() -> None:
    assert publishers(optimize_job("edge")) == ["optimizer"]
    assert publishers("$KV.desired.blueprint.x") == ["rollout"]


def test_the_bootstrap_user_may_only_request_enrolment_and_renewal_by_a_signature() -> None:
    assert ENROL_PERMISSIONS.publish == ("cmd.rollout.enrol", "cmd.rollout.renew_expired")


def test_only_a_gateway_may_renew_its_credential_over_its_own_connection() -> None:
    assert publishers(f"cmd.rollout.renew.{NAME}") == ["gateway"]


def test_an_answering_user_may_publish_only_on_the_inboxes_of_its_requesters() -> None:
    assert ANSWERING_PERMISSIONS["rollout"].publish == ("_R_.>",)
    assert ANSWERING_PERMISSIONS["registry"].publish == ("_R_.>", "_INBOX_optimizer.>")


SENT_BY_ALICE = "cmd.registry.retire_version.approver.alice"
SENT_BY_OPTIMIZER = "cmd.registry.list_versions.service.optimizer"


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "_INBOX",
        "_INBOXES.x",
        "_INBOX_optimizer.x",
        "_INBOX_person.alice.x",
        "_INBOX_gw-1.x",
        "_R_",
        "_RX.x",
        "slmops.model.retired.v1",
        "$KV.desired.blueprint.edge-chat",
        "cmd.registry.retire_version",
        "$JS.API.STREAM.PURGE.EVENTS",
    ],
)
def test_only_an_inbox_of_the_sender_gets_an_answer(reply: str) -> None:
    assert not may_be_answered(SENT_BY_ALICE, reply)
    assert may_be_answered(SENT_BY_ALICE, "_R_.x.y")
    assert may_be_answered("cmd.packager.fetch.gw-1", "_R_.x.y")
    assert may_be_answered(SENT_BY_OPTIMIZER, "_INBOX_optimizer.x")
    assert not may_be_answered(SENT_BY_OPTIMIZER, "_R_.x.y")
    assert not may_be_answered(SENT_BY_OPTIMIZER, "_INBOX_registry.x")
