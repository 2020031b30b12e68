"""The plan: one small document per blueprint from which each gateway resolves its own release. It lists no gateways.

`resolve(plan, overlays, identity)` is pure. The gateway calls it, and the rollout service predicts with the same code.

Invariants
1. The same plan, overlays and identity give the same result everywhere.
2. A later stage never takes the candidate away from a gateway that got it in an earlier stage.
3. A paused rollout, or the absence of a plan, moves no gateway: a gateway that runs a candidate keeps it. While a
   rollout is paused its stage does not advance; `resolve` needs no rule for it.
4. A pinned gateway stays on stable.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from slmops.contracts.blueprint import Blueprint, ProbePolicy, RuntimeSettings, SoakPolicy, Stage, TelemetryPolicy
from slmops.contracts.cohort import in_stage
from slmops.contracts.descriptor import Descriptor
from slmops.contracts.identity import Identity
from slmops.contracts.names import Name, Version
from slmops.contracts.profile import DeviceProfile

__all__ = [
    "Desired",
    "Identity",
    "Overlay",
    "Plan",
    "Release",
    "Side",
    "Stage",
    "resolve",
]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class Release(_Frozen):
    """A package under a revision of a blueprint: everything that a gateway needs to install and evaluate it."""

    revision: int = Field(ge=1)
    model: Name
    version: Version
    role: Name = "chat"
    manifest: Descriptor
    signature: Descriptor
    size_bytes: int = Field(ge=0)
    min_tokens_per_s: float = Field(default=0, ge=0)
    max_rss_bytes: int = Field(default=0, ge=0, description="0: no limit")
    probe: ProbePolicy = ProbePolicy()
    soak: SoakPolicy = SoakPolicy()
    runtime: RuntimeSettings = RuntimeSettings()
    telemetry: TelemetryPolicy = TelemetryPolicy()

    @classmethod
    def under(cls, spec: Blueprint, profile: DeviceProfile, **package: Any) -> Release:
        """Returns a release with the requirements of a blueprint and its profile. `package`: the other fields."""
        return cls(
            model=spec.model,
            role=spec.role,
            min_tokens_per_s=profile.min_tokens_per_s,
            max_rss_bytes=profile.ram_bytes,
            probe=spec.probe,
            soak=spec.soak,
            runtime=spec.runtime,
            telemetry=spec.telemetry,
            **package,
        )


class Candidate(_Frozen):
    """The release that is being rolled out. Stages 0 to `stage` are open."""

    rollout: str = Field(
        min_length=1, description="Also the salt of the hash cohort, so each rollout has other cohorts"
    )
    release: Release
    stages: tuple[Stage, ...] = Field(min_length=1)
    stage: int = Field(default=0, ge=0)


class Plan(_Frozen):
    """The plan of one blueprint: what its gateways should run. `generation` grows with every write."""

    blueprint: Name
    generation: int = Field(ge=1)
    stable: Release | None = None
    candidate: Candidate | None = None
    previous: Release | None = Field(
        default=None,
        description="Release to which a rollback of the last, completed rollout returns; no gateway runs it",
    )
    traceparent: str | None = Field(default=None, description="Trace of the decision, continued by the gateways")


class Overlay(_Frozen):
    """Settings of one gateway that override its blueprint.

    `blueprint`: where an admin moved the gateway. A gateway whose credential is for another one renews it.
    """

    gateway_id: Name
    blueprint: Name | None = None
    pinned_to_stable: bool = False
    max_tokens: int | None = Field(default=None, ge=1)
    set_by: str = ""


class Side(StrEnum):
    STABLE = "stable"
    CANDIDATE = "candidate"
    NONE = "none"


class Desired(_Frozen):
    """The release that one gateway should run. `explain` names the source of every choice."""

    side: Side
    release: Release | None
    explain: dict[str, str]


def resolve(plan: Plan, overlays: Iterable[Overlay], identity: Identity) -> Desired:
    """Returns the release that `identity` should run under `plan`. Overlays of other gateways are ignored."""
    mine = [overlay for overlay in overlays if overlay.gateway_id == identity.gateway_id]
    side, source = _side(plan, any(overlay.pinned_to_stable for overlay in mine), identity)
    release = plan.candidate.release if side is Side.CANDIDATE and plan.candidate else plan.stable
    if release is None:
        return Desired(side=Side.NONE, release=None, explain={"release": "plan: no stable release yet"})
    explain = {"release": source, "runtime": f"blueprint {plan.blueprint} revision {release.revision}"}
    changes: dict[str, Any] = {}
    for overlay in mine:
        if overlay.max_tokens is not None:
            changes["max_tokens"] = overlay.max_tokens
            explain["runtime.max_tokens"] = f"overlay of {overlay.gateway_id}, set by {overlay.set_by or 'unknown'}"
    if changes:
        release = release.model_copy(update={"runtime": release.runtime.model_copy(update=changes)})
    return Desired(side=side, release=release, explain=explain)


def _side(plan: Plan, pinned: bool, identity: Identity) -> tuple[Side, str]:
    candidate = plan.candidate
    if candidate is None:
        return Side.STABLE, "plan: stable, no rollout under way"
    if pinned:
        return Side.STABLE, "overlay: pinned to stable"
    for stage in candidate.stages[: candidate.stage + 1]:
        if in_stage(stage, candidate.rollout, identity):
            return Side.CANDIDATE, f"plan: stage {stage.name} of rollout {candidate.rollout}"
    return Side.STABLE, f"plan: not in a stage of rollout {candidate.rollout} yet"
