"""Commands and queries that the rollout service answers."""

from __future__ import annotations

from enum import StrEnum
from typing import ClassVar, Final

from pydantic import AwareDatetime, Field

from slmops.contracts.blueprint import Blueprint, Stage
from slmops.contracts.commands.base import Command, Result
from slmops.contracts.commands.fleet import Attention
from slmops.contracts.descriptor import Digest
from slmops.contracts.errors import Problem
from slmops.contracts.events import UpdatePhase
from slmops.contracts.identity import Labels
from slmops.contracts.measurement import CohortWindow
from slmops.contracts.names import Name, Version
from slmops.contracts.plan import Release


class Enrolment(Result):
    """A gateway's credential. `jwt` makes the gateway's own nkey a user of the bus; it contains no secret."""

    gateway_id: Name
    blueprint: Name
    jwt: str


class EnrolGateway(Command[Enrolment]):
    """Enrol a gateway. `token` is the site's enrolment secret, `public_key` the gateway's own user nkey (`U…`)."""

    service: ClassVar[str] = "rollout"
    name: ClassVar[str] = "enrol"
    anonymous: ClassVar[bool] = True
    confidential: ClassVar[bool] = True
    gateway_id: Name
    blueprint: Name
    labels: Labels = Field(default_factory=dict)
    public_key: str = Field(pattern=r"^U[A-Z2-7]{55}$")
    token: str = Field(repr=False, min_length=1)


class BlueprintView(Result):
    revision: int
    spec: Blueprint
    stable: Release | None = None
    at: AwareDatetime


class ApplyBlueprint(Command[BlueprintView]):
    """Make this blueprint the newest revision. Applying the newest revision again changes nothing."""

    service: ClassVar[str] = "rollout"
    name: ClassVar[str] = "apply_blueprint"
    spec: Blueprint


class StageView(Result):
    name: str
    targets: int = 0
    committed: int = 0
    failed: int = 0
    waiting: str = Field(default="", description="What the gate is still waiting for")


MOST_ATTENTION: Final = 20
"""How many gateways the view of a rollout names."""


class GatewayProblem(Result):
    """A gateway to which the open stages give the candidate, and that failed it or has not committed it yet."""

    gateway_id: Name
    stage: str = Field(description="Name of the first stage that gives it the candidate")
    failed: bool = Field(description="false: it has not committed yet")
    problem: str = Field(default="", description="Why it failed, as it reported")
    last_seen: AwareDatetime | None = Field(default=None, description="None: it never reported")


class RolloutView(Result):
    rollout: str
    blueprint: Name
    state: str
    version: Version
    model: Name
    stage: int
    stages: tuple[StageView, ...]
    reason: str = ""
    started_at: AwareDatetime
    ended_at: AwareDatetime | None = None
    candidate_window: CohortWindow | None = None
    stable_window: CohortWindow | None = None
    attention: tuple[GatewayProblem, ...] = Field(
        default=(),
        max_length=MOST_ATTENTION,
        description="Gateways that failed, then those that wait, of the earliest stages first",
    )


class StartRollout(Command[RolloutView]):
    """Start a rollout of a published package to a blueprint's gateways. The default version is the newest published."""

    service: ClassVar[str] = "rollout"
    name: ClassVar[str] = "start"
    blueprint: Name
    version: Version | None = None
    stages: tuple[Stage, ...] = ()


ASKED_BY_OPERATOR: Final = "asked by the operator"
"""The reason of a change to a rollout for which nobody gave one."""


class _OnRollout(Command[RolloutView]):
    service: ClassVar[str] = "rollout"
    blueprint: Name
    reason: str = ASKED_BY_OPERATOR


class PauseRollout(_OnRollout):
    name: ClassVar[str] = "pause"


class ResumeRollout(_OnRollout):
    name: ClassVar[str] = "resume"


class AbortRollout(_OnRollout):
    name: ClassVar[str] = "abort"


class RollbackRollout(_OnRollout):
    """Roll back the rollout under way, or the last completed one: the gateways return to the release before it."""

    name: ClassVar[str] = "rollback"


class RolloutList(Result):
    rollouts: tuple[RolloutView, ...]
    cursor: str | None = Field(default=None, description="Ask with it for older ones; None: these are the oldest")


class ListRollouts(Command[RolloutList]):
    """List the newest rollouts, or those of one blueprint, the newest last. The cursor asks for the page before."""

    service: ClassVar[str] = "rollout"
    name: ClassVar[str] = "list_rollouts"
    blueprint: Name | None = None
    under_way: bool | None = Field(default=None, description="Only rollouts that have not ended, or only ended ones")
    limit: int = Field(default=50, ge=1, le=500)
    cursor: str | None = None


class HistoryEntry(Result):
    """An event of a blueprint. `actor` is who caused it, such as person:alice; empty: the rollout service itself."""

    at: AwareDatetime
    event: str = Field(description="Its type, such as slmops.rollout.started.v1")
    actor: str = ""
    rollout: str = ""
    reason: str = ""


class History(Result):
    entries: tuple[HistoryEntry, ...]
    cursor: int | None = Field(default=None, description="Ask with it for older entries; None: these are the oldest")


class ListHistory(Command[History]):
    """List what happened to a blueprint and its rollouts, and who caused it, the newest first, a page at a time."""

    service: ClassVar[str] = "rollout"
    name: ClassVar[str] = "list_history"
    blueprint: Name
    limit: int = Field(default=50, ge=1, le=500)
    cursor: int | None = None


class BlueprintList(Result):
    blueprints: tuple[BlueprintView, ...]
    cursor: str | None = Field(default=None, description="Ask with it for the next page; None: this is the last one")


class ListBlueprints(Command[BlueprintList]):
    """List blueprints by name, a page at a time."""

    service: ClassVar[str] = "rollout"
    name: ClassVar[str] = "list_blueprints"
    limit: int = Field(default=100, ge=1, le=500)
    cursor: str | None = None


class Standing(StrEnum):
    """Whether a gateway counts. Only an enrolled one is in gates, fleet figures and telemetry."""

    ENROLLED = "enrolled"
    MOVING = "moving"
    REVOKED = "revoked"


class GatewayView(Result):
    gateway_id: Name
    blueprint: Name
    standing: Standing = Standing.ENROLLED
    enrolment: int = Field(default=1, description="Counts the enrolments under this id")
    moving_to: Name | None = Field(default=None, description="Blueprint for which it has not fetched a credential yet")
    revoked_at: AwareDatetime | None = None
    revoked_because: str = ""
    reenrol_until: AwareDatetime | None = Field(default=None, description="Until when another key may enrol")
    credential_expires_at: AwareDatetime | None = Field(
        default=None, description="When its newest credential expires; None: never, or it is not known"
    )
    labels: dict[str, str]
    phase: UpdatePhase
    running: Digest | None = None
    running_version: Version | None = None
    target: Digest | None = None
    desired: Digest | None = None
    desired_because: dict[str, str] = Field(default_factory=dict)
    problem: Problem | None = None
    measured: dict[str, float] = Field(default_factory=dict)
    plan_generation: int = 0
    dropped_reports: int = 0
    dropped_measurements: int = 0
    last_seen: AwareDatetime = Field(
        description="When its newest report or presence message arrived, by the service's time"
    )
    clock_ahead_s: float | None = Field(
        default=None,
        description="Seconds by which its clock is ahead of the service's, negative if behind; None: unknown",
    )
    attention: tuple[str, ...] = Field(default=(), description="`Attention`: why a person should look at it")


class GatewayList(Result):
    """A page of gateways by id. `total` is the number of all gateways that match, on the first page only."""

    gateways: tuple[GatewayView, ...]
    cursor: str | None = Field(default=None, description="Ask with it for the next page; None: this is the last one")
    total: int | None = None


class ListGateways(Command[GatewayList]):
    """List the gateways that match every filter, with the release that each should run and why, a page at a time.

    A page has at most `limit` gateways, and fewer if they are large. A gateway that enrols or leaves in between is on
    at most one page, every other one on exactly one.
    """

    service: ClassVar[str] = "rollout"
    name: ClassVar[str] = "list_gateways"
    gateway_id: Name | None = None
    blueprint: Name | None = None
    standing: Standing | None = Field(default=None, description="Only gateways of this standing; None: all")
    labels: dict[str, str] = Field(
        default_factory=dict, max_length=8, description="Only gateways with all these labels"
    )
    phase: UpdatePhase | None = None
    version: Version | None = Field(default=None, description="Only gateways that run this version")
    online: bool | None = Field(
        default=None, description="Whether something arrived from it recently; not revoked ones"
    )
    silent_for_s: float | None = Field(
        default=None, ge=0, le=1e10, description="Only gateways from which nothing arrived for this long"
    )
    attention: tuple[Attention, ...] = Field(
        default=(), max_length=8, description="Only gateways with one of these reasons; empty: all"
    )
    limit: int = Field(default=100, ge=1, le=1000)
    cursor: str | None = None
