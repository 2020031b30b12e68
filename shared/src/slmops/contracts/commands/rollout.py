"""Commands and queries that the rollout service answers."""

from __future__ import annotations

from enum import StrEnum
from typing import ClassVar, Final

from pydantic import AwareDatetime, Field

from slmops.contracts.blueprint import Blueprint, Stage
from slmops.contracts.commands.base import Command, Result
from slmops.contracts.descriptor import Digest
from slmops.contracts.errors import Problem
from slmops.contracts.events import UpdatePhase
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
    labels: dict[str, str] = Field(default_factory=dict)
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


class ListRollouts(Command[RolloutList]):
    """List all rollouts, or those of one blueprint, the newest last."""

    service: ClassVar[str] = "rollout"
    name: ClassVar[str] = "list_rollouts"
    blueprint: Name | None = None


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


class ListBlueprints(Command[BlueprintList]):
    service: ClassVar[str] = "rollout"
    name: ClassVar[str] = "list_blueprints"


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
    last_seen: AwareDatetime = Field(description="When its newest report arrived, by the service's time")
    clock_ahead_s: float | None = Field(
        default=None,
        description="Seconds by which its clock is ahead of the service's, negative if behind; None: unknown",
    )


class GatewayList(Result):
    gateways: tuple[GatewayView, ...]


class ListGateways(Command[GatewayList]):
    """List the fleet or one gateway, with the release that each gateway should run and the reason."""

    service: ClassVar[str] = "rollout"
    name: ClassVar[str] = "list_gateways"
    gateway_id: Name | None = None
    blueprint: Name | None = None
    standing: Standing | None = Field(default=None, description="Only gateways of this standing; None: all")
