"""What a gateway measures of its own serving, and what telemetry makes of it. Counts and times, never text."""

from __future__ import annotations

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from slmops.contracts.descriptor import Digest
from slmops.contracts.names import Name, Version


class MeasurementBatch(BaseModel):
    """One interval of one gateway serving one release. Published on `measure.<gateway_id>`.

    Sums and counts, not means: they add up over gateways and intervals. `requests` holds users' requests and the
    gateway's own golden prompts, told apart by `synthetic_requests`.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    batch_id: str = Field(min_length=1, description="Unique per batch: a batch that arrives twice counts once")
    gateway_id: Name
    blueprint: Name
    release: Digest
    version: Version
    started_at: AwareDatetime
    ended_at: AwareDatetime
    requests: int = Field(ge=0)
    synthetic_requests: int = Field(default=0, ge=0)
    failed_requests: int = Field(ge=0)
    golden_passed: int = Field(default=0, ge=0)
    golden_failed: int = Field(default=0, ge=0)
    prompt_tokens: int = Field(ge=0)
    completion_tokens: int = Field(ge=0)
    decode_seconds: float = Field(ge=0, allow_inf_nan=False, description="Time spent generating completion tokens")
    ttft_seconds: float = Field(ge=0, allow_inf_nan=False, description="Sum of the times to first token")
    peak_rss_bytes: int = Field(default=0, ge=0)


class CohortWindow(BaseModel):
    """All batches of one release of one blueprint whose end lies in [started_at, ended_at)."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    blueprint: Name
    release: Digest
    version: Version
    started_at: AwareDatetime
    ended_at: AwareDatetime
    gateways: int = Field(ge=1)
    requests: int = Field(ge=0)
    failed_requests: int = Field(ge=0)
    golden_passed: int = Field(default=0, ge=0)
    golden_failed: int = Field(default=0, ge=0)
    completion_tokens: int = Field(ge=0)
    decode_seconds: float = Field(ge=0, allow_inf_nan=False)
    ttft_seconds: float = Field(ge=0, allow_inf_nan=False)

    @property
    def error_rate(self) -> float | None:
        """Failed over all requests; None without a request: no data is not a zero."""
        return self.failed_requests / self.requests if self.requests else None

    @property
    def tokens_per_s(self) -> float | None:
        return self.completion_tokens / self.decode_seconds if self.decode_seconds else None

    @property
    def ttft_s(self) -> float | None:
        served = self.requests - self.failed_requests
        return self.ttft_seconds / served if served > 0 else None
