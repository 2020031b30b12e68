"""Who may speak on which subject: the only table of NATS permissions.

The server enforces it, so a defect or a stolen credential in one service cannot act as another.

Architecture Invariant: who answers requests can publish on inboxes and nowhere else. A request names the subject of its
answer, so a user that both answers and publishes would publish wherever a request tells it to. Each service therefore
has two users: `<service>` consumes and publishes, `<service>-answers` answers commands.

Gateways and the enrolment user live in accounts of their own (`kit.nats_auth`). What they may publish crosses into
ours as a service import, whose answers the server returns to the account that asked, whatever reply subject was named.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Final, NamedTuple

from slmops.contracts.subjects import INBOX, inbox, matches

ANSWER_WITHIN: Final = timedelta(minutes=30)
"""How long a requester waits for the longest command. Registering hashes gigabytes, verifying runs a model."""


class Permissions(NamedTuple):
    """Subjects that a user may publish and subscribe to. Everything else is denied by the server."""

    publish: tuple[str, ...]
    subscribe: tuple[str, ...]


# Streams, consumers, buckets and acknowledgements; `$JS.FC` answers the flow control of ordered consumers (KV watch).
_JETSTREAM = ("$JS.API.>", "$JS.ACK.>", "$JS.FC.>")
# The advisories say which message ran out of deliveries.
_ADVISORIES = "$JS.EVENT.ADVISORY.>"


def _user(name: str, *publish: str) -> Permissions:
    """What it publishes, its dead letters and JetStream. Answers and events (pull consumers) arrive on its inbox."""
    return Permissions((*publish, "dlq.>", *_JETSTREAM), (f"{inbox(name)}.>", _ADVISORIES))


SERVICE_PERMISSIONS: Final[dict[str, Permissions]] = {
    "registry": _user("registry", "slmops.model.>"),
    # It asks the registry what a version is made of: nobody can have other files optimized under its name.
    "optimizer": _user("optimizer", "slmops.variant.>", "jobs.>", "$KV.jobs.>", "cmd.registry.list_versions"),
    "packager": _user("packager", "slmops.package.>"),
    "rollout": _user(
        "rollout", "slmops.rollout.>", "slmops.blueprint.>", "slmops.gateway.enrolled.v1.*", "$KV.desired.>"
    ),
    "telemetry": _user("telemetry", "slmops.cohort.>"),
    # The operator: every command, and a dead letter of anybody back to where it came from.
    "console": _user("console", "cmd.>", "slmops.>", "measure.>", "jobs.>"),
}

SERVER_INBOX: Final = "_R_"
"""Begins the reply subject that the server makes for a request from another account. Clients may not name it."""


def requesters(command: str) -> tuple[str, ...]:
    """The users of our own account that may ask on the subject `command`."""
    return tuple(
        user
        for user, row in SERVICE_PERMISSIONS.items()
        if any(pattern.startswith("cmd.") and matches(pattern, command) for pattern in row.publish)
    )


def may_be_answered(command: str, reply: str) -> bool:
    """Whether `reply` is the inbox of somebody who may ask on the subject `command`, and of nobody and nothing else.

    An empty reply is none: an acknowledgement of JetStream that a publisher led to a command's subject has no reply.
    """
    inboxes = (SERVER_INBOX, *map(inbox, requesters(command)))
    return any(reply.startswith(f"{prefix}.") for prefix in inboxes)


def answering_user(service: str) -> str:
    """The user with which a service answers commands."""
    return f"{service}-answers"


def _answers(service: str) -> Permissions:
    mine = f"cmd.{service}.>"
    asking = [user for user, row in SERVICE_PERMISSIONS.items() if any(_within(p, mine) for p in row.publish)]
    return Permissions((f"{SERVER_INBOX}.>", *(f"{inbox(user)}.>" for user in asking)), (mine,))


def _within(pattern: str, service: str) -> bool:
    """Whether somebody who may publish `pattern` may ask a service."""
    return pattern == "cmd.>" or matches(service, pattern)


ANSWERING_PERMISSIONS: Final[dict[str, Permissions]] = {
    service: _answers(service) for service in ("registry", "optimizer", "packager", "rollout")
}
"""Of every service that answers commands."""

GATEWAY_PERMISSIONS: Final = Permissions(
    publish=(
        "slmops.gateway.reported.v1.{{name()}}",
        "measure.{{name()}}",
        "cmd.packager.fetch.{{name()}}",
        "cmd.packager.fetch_metadata.{{name()}}",
        "$JS.API.DIRECT.GET.KV_desired.$KV.desired.blueprint.{{tag(blueprint)}}",
        "$JS.API.DIRECT.GET.KV_desired.$KV.desired.gateway.{{name()}}",
    ),
    subscribe=(
        f"{INBOX}_{{{{name()}}}}.>",
        "twin.desired.blueprint.{{tag(blueprint)}}",
        "twin.desired.gateway.{{name()}}",
    ),
)
"""A template: the server fills in id and blueprint from the gateway's signed JWT, so it speaks only as itself."""

ENROL_USER: Final = "enrol"
ENROL_PERMISSIONS: Final = Permissions(publish=("cmd.rollout.enrol",), subscribe=(f"{inbox(ENROL_USER)}.>",))
"""The bootstrap user that every new gateway shares: it can ask to be enrolled, and nothing else."""
