"""The declared configuration of a class of gateways.

It travels in events and in the plan, which older gateways read too, so unknown fields are tolerated here. Where
a person writes one, a misspelt field is refused: `Blueprint.model_validate(…, extra="forbid")`.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from slmops.contracts.names import Name
from slmops.contracts.profile import EDGE_SMALL


class _Policy(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class Stage(_Policy):
    """Who gets the candidate while this stage lasts, besides everybody whom an earlier stage already gave it to.

    A gateway is in when it carries every label of `selector` and its hash cohort lies under `percent`.
    """

    name: Name
    percent: float = Field(default=100, gt=0, le=100)
    selector: dict[str, str] = Field(default_factory=dict)


class GatePolicy(_Policy):
    """What must be true before the next stage starts. No data holds; it never passes."""

    max_failed_gateways: int = Field(
        default=0, ge=0, description="More gateways failing the candidate than this fail it"
    )
    max_error_rate: float = Field(default=0.01, ge=0, le=1, description="Failed requests over all, absolute")
    min_requests: int = Field(default=1, ge=1, description="Fewer measured requests than this are no data")
    max_slowdown: float = Field(
        default=0.5, gt=0, le=1, description="Candidate's tokens/s may fall by this share of stable's, same windows"
    )
    min_decode_s: float = Field(
        default=1, ge=0, description="Tokens/s of less decoding than this, in seconds, is too noisy to object to"
    )
    deadline_s: float = Field(default=600, gt=0, description="After this long without a decision the stage is held")


class ProbePolicy(_Policy):
    """What a gateway demands of a release before its users meet it."""

    min_pass_share: float = Field(default=1.0, gt=0, le=1, description="Golden prompts that must pass, of all")
    max_ttft_s: float = Field(default=10, gt=0, description="Slowest acceptable time to first token, in seconds")


class SoakPolicy(_Policy):
    """How long a new release serves before it is committed, and how often it answers a golden prompt meanwhile."""

    seconds: float = Field(default=5, ge=0)
    golden_every_s: float = Field(default=1, gt=0)


class RuntimeSettings(_Policy):
    """How the model runner serves. An overlay may change these for one gateway."""

    max_tokens: int = Field(default=256, ge=1, description="Upper limit of completion tokens per request")
    context_tokens: int = Field(default=2048, ge=64, description="Prompt and completion together")


class TelemetryPolicy(_Policy):
    every_s: float = Field(
        default=2, gt=0, description="A measurement batch this often, when there is something to say"
    )


class PrivacyPolicy(_Policy):
    """Prompts and answers stay on the gateway. There is no other setting yet, so nothing can be switched by mistake."""

    prompts_leave_device: Literal[False] = False


class Blueprint(_Policy):
    """`name` is its identity; applying a changed one makes the next revision."""

    name: Name
    profile: Name = Field(default=EDGE_SMALL.name, description="Device profile that packages are chosen for")
    role: Name = Field(default="chat", description="What the model is for on this class of gateways")
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
