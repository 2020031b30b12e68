"""The blueprint: the declared configuration of a class of gateways.

Blueprints are part of events and of the plan, which older gateways read, too, so unknown fields are ignored here. Code
that reads a blueprint written by a person rejects misspelt fields: `Blueprint.model_validate(…, extra="forbid")`.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from slmops.contracts.names import Name
from slmops.contracts.profile import EDGE_SMALL


class _Policy(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class Stage(_Policy):
    """A stage of a rollout: the gateways that get the candidate in addition to those of the earlier stages.

    A gateway is in the stage if it has every label of `selector` and its hash cohort is below `percent`.
    """

    name: Name
    percent: float = Field(default=100, gt=0, le=100)
    selector: dict[str, str] = Field(default_factory=dict)


class GatePolicy(_Policy):
    """The conditions for starting the next stage. Without data the gate holds; it never passes."""

    max_failed_gateways: int = Field(
        default=0, ge=0, description="If the candidate fails on more gateways than this, the gate fails"
    )
    max_error_rate: float = Field(default=0.01, ge=0, le=1, description="Highest share of failed requests, absolute")
    min_requests: int = Field(default=1, ge=1, description="Fewer measured requests than this count as no data")
    max_slowdown: float = Field(
        default=0.5,
        gt=0,
        le=1,
        description="Share by which the candidate's tokens/s may be below stable's, in the same windows",
    )
    min_decode_s: float = Field(
        default=1,
        ge=0,
        description="Tokens/s over less decoding time than this, in seconds, is too noisy to fail a candidate",
    )
    deadline_s: float = Field(
        default=600, gt=0, description="The stage is held after this many seconds without a decision"
    )


class ProbePolicy(_Policy):
    """The conditions that a release must meet on a gateway before it serves users."""

    min_pass_share: float = Field(default=1.0, gt=0, le=1, description="Share of golden prompts that must pass")
    max_ttft_s: float = Field(default=10, gt=0, description="Slowest acceptable time to first token, in seconds")


class SoakPolicy(_Policy):
    """How long a new release serves before it is committed, and how often it answers a golden prompt before that."""

    seconds: float = Field(default=5, ge=0)
    golden_every_s: float = Field(default=1, gt=0)


class RuntimeSettings(_Policy):
    """Settings of the model runner. An overlay may change them for one gateway."""

    max_tokens: int = Field(default=256, ge=1, description="Upper limit of completion tokens per request")
    context_tokens: int = Field(default=2048, ge=64, description="Prompt and completion together")


class TelemetryPolicy(_Policy):
    every_s: float = Field(
        default=2, gt=0, description="Seconds between measurement batches; an empty batch is not sent"
    )


class PrivacyPolicy(_Policy):
    """Prompts and answers stay on the gateway. No other value exists yet, so nobody can change this by mistake."""

    prompts_leave_device: Literal[False] = False


class Blueprint(_Policy):
    """`name` identifies the blueprint; applying a changed blueprint creates its next revision."""

    name: Name
    profile: Name = Field(default=EDGE_SMALL.name, description="Device profile for which packages are chosen")
    role: Name = Field(default="chat", description="Purpose of the model on this class of gateways")
    model: Name
    stages: tuple[Stage, ...] = Field(
        default=(Stage(name="canary", selector={"ring": "canary"}), Stage(name="fleet")), min_length=1
    )
    gate: GatePolicy = GatePolicy()
    probe: ProbePolicy = ProbePolicy()
    soak: SoakPolicy = SoakPolicy()
    runtime: RuntimeSettings = RuntimeSettings()
    telemetry: TelemetryPolicy = TelemetryPolicy()
    privacy: PrivacyPolicy = PrivacyPolicy()
