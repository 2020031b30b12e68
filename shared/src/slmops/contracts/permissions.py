"""The NATS permissions: which user may publish and subscribe to which subject. This is the only such table.

The server enforces it, so a defect or a stolen credential of one service cannot be used to act as another service.

Architecture Invariant: a user that answers requests can publish only on inboxes. A request names the subject of its
answer, so a user that both answers and publishes would publish to any subject that a request names. Each service
therefore has two users: `<service>` consumes and publishes, `<service>-answers` answers commands.

Each service holds exactly the rights on JetStream that it uses (`jetstream`). Streams and buckets are created by a user
of its own, `provisioner`.

Gateways and the enrolment user have separate accounts (`kit.nats_auth`). Their messages reach the services' account
through service imports. The server returns the answers to the account that sent the request, whatever reply subject
the request names.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta
from typing import Final, NamedTuple

from slmops.contracts import jetstream
from slmops.contracts.subjects import CONSUMED, DESIRED_BUCKET, INBOX, JOB_BUCKET, STREAMS, inbox, matches

ANSWER_WITHIN: Final = timedelta(minutes=30)
"""How long a requester waits for the slowest commands: registering hashes gigabytes, verifying runs a model."""


class Permissions(NamedTuple):
    """Subjects that a user may publish and subscribe to. The server denies all others."""

    publish: tuple[str, ...]
    subscribe: tuple[str, ...]


_STREAMS: Final = tuple(spec.name for spec in STREAMS)
_BUCKETS: Final = tuple(jetstream.bucket_stream(name) for name in (DESIRED_BUCKET, JOB_BUCKET))
PROVISIONER: Final = "provisioner"
"""The user that creates streams and buckets. No service runs with its credentials."""


def _user(name: str, *publish: str, consumes: Iterable[str] = (), uses: Iterable[str] = ()) -> Permissions:
    """Returns the permissions of a service's user: its subjects, dead letters, and what it uses of JetStream.

    `consumes` are the subjects of its durable consumers, `uses` its further rights on JetStream. Answers and events
    (pull consumers) arrive on its inbox.
    """
    pulled = [right for subject in consumes for right in jetstream.consuming(name, subject)]
    return Permissions((*publish, "dlq.>", *jetstream.WATCHING, *pulled, *uses), (f"{inbox(name)}.>",))


SERVICE_PERMISSIONS: Final[dict[str, Permissions]] = {
    "registry": _user(
        "registry",
        "slmops.model.>",
        consumes=CONSUMED["registry"],
        uses=jetstream.reading_all("slmops.model.>"),
    ),
    # It gets a version's files from the registry, so nobody can have other files optimized under its name.
    "optimizer": _user(
        "optimizer",
        "slmops.variant.>",
        "jobs.>",
        "$KV.jobs.>",
        "cmd.registry.list_versions",
        consumes=CONSUMED["optimizer"],
        uses=(*jetstream.reading_bucket(JOB_BUCKET), *jetstream.scanning_bucket(JOB_BUCKET)),
    ),
    "packager": _user(
        "packager",
        "slmops.package.>",
        consumes=CONSUMED["packager"],
        uses=(*jetstream.listing_bucket(DESIRED_BUCKET), *jetstream.reading_bucket(DESIRED_BUCKET, "blueprint.*")),
    ),
    "rollout": _user(
        "rollout",
        "slmops.rollout.>",
        "slmops.blueprint.>",
        "slmops.gateway.enrolled.v1.*",
        "slmops.gateway.revoked.v1.*.*",
        "$KV.desired.>",
        consumes=CONSUMED["rollout"],
        uses=(
            *jetstream.reading_latest("slmops.gateway.enrolled.v1.*"),
            *jetstream.reading_bucket(DESIRED_BUCKET),
        ),
    ),
    "telemetry": _user(
        "telemetry",
        "slmops.cohort.>",
        consumes=CONSUMED["telemetry"],
        uses=(
            *jetstream.reading_latest("slmops.gateway.enrolled.v1.*"),
            *jetstream.reading_latest("slmops.gateway.reported.v1.*"),
            *jetstream.reading_all("slmops.rollout.>"),
            *jetstream.reading_bucket(DESIRED_BUCKET, "blueprint.*"),
        ),
    ),
    # The operator may send every command, and republish every dead letter to its original subject.
    "console": _user(
        "console",
        "cmd.>",
        "slmops.>",
        "measure.>",
        "jobs.>",
        uses=(
            *jetstream.reading_everything(*_STREAMS, *_BUCKETS),
            *jetstream.repairing(*_STREAMS),
            "$JS.API.STREAM.MSG.DELETE.DLQ",
        ),
    ),
}

PROVISIONER_PERMISSIONS: Final = Permissions(jetstream.provisioning(*_STREAMS, *_BUCKETS), (f"{inbox(PROVISIONER)}.>",))

SERVER_INBOX: Final = "_R_"
"""Prefix of the reply subjects that the server generates for requests from another account. Clients may not use it."""


def requesters(command: str) -> tuple[str, ...]:
    """Returns the users of the services' account that may publish requests on the subject `command`."""
    return tuple(
        user
        for user, row in SERVICE_PERMISSIONS.items()
        if any(pattern.startswith("cmd.") and matches(pattern, command) for pattern in row.publish)
    )


def may_be_answered(command: str, reply: str) -> bool:
    """Returns whether `reply` is an inbox of a user who may publish requests on the subject `command`.

    An empty `reply` is not: a JetStream acknowledgement that a publisher directed to a command's subject has no reply
    subject.
    """
    inboxes = (SERVER_INBOX, *map(inbox, requesters(command)))
    return any(reply.startswith(f"{prefix}.") for prefix in inboxes)


def answering_user(service: str) -> str:
    """Returns the user with which a service answers commands."""
    return f"{service}-answers"


def _answers(service: str) -> Permissions:
    mine = f"cmd.{service}.>"
    asking = [user for user, row in SERVICE_PERMISSIONS.items() if any(_within(p, mine) for p in row.publish)]
    return Permissions((f"{SERVER_INBOX}.>", *(f"{inbox(user)}.>" for user in asking)), (mine,))


def _within(pattern: str, service: str) -> bool:
    """Returns whether a user who may publish on `pattern` may send requests to a service."""
    return pattern == "cmd.>" or matches(service, pattern)


ANSWERING_PERMISSIONS: Final[dict[str, Permissions]] = {
    service: _answers(service) for service in ("registry", "optimizer", "packager", "rollout")
}
"""The permissions of each service's answering user."""

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
"""A template: the server fills in id and blueprint from the gateway's signed JWT, so it publishes only as itself."""

ENROL_USER: Final = "enrol"
ENROL_PERMISSIONS: Final = Permissions(publish=("cmd.rollout.enrol",), subscribe=(f"{inbox(ENROL_USER)}.>",))
"""The bootstrap user that all new gateways share. It can only request enrolment."""
