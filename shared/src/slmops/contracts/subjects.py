"""Subjects, streams and buckets: the one place where a name on the bus is built."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

DESIRED_BUCKET = "desired"
JOB_BUCKET = "jobs"
DEAD_LETTER_PREFIX = "dlq."
MEASUREMENTS_TEMPLATE = "measure.{gateway_id}"
INBOX = "_INBOX"
OPERATOR = "console"
"""The user of the operator. Its inbox has the name that NATS clients choose by themselves."""


MiB, GiB = 1 << 20, 1 << 30


@dataclass(frozen=True)
class StreamSpec:
    """A JetStream stream as it should be.

    `max_age` None keeps messages forever, `work_queue` removes them on ack, `per_subject` keeps only so many of each
    subject, the newest. At `max_bytes` a stream that `refuses` stores nothing more, so its publishers keep what they
    have; any other removes its oldest messages. A larger age or size that an operator set on the server is kept.
    """

    name: str
    subjects: tuple[str, ...]
    max_age: timedelta | None = None
    max_bytes: int = GiB
    work_queue: bool = False
    refuses: bool = False
    per_subject: int | None = None

    @property
    def facts(self) -> bool:
        """Whether it is a history without holes: every message that was ever stored is still there."""
        return self.refuses and not self.work_queue and self.per_subject is None


STREAMS = (
    # Facts: what exists and what was decided. Kept forever; when full it refuses, and outboxes keep what they have.
    StreamSpec(
        "EVENTS",
        tuple(f"slmops.{aggregate}.>" for aggregate in ("model", "variant", "package", "blueprint", "rollout")),
        refuses=True,
    ),
    # The newest enrolment of every gateway, kept forever. When full it refuses new gateways, not a known one.
    StreamSpec("ENROLMENTS", ("slmops.gateway.enrolled.v1.*",), max_bytes=256 * MiB, refuses=True, per_subject=1),
    # Measured windows of cohorts: 30 days. When full the oldest go; the rollout service has recorded them by then.
    StreamSpec("WINDOWS", ("slmops.cohort.>",), max_age=timedelta(days=30), max_bytes=512 * MiB),
    # What gateways report: 30 days. When full the oldest go, and each gateway's next report says where it is.
    StreamSpec("GATEWAYS", ("slmops.gateway.reported.v1.*",), max_age=timedelta(days=30)),
    # What gateways measure: 7 days. When full the oldest go: a gate then has less data, and no data holds.
    StreamSpec("MEASUREMENTS", ("measure.*",), max_age=timedelta(days=7)),
    # Jobs that nobody has done. When full it refuses new ones, or the oldest would never be done.
    StreamSpec("JOBS", ("jobs.>",), max_bytes=128 * MiB, work_queue=True, refuses=True),
    # Messages that a consumer gave up on: 90 days. When full the oldest go. It must not refuse: a consumer keeps a
    # message whose dead letter is not stored, so one broken gateway could stop every consumer. Of each subject, which
    # names the gateway, the newest 10,000 stay, so that nobody pushes out all others with letters of up to 50 kB.
    StreamSpec("DLQ", (DEAD_LETTER_PREFIX + ">",), max_age=timedelta(days=90), max_bytes=512 * MiB, per_subject=10_000),
)
MOVED = (("EVENTS", "slmops.cohort.>"),)
"""Stream and subject of what an earlier release stored there and is now stored elsewhere: it is removed, because it
would fill a stream that refuses."""


def spec_of(stream: str) -> StreamSpec | None:
    return next((spec for spec in STREAMS if spec.name == stream), None)


def stream_of(subject: str) -> str | None:
    """The stream that stores `subject`; None for request/reply and for subjects that nobody stores."""
    for stream in STREAMS:
        for pattern in stream.subjects:
            if matches(pattern, subject):
                return stream.name
    return None


def matches(pattern: str, subject: str) -> bool:
    """By the rules of NATS: `*` is one token, a last `>` is one or more."""
    wanted, given = pattern.split("."), subject.split(".")
    if wanted[-1] == ">":
        return len(given) >= len(wanted) and given[: len(wanted) - 1] == wanted[:-1]
    return len(wanted) == len(given) and all(w in ("*", g) for w, g in zip(wanted, given, strict=True))


def measurements(gateway_id: str) -> str:
    return MEASUREMENTS_TEMPLATE.format(gateway_id=gateway_id)


def optimize_job(profile: str) -> str:
    return f"jobs.optimize.{profile}"


def job_key(job: str) -> str:
    """KV key of how far an optimization came."""
    return f"state.{job}"


def cancellation_key(job: str) -> str:
    """KV key of the wish to end an optimization. Beside its state, so that neither write meets the other."""
    return f"cancelled.{job}"


def blueprint_key(blueprint: str) -> str:
    """KV key of a blueprint's plan."""
    return f"blueprint.{blueprint}"


def overlay_key(gateway_id: str) -> str:
    """KV key of a gateway's overlay."""
    return f"gateway.{gateway_id}"


def desired(key: str) -> str:
    """Where the desired bucket keeps the document of a key."""
    return f"$KV.{DESIRED_BUCKET}.{key}"


def twin(key: str) -> str:
    """Where a write to the desired bucket is republished. Gateways listen here, never to `$KV…`, which also shows
    writes that a compare-and-set rejected."""
    return f"twin.{DESIRED_BUCKET}.{key}"


def inbox(user: str) -> str:
    """Where answers to a user arrive, without the last dot. Users may not listen to one another's."""
    return INBOX if user == OPERATOR else f"{INBOX}_{user}"


def dead_letter(subject: str) -> str:
    return DEAD_LETTER_PREFIX + subject


def template(subject: str) -> str:
    """The subject with a gateway's id replaced: what a span or a metric may be labelled with (bounded in number)."""
    if subject.startswith(DEAD_LETTER_PREFIX):
        return DEAD_LETTER_PREFIX + template(subject[len(DEAD_LETTER_PREFIX) :])
    parts = subject.split(".")
    if parts[0] == "measure":
        return MEASUREMENTS_TEMPLATE
    if parts[0] == "slmops" and len(parts) > 4:
        return ".".join([*parts[:4], "{gateway_id}"])
    if parts[0] == "cmd" and len(parts) > 3:
        return ".".join([*parts[:3], "{gateway_id}"])
    if parts[0].startswith("_INBOX"):
        return "_INBOX"
    return subject
