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


@dataclass(frozen=True)
class StreamSpec:
    """A JetStream stream as it should be. `max_age` None keeps messages forever; `work_queue` removes on ack."""

    name: str
    subjects: tuple[str, ...]
    max_age: timedelta | None = None
    max_bytes: int = 1 << 30
    work_queue: bool = False


STREAMS = (
    StreamSpec(
        "EVENTS",
        tuple(
            f"slmops.{aggregate}.>" for aggregate in ("model", "variant", "package", "blueprint", "rollout", "cohort")
        ),
    ),
    StreamSpec("GATEWAYS", ("slmops.gateway.>",), max_age=timedelta(days=30)),
    StreamSpec("MEASUREMENTS", ("measure.*",), max_age=timedelta(days=7)),
    StreamSpec("JOBS", ("jobs.>",), work_queue=True),
    StreamSpec("DLQ", (DEAD_LETTER_PREFIX + ">",), max_age=timedelta(days=90)),
)


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
