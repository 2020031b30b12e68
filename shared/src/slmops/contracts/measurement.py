"""A gateway's measurements of its serving, and the windows that telemetry sums them into. Counts and times, no text."""

from __future__ import annotations

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from slmops.contracts.descriptor import Digest
from slmops.contracts.names import Name, Version


class MeasurementBatch(BaseModel):
    """Measurements of one gateway serving one release during one interval. Published on `measure.<gateway_id>`.

    The fields are sums and counts, not means, so they can be added over gateways and intervals. `requests` counts
    users' requests and the gateway's own golden prompts; `synthetic_requests` counts only the latter.
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
    boot: str = Field(default="", max_length=64, description="Names a start of the gateway's agent")
    sequence: int | None = Field(
        default=None,
        ge=1,
        lt=1 << 53,
        description="Number of the batch since that start. With `boot`: a number that arrives twice counts once",
    )


class CohortWindow(BaseModel):
    """The sum of all batches of one release of one blueprint that end in [started_at, ended_at)."""

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
        """Failed requests divided by all requests. None without requests, because no data is not zero."""
        return self.failed_requests / self.requests if self.requests else None

    @property
    def tokens_per_s(self) -> float | None:
        return self.completion_tokens / self.decode_seconds if self.decode_seconds else None

    @property
    def ttft_s(self) -> float | None:
        served = self.requests - self.failed_requests
        return self.ttft_seconds / served if served > 0 else None
