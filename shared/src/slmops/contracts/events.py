"""All events of the system. They are named in the past tense and frozen. A version may only gain fields; readers
ignore unknown fields.

One name end to end: class `VariantOptimized` ↔ type `slmops.variant.optimized.v1` ↔ its subject ↔ one golden file
`tests/contract/golden/slmops.variant.optimized.v1.json`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field

from slmops.contracts.blueprint import Blueprint
from slmops.contracts.descriptor import Descriptor, Digest
from slmops.contracts.errors import InvalidMessage, Problem
from slmops.contracts.evaluation import Evaluation
from slmops.contracts.identity import MOST_LABELS, Role, label_problem
from slmops.contracts.measurement import CohortWindow
from slmops.contracts.model import ModelFile
from slmops.contracts.names import PUBLIC_USER_KEY, Name, Version
from slmops.contracts.plan import Release, Stage
from slmops.contracts.prompts.evaluation_data import EvaluationData

EVENTS: dict[str, type[Event]] = {}
"""Type → class of every event."""


class Event(BaseModel, ABC):
    """A fact. `type` names it, `key` is the aggregate that changed, `subject` is where it is published."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    type: ClassVar[str] = ""
    per_gateway: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.type:
            EVENTS[cls.type] = cls

    @property
    @abstractmethod
    def key(self) -> str:
        """The aggregate that changed."""

    @classmethod
    def subject_template(cls) -> str:
        """Returns the subject with placeholders, the label of traces and metrics."""
        return f"{cls.type}.{{gateway_id}}" if cls.per_gateway else cls.type

    def check_received(self) -> None:
        """Checks what a service must not take over from the bus, in addition to the types. Stored events are not
        checked again, so that they stay readable. Raises `InvalidMessage`."""

    @property
    def subject(self) -> str:
        """The concrete subject. A gateway's events end in its id, so permissions can restrict it to its subjects."""
        return f"{self.type}.{self.key}" if self.per_gateway else self.type


# ---- model ------------------------------------------------------------------------------------------------


class ModelEvent(Event):
    model: Name

    @property
    def key(self) -> str:
        return self.model


class ModelVersionRegistered(ModelEvent):
    """An immutable version of a model exists: its files are in the store, verified."""

    type: ClassVar[str] = "slmops.model.version_registered.v1"
    version: Version
    digest: Digest = Field(description="Digest of the canonical list of files: the identity of the version")
    format: str = Field(description="gguf or hf")
    architecture: str
    files: tuple[ModelFile, ...]
    golden: Descriptor | None = Field(default=None, description="Golden prompts (JSONL) with which a gateway probes")
    data: EvaluationData | None = Field(default=None, description="Own texts and tasks for its optimizations")
    at: AwareDatetime


class ModelAliasMoved(ModelEvent):
    type: ClassVar[str] = "slmops.model.alias_moved.v1"
    alias: Name
    version: Version
    previous: Version | None = None
    at: AwareDatetime


class ModelVersionRetired(ModelEvent):
    type: ClassVar[str] = "slmops.model.version_retired.v1"
    version: Version
    reason: str
    at: AwareDatetime


# ---- variant ----------------------------------------------------------------------------------------------


class VariantEvent(Event):
    """`job` is the optimization that the variant belongs to: one per version and profile."""

    job: str
    model: Name
    version: Version
    profile: Name

    @property
    def key(self) -> str:
        return f"{self.model}:{self.version}"


class VariantStarted(VariantEvent):
    type: ClassVar[str] = "slmops.variant.started.v1"
    recipes: tuple[Name, ...]
    data: EvaluationData | None = Field(default=None, description="Own texts and tasks of this optimization")
    at: AwareDatetime


class VariantProgressed(VariantEvent):
    type: ClassVar[str] = "slmops.variant.progressed.v1"
    step: str
    done: int = Field(ge=0)
    of: int = Field(ge=1)
    at: AwareDatetime


class VariantOptimized(VariantEvent):
    """A variant passed its gate. Exactly one variant of a job is `chosen`; only that one is packaged."""

    type: ClassVar[str] = "slmops.variant.optimized.v1"
    recipe: Name
    digest: Digest
    files: tuple[ModelFile, ...]
    evaluation: Evaluation
    report: Descriptor
    job_report: Descriptor | None = Field(
        default=None, description="Report of the whole job, with all variants and pictures"
    )
    golden: Descriptor | None = None
    chosen: bool
    reason: str
    at: AwareDatetime


class VariantRejected(VariantEvent):
    """A variant failed its gate, or could not be made (then `evaluation` is absent and `problem` has the reason)."""

    type: ClassVar[str] = "slmops.variant.rejected.v1"
    recipe: Name
    digest: Digest | None = None
    evaluation: Evaluation | None = None
    report: Descriptor | None = None
    job_report: Descriptor | None = None
    problem: Problem | None = None
    reason: str
    at: AwareDatetime


# ---- package ----------------------------------------------------------------------------------------------


class PackageEvent(Event):
    model: Name
    version: Version

    @property
    def key(self) -> str:
        return f"{self.model}:{self.version}"


class PackagePublished(PackageEvent):
    """A signed OCI manifest is in the store and may be released."""

    type: ClassVar[str] = "slmops.package.published.v1"
    profile: Name
    recipe: Name
    variant: Digest
    manifest: Descriptor
    signature: Descriptor
    size_bytes: int = Field(ge=0, description="Sum of the layers: the download of a gateway that has none of them")
    at: AwareDatetime


class PackageDeltaPublished(PackageEvent):
    """A delta is available: with it a gateway that has the package `base` makes `target`. Both are manifests."""

    type: ClassVar[str] = "slmops.package.delta_published.v1"
    version: Version = Field(description="The target's version")
    base: Digest
    target: Digest
    delta: Descriptor
    full_bytes: int = Field(
        ge=0, description="Size of the target's layers that the base lacks: the download that it replaces"
    )
    at: AwareDatetime


class PackageWithdrawn(PackageEvent):
    """A package is no longer trusted and may be removed; no plan needed it. It is never published again."""

    type: ClassVar[str] = "slmops.package.withdrawn.v1"
    profile: Name
    manifest: Digest
    signature: Digest
    reason: str = ""
    at: AwareDatetime


class PackageDeltaWithdrawn(PackageEvent):
    """A delta is no longer offered and may be removed: its base or target was withdrawn, or there were too many."""

    type: ClassVar[str] = "slmops.package.delta_withdrawn.v1"
    version: Version = Field(description="The target's version")
    base: Digest
    target: Digest
    delta: Digest
    at: AwareDatetime


# ---- blueprint and rollout --------------------------------------------------------------------------------


class BlueprintEvent(Event):
    blueprint: Name

    @property
    def key(self) -> str:
        return self.blueprint


class BlueprintApplied(BlueprintEvent):
    type: ClassVar[str] = "slmops.blueprint.applied.v1"
    revision: int = Field(ge=1)
    spec: Blueprint
    at: AwareDatetime


class RolloutEvent(BlueprintEvent):
    rollout: str


class RolloutStarted(RolloutEvent):
    type: ClassVar[str] = "slmops.rollout.started.v1"
    candidate: Release
    stable: Release | None = None
    stages: tuple[Stage, ...] = Field(min_length=1)
    at: AwareDatetime


class RolloutStageAdvanced(RolloutEvent):
    """The gate of the previous stage passed; `stage` (from 0) now has the candidate."""

    type: ClassVar[str] = "slmops.rollout.stage_advanced.v1"
    stage: int = Field(ge=0)
    reason: str
    at: AwareDatetime


class RolloutHeld(RolloutEvent):
    """The gate reached no decision before its deadline. An operator should check. More data can still pass it."""

    type: ClassVar[str] = "slmops.rollout.held.v1"
    stage: int = Field(ge=0)
    reason: str
    at: AwareDatetime


class RolloutPaused(RolloutEvent):
    type: ClassVar[str] = "slmops.rollout.paused.v1"
    at: AwareDatetime


class RolloutResumed(RolloutEvent):
    type: ClassVar[str] = "slmops.rollout.resumed.v1"
    at: AwareDatetime


class RolloutCompleted(RolloutEvent):
    type: ClassVar[str] = "slmops.rollout.completed.v1"
    reason: str
    at: AwareDatetime


class RolloutAborted(RolloutEvent):
    """An operator ended the rollout; the gateways return to stable."""

    type: ClassVar[str] = "slmops.rollout.aborted.v1"
    reason: str
    at: AwareDatetime


class RolloutRolledBack(RolloutEvent):
    """A gate failed, or an operator rolled back a completed rollout; the gateways return to `restored`."""

    type: ClassVar[str] = "slmops.rollout.rolled_back.v1"
    reason: str
    restored: Release | None = None
    at: AwareDatetime


# ---- gateway ----------------------------------------------------------------------------------------------


class UpdatePhase(StrEnum):
    """A gateway's progress with its desired release."""

    IDLE = "idle"
    DOWNLOADING = "downloading"
    INSTALLED = "installed"
    LOADED = "loaded"
    PROBED = "probed"
    SOAKING = "soaking"
    COMMITTED = "committed"
    FAILED = "failed"


class GatewayEvent(Event):
    gateway_id: Name
    per_gateway: ClassVar[bool] = True

    @property
    def key(self) -> str:
        return self.gateway_id


class GatewayEnrolled(GatewayEvent):
    """A gateway has a credential for this key and blueprint. The newest enrolment of a gateway is the one that counts.

    A new key (a device that was set up again) and a new blueprint (a gateway that was moved) are new enrolments.
    """

    type: ClassVar[str] = "slmops.gateway.enrolled.v1"
    blueprint: Name
    public_key: str
    labels: dict[str, str] = Field(default_factory=dict)
    enrolment: int = Field(default=1, ge=1, description="Counts the enrolments under this id")
    moved_from: Name | None = Field(default=None, description="The blueprint that the gateway left with this enrolment")
    expires_at: AwareDatetime | None = Field(
        default=None, description="When its first credential expires; None: never, as in earlier releases"
    )
    at: AwareDatetime


def _whole_seconds(time: datetime) -> datetime:
    return time.replace(microsecond=0)


class GatewayRevoked(GatewayEvent):
    """A key of a gateway is revoked: the server refuses its credentials that were issued at `revoked_at` or before.

    A gateway may have several revoked keys in its life, so the subject names the key too.
    """

    type: ClassVar[str] = "slmops.gateway.revoked.v1"
    public_key: str = Field(pattern=PUBLIC_USER_KEY, description="Public nkey of the gateway's user")
    revoked_at: Annotated[AwareDatetime, AfterValidator(_whole_seconds)] = Field(
        description="Whole seconds, as in credentials; a fraction is cut off"
    )
    reason: str = Field(default="", max_length=200)
    expires_at: AwareDatetime | None = Field(
        default=None, description="When the key's last credentials expire anyway; None: never"
    )

    @classmethod
    def subject_template(cls) -> str:
        return f"{super().subject_template()}.{{public_key}}"

    @property
    def subject(self) -> str:
        return f"{super().subject}.{self.public_key}"


class GatewayMoved(GatewayEvent):
    """An admin moved a gateway. It counts for no blueprint until it has fetched its credential for the new one;
    then a `GatewayEnrolled` follows."""

    type: ClassVar[str] = "slmops.gateway.moved.v1"
    previous: Name
    blueprint: Name
    at: AwareDatetime


class GatewayReenrolmentAllowed(GatewayEvent):
    """An admin allows another key under this id, once: after that the key before is revoked."""

    type: ClassVar[str] = "slmops.gateway.reenrolment_allowed.v1"
    until: AwareDatetime
    same_key: bool = Field(default=False, description="The revoked key itself returns instead of another one")
    at: AwareDatetime


class GatewayRemoved(GatewayEvent):
    """A gateway was forgotten. Its keys stay revoked; its id is free for another device."""

    type: ClassVar[str] = "slmops.gateway.removed.v1"
    blueprint: Name
    reason: str = Field(default="", max_length=200)
    at: AwareDatetime


class GatewayReported(GatewayEvent):
    """The reported half of the twin. `sequence` grows by one with each report of a gateway, across restarts, unless the
    gateway loses its counter: `contracts.clocks.supersedes` says which report is newer."""

    type: ClassVar[str] = "slmops.gateway.reported.v1"
    blueprint: Name
    enrolment: int = Field(default=0, ge=0, description="Enrolment of its credential; 0: it had none yet, or is older")
    sequence: int = Field(ge=1, lt=1 << 63)
    boot: str = Field(default="", max_length=32, description="Random id of this run of the gateway's process")
    labels: dict[str, str] = Field(default_factory=dict)
    phase: UpdatePhase
    running: Digest | None = Field(default=None, description="Manifest of the release that answers now")
    running_version: Version | None = None
    target: Digest | None = Field(default=None, description="Manifest to which `phase` refers")
    problem: Problem | None = Field(default=None, description="Why the target failed")
    plan_generation: int = Field(default=0, ge=0)
    measured: dict[str, float] = Field(default_factory=dict, description="Probe figures: tokens_per_s, ttft_s, …")
    dropped_reports: int = Field(
        default=0,
        ge=0,
        description="Older reports that the gateway ever dropped, because they waited too long for a network",
    )
    dropped_measurements: int = Field(
        default=0, ge=0, description="Measurement batches that it ever dropped for the same reason: they count nowhere"
    )
    at: AwareDatetime

    def check_received(self) -> None:
        """Raises `InvalidMessage` for labels, figures or numbers that no gateway sends: they are stored for each."""
        problem = label_problem(self.labels)
        if not problem and (len(self.measured) > MOST_LABELS or any(len(name) > 63 for name in self.measured)):
            problem = f"{len(self.measured)} figures, more than {MOST_LABELS}, or a name of more than 63 characters"
        if not problem and max(self.plan_generation, self.dropped_reports, self.dropped_measurements) >= 1 << 63:
            problem = "a number of more than 63 bits"
        if problem:
            raise InvalidMessage(f"the report of {self.gateway_id} has {problem}")


# ---- user -------------------------------------------------------------------------------------------------


class UserEvent(Event):
    user: Name

    @property
    def key(self) -> str:
        return self.user


class UserAdded(UserEvent):
    """A person has a role, and credentials for this key."""

    type: ClassVar[str] = "slmops.user.added.v1"
    role: Role
    public_key: str = Field(pattern=PUBLIC_USER_KEY)
    expires_at: AwareDatetime
    at: AwareDatetime


class UserRenewed(UserEvent):
    """The credentials of a person were signed again for the same key."""

    type: ClassVar[str] = "slmops.user.renewed.v1"
    expires_at: AwareDatetime
    at: AwareDatetime


class UserRevoked(UserEvent):
    """A person has no access any more: the server refuses their key."""

    type: ClassVar[str] = "slmops.user.revoked.v1"
    public_key: str = Field(pattern=PUBLIC_USER_KEY)
    reason: str = ""
    at: AwareDatetime


# ---- telemetry --------------------------------------------------------------------------------------------


class CohortMeasured(BlueprintEvent):
    """One measured window of one release, over all gateways of a blueprint that ran it."""

    type: ClassVar[str] = "slmops.cohort.measured.v1"
    window: CohortWindow
    at: AwareDatetime
