"""Who may speak on which subject: the only table of NATS permissions.

The server enforces it, so a defect or a stolen credential in one service cannot act as another. Replies need no entry:
a user with `answers` may publish once on the reply subject of each request that it received.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Final, NamedTuple

ANSWER_WITHIN: Final = timedelta(minutes=30)
"""How long after a request its reply subject stays open. Registering hashes gigabytes, verifying runs a model."""


class Permissions(NamedTuple):
    """Subjects that a user may publish and subscribe to. Everything else is denied by the server."""

    publish: tuple[str, ...]
    subscribe: tuple[str, ...]
    answers: bool = False


# Streams, consumers, buckets and acknowledgements; `$JS.FC` answers the flow control of ordered consumers (KV watch).
_JETSTREAM = ("$JS.API.>", "$JS.ACK.>", "$JS.FC.>")
# Events arrive on the inbox (pull consumers). The advisories say which message ran out of deliveries.
_ARRIVALS = ("_INBOX.>", "$JS.EVENT.ADVISORY.>")


def _service(name: str, *owns: str) -> Permissions:
    """A service publishes what it owns and its dead letters, and answers its own commands."""
    return Permissions((*owns, "dlq.>", *_JETSTREAM), (f"cmd.{name}.>", *_ARRIVALS), answers=True)


SERVICE_PERMISSIONS: Final[dict[str, Permissions]] = {
    "registry": _service("registry", "slmops.model.>"),
    # It asks the registry what a version is made of: nobody can have other files optimized under its name.
    "optimizer": _service("optimizer", "slmops.variant.>", "jobs.>", "$KV.jobs.>", "cmd.registry.list_versions"),
    "packager": _service("packager", "slmops.package.>"),
    "rollout": _service(
        "rollout", "slmops.rollout.>", "slmops.blueprint.>", "slmops.gateway.enrolled.v1.*", "$KV.desired.>"
    ),
    "telemetry": _service("telemetry", "slmops.cohort.>"),
    # The operator: every command, and a dead letter of anybody back to where it came from.
    "console": Permissions(("cmd.>", "slmops.>", "measure.>", "jobs.>", "dlq.>", *_JETSTREAM), _ARRIVALS),
}

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
        "_INBOX_{{name()}}.>",
        "twin.desired.blueprint.{{tag(blueprint)}}",
        "twin.desired.gateway.{{name()}}",
    ),
)
"""A template: the server fills in id and blueprint from the gateway's signed JWT, so it speaks only as itself."""

ENROL_PERMISSIONS: Final = Permissions(publish=("cmd.rollout.enrol",), subscribe=("_INBOX_enrol.>",))
"""The bootstrap user that every new gateway shares: it can ask to be enrolled, and nothing else."""
