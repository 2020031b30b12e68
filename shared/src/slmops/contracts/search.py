"""A search for the best recipe: how long it may take, and what best means."""

from __future__ import annotations

from datetime import timedelta
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Prefer = Literal["smallest", "best_quality", "fastest"]
"""Which of the variants that pass is chosen: the one with the fewest bytes, the lowest KL or the most tokens/s."""


class SearchSpec(BaseModel):
    """It ends when the budget is spent, after `max_trials`, or when nothing is left that could be better.

    Deterministic but for its measurements of time: the same version, recipes and tools are tried in the same order.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    budget: timedelta = Field(
        default=timedelta(hours=1),
        gt=timedelta(0),
        description="No trial is begun that is expected to end later; runs that were cut off count",
    )
    max_trials: int = Field(default=24, ge=1, le=1000)
    prefer: Prefer = "smallest"
