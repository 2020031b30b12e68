"""What a class of hardware can do, and so what a variant must be to run on it."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from slmops.contracts.names import Name

Share = Annotated[float, Field(ge=0, le=1)]


class DeviceProfile(BaseModel):
    """A class of hardware and the limits that a variant for it must keep. None is no limit.

    A limit on a figure that was measured with an interval is kept only if the interval's bad end keeps it.
    """

    model_config = ConfigDict(frozen=True)

    name: Name
    arch: str
    """As OCI names it: `amd64`, `arm64`."""
    ram_bytes: int = Field(gt=0)
    """What the model's process may have at its peak."""
    disk_bytes: int = Field(gt=0)
    """What releases may take. A gateway holds two at a time."""
    max_package_bytes: int = Field(gt=0)
    min_tokens_per_s: float = Field(gt=0)
    max_kl: float = Field(gt=0)
    """In nats per token, see `Evaluation.kl`."""
    min_top1: Share
    max_ppl_ratio: float | None = Field(default=None, gt=0)
    """Of the variant's perplexity to the reference's: between models, perplexities cannot be compared."""
    min_accuracy: dict[str, Share] = Field(default_factory=dict)
    """By task. A task that was not measured is not passed."""
    all_golden: bool = False
    """Every golden prompt is answered as expected, and there is at least one."""
    max_repetition: Share | None = None
    max_joules_per_token: float | None = Field(default=None, gt=0)
    """Measured or modelled, see `Evaluation.joules_source`; either is of the optimizer's machine."""


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
"""A gateway with 2 GB of memory on a metered link. Its fidelity limits are what a device may lose, and no allowance for
how well that is known: they refuse the builder's own int4 of a 135M model (SmolLM2: KL 0.36, at worst 0.38; top-1 0.66,
at worst 0.64) and pass the bundled `int4` recipe (0.061, at worst 0.066; 0.86, at worst 0.84)."""

PROFILES = {profile.name: profile for profile in (EDGE_SMALL,)}
"""Every bundled profile by name."""
