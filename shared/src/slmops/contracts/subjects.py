"""Subjects, streams and buckets. All names on the bus are built in this module."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from slmops.contracts.identity import Actor, ActorKind

DESIRED_BUCKET = "desired"
JOB_BUCKET = "jobs"
DEAD_LETTER_PREFIX = "dlq."
CONFIDENTIAL_PREFIX = "confidential."
"""Follows `DEAD_LETTER_PREFIX` for messages whose payload is secret and not kept."""
MEASUREMENTS_TEMPLATE = "measure.{gateway_id}"
PRESENCE_TEMPLATE = "presence.{gateway_id}"
INBOX = "_INBOX"
PERSON_INBOX = "_INBOX_person"
"""Prefix of people's inboxes. A service cannot have this name, because names contain no underscore."""

MiB, GiB = 1 << 20, 1 << 30


@dataclass(frozen=True)
class StreamSpec:
    """The desired configuration of a JetStream stream.

    `max_age` None keeps messages forever, `work_queue` removes them on ack, `per_subject` limits each subject to its
    newest messages. At `max_bytes` a stream that `refuses` rejects new messages, so their publishers keep them; any
    other stream removes its oldest messages. A larger age or size that an operator set on the server is kept.
    """

    name: str
    subjects: tuple[str, ...]
    max_age: timedelta | None = None
    max_bytes: int = GiB
    work_queue: bool = False
    refuses: bool = False
    per_subject: int | None = None
    max_message_bytes: int | None = None
    """The server refuses larger messages. None: as large as the bus takes."""
    asynchronous: bool = False
    """The server acknowledges before it writes to the disk: a crash loses the newest messages. Never for facts. It is
    chosen when the stream is created, on a single server (ADR 27)."""

    @property
    def facts(self) -> bool:
        """Whether the stream is a complete history: every message that was ever stored is still there."""
        return self.refuses and not self.work_queue and self.per_subject is None


STREAMS = (
    # Facts: what exists and what was decided. Kept forever. When full it refuses new ones, and outboxes keep them.
    StreamSpec(
        "EVENTS",
        tuple(f"slmops.{aggregate}.>" for aggregate in ("model", "variant", "package", "blueprint", "rollout", "user")),
        refuses=True,
    ),
    # The newest enrolment of every gateway, kept forever. When full it refuses new gateways, not a known one.
    StreamSpec("ENROLMENTS", ("slmops.gateway.enrolled.v1.*",), max_bytes=256 * MiB, refuses=True, per_subject=1),
    # Every revoked key of every gateway, kept forever. When full it refuses new ones, and the outbox keeps them.
    StreamSpec("REVOCATIONS", ("slmops.gateway.revoked.v1.*.*",), max_bytes=64 * MiB, refuses=True, per_subject=1),
    # What operators did to gateways: a year. Nothing is decided from it; the rollout service has the history.
    StreamSpec(
        "FLEET",
        tuple(f"slmops.gateway.{fact}.v1.*" for fact in ("moved", "reenrolment_allowed", "removed")),
        max_age=timedelta(days=365),
        max_bytes=64 * MiB,
    ),
    # Measured windows of cohorts: 30 days. When full the oldest are removed; the rollout service has recorded them.
    StreamSpec("WINDOWS", ("slmops.cohort.>",), max_age=timedelta(days=30), max_bytes=512 * MiB),
    # Gateways' reports: 30 days, and the newest 8 of each gateway, so that a noisy one displaces no other. A report is
    # stored with up to 1.3 kB, so 100,000 gateways need 1 GiB at most. An update has at most 8 phases.
    StreamSpec(
        "GATEWAYS", ("slmops.gateway.reported.v1.*",), max_age=timedelta(days=30), per_subject=8, asynchronous=True
    ),
    # The newest presence message of each gateway, for an hour: 100,000 gateways need 20 MB. See `freshness`.
    StreamSpec(
        "PRESENCE", ("presence.*",), max_age=timedelta(hours=1), max_bytes=64 * MiB, per_subject=1, asynchronous=True
    ),
    # Gateways' measurements: 7 days. When full the oldest are removed: a gate has less data, and holds without data.
    # A measurement has under 1 kB, and telemetry holds hundreds at once: a gateway must not make them a megabyte each.
    StreamSpec(
        "MEASUREMENTS", ("measure.*",), max_age=timedelta(days=7), max_message_bytes=64 << 10, asynchronous=True
    ),
    # Jobs that are not done yet. When full it refuses new ones; otherwise the oldest would never be done.
    StreamSpec("JOBS", ("jobs.>",), max_bytes=128 * MiB, work_queue=True, refuses=True),
    # Messages that a consumer gave up on: 90 days. When full the oldest are removed. It must not refuse: a consumer
    # keeps a message whose dead letter is not stored, so one broken gateway could stop every consumer. Each subject,
    # which names the gateway, keeps its newest 10,000, so one gateway's letters of up to 50 kB cannot displace others.
    StreamSpec("DLQ", (DEAD_LETTER_PREFIX + ">",), max_age=timedelta(days=90), max_bytes=512 * MiB, per_subject=10_000),
)
MOVED = (("EVENTS", "slmops.cohort.>"),)
"""Streams and subjects that an earlier release stored there and that now have another stream. Their messages are
removed from the old stream, because they would fill a stream that refuses."""

REMOVED = (("DLQ", f"{DEAD_LETTER_PREFIX}cmd.rollout.enrol"),)
"""Streams and subjects on which an earlier release kept a secret: the enrolment token in the dead letters of malformed
requests. Their messages are removed; this release publishes on none of these subjects."""

CONSUMED: dict[str, tuple[str, ...]] = {
    "access": ("slmops.gateway.revoked.v1.*.*", "slmops.gateway.enrolled.v1.*"),
    "registry": (
        *(f"slmops.variant.{fact}.v1" for fact in ("started", "progressed", "optimized", "rejected")),
        *(f"slmops.package.{fact}.v1" for fact in ("published", "delta_published", "withdrawn", "delta_withdrawn")),
    ),
    "optimizer": ("slmops.model.version_registered.v1", "jobs.optimize.*"),
    "packager": (
        "slmops.variant.optimized.v1",
        "slmops.package.published.v1",
        "slmops.gateway.enrolled.v1.*",
        "slmops.gateway.revoked.v1.*.*",
        "slmops.gateway.removed.v1.*",
        "slmops.gateway.reported.v1.*",
    ),
    "rollout": (
        "slmops.package.published.v1",
        "slmops.package.withdrawn.v1",
        "slmops.gateway.reported.v1.*",
        "presence.*",
        "slmops.cohort.measured.v1",
    ),
    "telemetry": (
        "slmops.gateway.enrolled.v1.*",
        "slmops.gateway.revoked.v1.*.*",
        "slmops.gateway.removed.v1.*",
        *(f"slmops.rollout.{fact}.v1" for fact in ("started", "stage_advanced", "completed", "rolled_back")),
        "measure.*",
    ),
}
"""The subjects that each service consumes, with one durable consumer each."""


def durable_name(service: str, subject: str) -> str:
    """Returns the name of the durable consumer with which a service consumes a subject."""
    return f"{service}-{subject}".replace(".", "_").replace("*", "each")


def spec_of(stream: str) -> StreamSpec | None:
    return next((spec for spec in STREAMS if spec.name == stream), None)


def stream_of(subject: str) -> str | None:
    """Returns the stream that stores `subject`; None for request/reply and for subjects that no stream stores."""
    for stream in STREAMS:
        for pattern in stream.subjects:
            if matches(pattern, subject):
                return stream.name
    return None


def matches(pattern: str, subject: str) -> bool:
    """Returns whether a NATS pattern matches: `*` is one token, a final `>` is one or more."""
    wanted, given = pattern.split("."), subject.split(".")
    if wanted[-1] == ">":
        return len(given) >= len(wanted) and given[: len(wanted) - 1] == wanted[:-1]
    return len(wanted) == len(given) and all(w in ("*", g) for w, g in zip(wanted, given, strict=True))


def measurements(gateway_id: str) -> str:
    return MEASUREMENTS_TEMPLATE.format(gateway_id=gateway_id)


def presence(gateway_id: str) -> str:
    return PRESENCE_TEMPLATE.format(gateway_id=gateway_id)


def present_gateway(subject: str) -> str:
    """Returns the gateway whose presence is published on a subject. The server lets only this gateway publish there."""
    return subject.removeprefix(presence(""))


def optimize_job(profile: str) -> str:
    return f"jobs.optimize.{profile}"


def job_key(job: str) -> str:
    """Returns the KV key of a job's progress."""
    return f"state.{job}"


def cancellation_key(job: str) -> str:
    """Returns the KV key of a job's cancellation request. It is not the state's key, so the writes cannot conflict."""
    return f"cancelled.{job}"


def blueprint_key(blueprint: str) -> str:
    """Returns the KV key of a blueprint's plan."""
    return f"blueprint.{blueprint}"


def overlay_key(gateway_id: str) -> str:
    """Returns the KV key of a gateway's overlay."""
    return f"gateway.{gateway_id}"


def desired(key: str) -> str:
    """Returns the subject where the desired bucket stores the document of a key."""
    return f"$KV.{DESIRED_BUCKET}.{key}"


def twin(key: str) -> str:
    """Returns the subject where a write to the desired bucket is republished. Gateways subscribe to it and not to
    `$KV…`, which also carries writes that a compare-and-set rejected."""
    return f"twin.{DESIRED_BUCKET}.{key}"


ROLL_CALL = "services.call"
"""Asks every process of every service to describe itself. Nothing stores it."""


def roll_call_answer(service: str) -> str:
    """Returns the subject on which the processes of a service describe themselves."""
    return f"services.answer.{service}"


def inbox(user: str) -> str:
    """Returns the subject prefix, without the final dot, of answers to a user. Users cannot read others' inboxes."""
    return f"{INBOX}_{user}"


def inbox_of(actor: Actor) -> str:
    return f"{PERSON_INBOX}.{actor.name}" if actor.kind is ActorKind.PERSON else inbox(actor.name)


def dead_letter(subject: str, *, confidential: bool = False) -> str:
    return DEAD_LETTER_PREFIX + (CONFIDENTIAL_PREFIX if confidential else "") + subject


def dead_letter_of(stored: str) -> str:
    """Returns the original subject of a dead letter by the subject where it is stored."""
    return stored.removeprefix(DEAD_LETTER_PREFIX).removeprefix(CONFIDENTIAL_PREFIX)


def template(subject: str) -> str:
    """Returns the subject without its sender, or with a gateway's id and key replaced, so that labels are bounded."""
    if subject.startswith(DEAD_LETTER_PREFIX):
        return DEAD_LETTER_PREFIX + template(subject[len(DEAD_LETTER_PREFIX) :])
    parts = subject.split(".")
    if parts[0] == "measure":
        return MEASUREMENTS_TEMPLATE
    if parts[0] == "presence":
        return PRESENCE_TEMPLATE
    if parts[0] == "slmops" and len(parts) > 4:
        return ".".join([*parts[:4], "{gateway_id}", *(["{public_key}"] if len(parts) > 5 else [])])
    if parts[0] == "cmd" and len(parts) > 4:
        return ".".join(parts[:3])
    if parts[0] == "cmd" and len(parts) > 3:
        return ".".join([*parts[:3], "{gateway_id}"])
    if parts[0].startswith("_INBOX"):
        return "_INBOX"
    return subject
