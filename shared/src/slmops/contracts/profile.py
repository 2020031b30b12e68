"""Device profiles: classes of hardware and the limits that a variant must keep to run on them."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from slmops.contracts.names import Name

Share = Annotated[float, Field(ge=0, le=1)]


class DeviceProfile(BaseModel):
    """A class of hardware and the limits that a variant for it must keep. None means no limit.

    For a figure that was measured with an interval, the worse end of the interval must keep the limit.
    """

    model_config = ConfigDict(frozen=True)

    name: Name
    arch: str
    """Architecture by its OCI name: `amd64`, `arm64`."""
    ram_bytes: int = Field(gt=0)
    """Highest peak memory of the model's process."""
    disk_bytes: int = Field(gt=0)
    """Disk space for releases. A gateway holds two at a time."""
    max_package_bytes: int = Field(gt=0)
    min_tokens_per_s: float = Field(gt=0)
    max_kl: float = Field(gt=0)
    """In nats per token, see `Evaluation.kl`."""
    min_top1: Share
    max_ppl_ratio: float | None = Field(default=None, gt=0)
    """Variant's perplexity divided by the reference's. A ratio, because perplexities of different models are not
    comparable."""
    min_accuracy: dict[str, Share] = Field(default_factory=dict)
    """By task. A task that was not measured counts as failed."""
    all_golden: bool = False
    """Requires that every golden prompt is answered as expected, and that there is at least one."""
    max_repetition: Share | None = None
    max_joules_per_token: float | None = Field(default=None, gt=0)
    """Measured or modelled, see `Evaluation.joules_source`; both refer to the optimizer's machine."""


EDGE_SMALL = DeviceProfile(
    name="edge-small",
    arch="amd64",
    ram_bytes=1_000_000_000,
    disk_bytes=1_000_000_000,
    max_package_bytes=160_000_000,
    min_tokens_per_s=5,
    max_kl=0.30,
    min_top1=0.65,
)
"""A gateway with 2 GB of memory on a metered link. Its fidelity limits are the acceptable loss and make no allowance
for measurement uncertainty: they refuse the builder's int4 of a 135M model (SmolLM2: KL 0.36, at worst 0.38; top-1
0.66, at worst 0.64) and pass the bundled `int4` recipe (0.061, at worst 0.066; 0.86, at worst 0.84)."""

PROFILES = {profile.name: profile for profile in (EDGE_SMALL,)}
"""Every bundled profile by name."""
