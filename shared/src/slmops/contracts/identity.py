"""Who somebody is: a person in a role, a service and its processes, or a gateway.

The subject of a command ends in its sender, and the server lets everybody publish only subjects that end in themselves.
So the service that owns the command reads there who asks, and nobody can forge it.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from typing import Annotated, Final

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field

from slmops.contracts.names import Name

LONGEST_CREDENTIAL_LIFE: Final = timedelta(days=400)
"""The most that a setting may give a credential. A revoked key is remembered for as long."""


class Role(StrEnum):
    """What a person may do. Each role may do all that the roles before it may."""

    VIEWER = "viewer"
    OPERATOR = "operator"
    APPROVER = "approver"
    ADMIN = "admin"

    def covers(self, other: Role) -> bool:
        """Returns whether this role may do all that `other` may."""
        order = list(Role)
        return order.index(self) >= order.index(other)


class ActorKind(StrEnum):
    PERSON = "person"
    SERVICE = "service"
    GATEWAY = "gateway"


@dataclass(frozen=True)
class Actor:
    """`str(actor)` is the form in events, such as `person:alice`. Only a person has a role."""

    kind: ActorKind
    name: str
    role: Role | None = None

    def __str__(self) -> str:
        return f"{self.kind}:{self.name}"

    @property
    def token(self) -> str:
        """The end of the subjects of its commands: `operator.alice`, `service.optimizer`, or a gateway's id."""
        if self.kind is ActorKind.GATEWAY:
            return self.name
        return f"{self.role or self.kind}.{self.name}"


def person(name: str, role: Role) -> Actor:
    return Actor(ActorKind.PERSON, name, role)


def service(name: str) -> Actor:
    return Actor(ActorKind.SERVICE, name)


def gateway(name: str) -> Actor:
    return Actor(ActorKind.GATEWAY, name)


def sender_of(subject: str) -> Actor | None:
    """Returns the sender that a command's subject ends in; None for a command without one, such as an enrolment."""
    match subject.split("."):
        case ["cmd", _, _, ActorKind.SERVICE, name]:
            return service(name)
        case ["cmd", _, _, role, name] if role in list(Role):
            return person(name, Role(role))
        case ["cmd", _, _, name]:
            return gateway(name)
        case _:
            return None


MOST_LABELS: Final = 64
_LONGEST_KEY: Final = 63
_LONGEST_VALUE: Final = 255


def label_problem(labels: dict[str, str]) -> str:
    """Returns what is wrong with labels that came from outside; empty if they can be stored, compared and shown."""
    if len(labels) > MOST_LABELS:
        return f"{len(labels)} labels, more than {MOST_LABELS}"
    for key, value in labels.items():
        if not 0 < len(key) <= _LONGEST_KEY or len(value) > _LONGEST_VALUE:
            return f"a label with {len(key)} + {len(value)} characters, more than {_LONGEST_KEY} + {_LONGEST_VALUE}"
        if not (key + value).isprintable():
            return "a label with a control character"
    return ""


def _checked(labels: dict[str, str]) -> dict[str, str]:
    if problem := label_problem(labels):
        raise ValueError(problem)
    return labels


Labels = Annotated[dict[str, str], AfterValidator(_checked)]
"""Labels where they come from outside. Stored ones are not checked again, so that they stay readable."""


class Identity(BaseModel):
    """A gateway's id, blueprint and labels. They determine the release that a plan gives it."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    gateway_id: Name
    blueprint: Name
    labels: dict[str, str] = Field(default_factory=dict)


class ServiceProcess(BaseModel):
    """A running process of a service, and its code."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    service: Name
    version: str = Field(description="Version of its distribution")
    revision: str = Field(description="Digest of its own code and the shared code, 12 hexadecimal digits")
    shared_revision: str = Field(description="Digest of the shared code, which must be equal in all services")
    host: str
    pid: int
    started_at: AwareDatetime
