"""The NATS permissions: which user may publish and subscribe to which subject. This is the only such table.

The server enforces it, so a defect or a stolen credential of one service cannot be used to act as another service.

Architecture Invariant: a user that answers requests can publish only on inboxes. A request names the subject of its
answer, so a user that both answers and publishes would publish to any subject that a request names. Each service
therefore has two users: `<service>` consumes and publishes, `<service>-answers` answers commands.

Each service holds exactly the rights on JetStream that it uses (`jetstream`). Streams and buckets are created by a user
of its own, `provisioner`.

People, gateways and the enrolment user have separate accounts (`kit.bus.accounts`). Their messages reach the services'
account through service imports. The server returns the answers to the account that sent the request, whatever reply
subject the request names.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta
from typing import Any, Final, NamedTuple

from slmops.contracts import jetstream
from slmops.contracts.commands.base import Command
from slmops.contracts.errors import Denied
from slmops.contracts.identity import Actor, ActorKind, Role, sender_of
from slmops.contracts.subjects import (
    CONSUMED,
    DESIRED_BUCKET,
    INBOX,
    JOB_BUCKET,
    PERSON_INBOX,
    ROLL_CALL,
    STREAMS,
    dead_letter,
    inbox,
    inbox_of,
    roll_call_answer,
)

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


ANSWERING: Final = ("registry", "optimizer", "packager", "rollout", "access")
"""The services that answer commands."""


def _user(name: str, *publish: str, consumes: Iterable[str] = (), uses: Iterable[str] = ()) -> Permissions:
    """Returns the permissions of a user: its subjects, dead letters, roll calls, and what it uses of JetStream.

    `consumes` are the subjects of its durable consumers, `uses` its further rights on JetStream. Answers and events
    (pull consumers) arrive on its inbox. It may store dead letters only of what it consumes and answers, because an
    admin may replay them.
    """
    pulled = [right for subject in consumes for right in jetstream.consuming(name, subject)]
    allowed = (*publish, *_letters(name, consumes), roll_call_answer(name), *jetstream.WATCHING, *pulled, *uses)
    return Permissions(allowed, (f"{inbox(name)}.>", ROLL_CALL))


def _letters(name: str, consumes: Iterable[str]) -> tuple[str, ...]:
    commands = f"cmd.{name}.>"
    own = (dead_letter(commands), dead_letter(commands, confidential=True)) if name in ANSWERING else ()
    return (*map(dead_letter, consumes), *own)


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
        "cmd.registry.list_versions.service.optimizer",
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
        *(f"slmops.gateway.{fact}.v1.*" for fact in ("moved", "reenrolment_allowed", "removed")),
        "$KV.desired.>",
        consumes=CONSUMED["rollout"],
        uses=(
            *jetstream.reading_latest("slmops.gateway.enrolled.v1.*"),
            *jetstream.forgetting("slmops.gateway.enrolled.v1.*"),
            *jetstream.reading_latest("slmops.gateway.revoked.v1.*.*"),
            *jetstream.reading_latest("slmops.gateway.reported.v1.*"),
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
    # It reads every revocation again at its start, and enrolments after a loss of its database. Its connection to the
    # system account pushes what it decides.
    "access": _user(
        "access",
        "slmops.user.>",
        consumes=CONSUMED["access"],
        uses=(
            *jetstream.reading_all("slmops.user.>"),
            *jetstream.reading_all("slmops.gateway.revoked.v1.*.*"),
            *jetstream.reading_all("slmops.gateway.enrolled.v1.*"),
        ),
    ),
}

PROVISIONER_PERMISSIONS: Final = Permissions(jetstream.provisioning(*_STREAMS, *_BUCKETS), (f"{inbox(PROVISIONER)}.>",))

SERVER_INBOX: Final = "_R_"
"""Prefix of the reply subjects that the server generates for requests from another account. Clients may not use it."""


def may_be_answered(subject: str, reply: str) -> bool:
    """Returns whether `reply` is an inbox of the sender of a command that arrived on `subject`.

    An empty `reply` is not: a JetStream acknowledgement that a publisher directed to a command's subject has no reply
    subject. People and gateways have other accounts, so the server has put a reply subject of its own in its place.
    """
    sender = sender_of(subject)
    own = inbox_of(sender) if sender and sender.kind is ActorKind.SERVICE else SERVER_INBOX
    return reply.startswith(f"{own}.")


def answering_user(service: str) -> str:
    """Returns the user with which a service answers commands."""
    return f"{service}-answers"


def _answers(service: str) -> Permissions:
    senders = [
        sender.name
        for row in SERVICE_PERMISSIONS.values()
        for subject in row.publish
        if subject.startswith(f"cmd.{service}.") and (sender := sender_of(subject))
    ]
    return Permissions((f"{SERVER_INBOX}.>", *(f"{inbox(name)}.>" for name in senders)), (f"cmd.{service}.>",))


ANSWERING_PERMISSIONS: Final[dict[str, Permissions]] = {service: _answers(service) for service in ANSWERING}
"""The permissions of each service's answering user."""

# ---- people ------------------------------------------------------------------------------------------------

COMMAND_ROLES: Final[dict[str, Role]] = {
    "cmd.access.add_user": Role.ADMIN,
    "cmd.access.list_users": Role.ADMIN,
    "cmd.access.renew_user": Role.VIEWER,  # only one's own; nobody renews another person's
    "cmd.access.revoke_user": Role.ADMIN,
    "cmd.optimizer.cancel_job": Role.OPERATOR,
    "cmd.optimizer.fetch_evaluation": Role.VIEWER,
    "cmd.optimizer.list_jobs": Role.VIEWER,
    "cmd.optimizer.list_recipes": Role.VIEWER,
    "cmd.optimizer.optimize": Role.OPERATOR,
    "cmd.optimizer.upload_data": Role.OPERATOR,
    "cmd.optimizer.verify_evaluation": Role.OPERATOR,
    "cmd.packager.describe_trust": Role.VIEWER,
    "cmd.packager.export": Role.OPERATOR,
    "cmd.packager.prepare_bundle": Role.OPERATOR,
    "cmd.packager.withdraw": Role.ADMIN,
    "cmd.registry.begin_restore": Role.ADMIN,
    "cmd.registry.begin_upload": Role.OPERATOR,
    "cmd.registry.collect_garbage": Role.ADMIN,
    "cmd.registry.describe_storage": Role.VIEWER,
    "cmd.registry.list_versions": Role.VIEWER,
    "cmd.registry.register_version": Role.OPERATOR,
    "cmd.registry.restore_blobs": Role.ADMIN,
    "cmd.registry.retire_version": Role.APPROVER,
    "cmd.registry.set_alias": Role.APPROVER,
    "cmd.registry.verify_storage": Role.ADMIN,
    "cmd.rollout.abort": Role.OPERATOR,
    "cmd.rollout.apply_blueprint": Role.OPERATOR,
    "cmd.rollout.list_blueprints": Role.VIEWER,
    "cmd.rollout.list_gateways": Role.VIEWER,
    "cmd.rollout.list_history": Role.VIEWER,
    "cmd.rollout.list_rollouts": Role.VIEWER,
    "cmd.rollout.move": Role.ADMIN,
    "cmd.rollout.pause": Role.OPERATOR,
    "cmd.rollout.reenrol": Role.ADMIN,
    "cmd.rollout.remove": Role.ADMIN,
    "cmd.rollout.resume": Role.APPROVER,
    "cmd.rollout.revoke": Role.ADMIN,
    "cmd.rollout.rollback": Role.OPERATOR,
    "cmd.rollout.start": Role.OPERATOR,
    "cmd.rollout.summarize_fleet": Role.VIEWER,
}
"""The least role that may send a command: read, act, decide about what was held or what is in production, administer.

The server enforces it, because each role has a template with exactly its commands. The service that owns the command
enforces it again.
"""
BUNDLER: Final = "console"
"""The id that the command line uses in place of a gateway's when it fetches trust metadata for a bundle."""


def authorize(command: type[Command[Any]], sender: Actor | None) -> None:
    """Raises `Denied` if `sender` may not send a command. The error names the required role."""
    subject = command.subject_template()
    if command.anonymous or command.per_gateway:
        return  # the server restricts both to their own accounts
    needed = COMMAND_ROLES.get(subject, Role.ADMIN)
    if sender is not None and sender.role is not None:
        if not sender.role.covers(needed):
            raise Denied(
                f"{sender.name} has the role {sender.role}, and this command requires the role {needed}",
                where=subject,
                fix=f"Ask a person with the role {needed} to send it, or an admin to give you that role.",
            )
    elif sender is None or f"{subject}.{sender.token}" not in _commands_of(sender.name):
        raise Denied(f"{sender or 'an unknown sender'} may not send this command", where=subject)


def _commands_of(service: str) -> tuple[str, ...]:
    row = SERVICE_PERMISSIONS.get(service)
    return row.publish if row else ()


def _may_send(role: Role) -> tuple[str, ...]:
    return tuple(f"{command}.{role}.{{{{name()}}}}" for command, needed in COMMAND_ROLES.items() if role.covers(needed))


_READS: Final = (*jetstream.reading_everything(*_STREAMS, *_BUCKETS), *jetstream.observing(*_STREAMS))
_BUNDLES: Final = (f"cmd.packager.fetch_metadata.{BUNDLER}",)
# An admin republishes dead letters on their original subjects, also those of gateways.
_REPAIRS: Final = (
    "cmd.packager.fetch.*",
    "cmd.packager.fetch_metadata.*",
    "cmd.rollout.renew.*",
    "slmops.>",
    "measure.*",
    "presence.*",
    "jobs.>",
    *jetstream.repairing(*_STREAMS),
    "$JS.API.STREAM.MSG.DELETE.DLQ",
)
_FURTHER: Final[dict[Role, tuple[str, ...]]] = {
    Role.VIEWER: _READS,
    Role.OPERATOR: (*_READS, *_BUNDLES),
    Role.APPROVER: (*_READS, *_BUNDLES),
    Role.ADMIN: (*_READS, *_REPAIRS),
}

ROLE_PERMISSIONS: Final[dict[Role, Permissions]] = {
    role: Permissions(
        (*_may_send(role), ROLL_CALL, *_FURTHER[role]),
        (f"{PERSON_INBOX}.{{{{name()}}}}.>", roll_call_answer("*")),
    )
    for role in Role
}
"""Templates: the server fills in the person's name from their signed JWT, so everybody sends commands as themselves.

The subjects of JetStream's API have the names of the services' account. In people's account they begin with
`PEOPLE_API` (`kit.bus.accounts`).
"""

# ---- gateways ----------------------------------------------------------------------------------------------

GATEWAY_PERMISSIONS: Final = Permissions(
    publish=(
        "slmops.gateway.reported.v1.{{name()}}",
        "measure.{{name()}}",
        "presence.{{name()}}",
        "cmd.packager.fetch.{{name()}}",
        "cmd.packager.fetch_metadata.{{name()}}",
        "cmd.rollout.renew.{{name()}}",
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
ENROL_PERMISSIONS: Final = Permissions(
    publish=("cmd.rollout.enrol", "cmd.rollout.renew_expired"), subscribe=(f"{inbox(ENROL_USER)}.>",)
)
"""The bootstrap user that all gateways share. It can only request an enrolment, or a credential for an enrolled key."""

SYSTEM_USER: Final = "access-system"
SYSTEM_PERMISSIONS: Final = Permissions(
    publish=tuple(f"$SYS.REQ.ACCOUNT.*.CLAIMS.{verb}" for verb in ("LOOKUP", "UPDATE")),
    subscribe=(f"{inbox(SYSTEM_USER)}.>",),
)
"""The user of the server's own account with which the access service changes the accounts of the others."""
