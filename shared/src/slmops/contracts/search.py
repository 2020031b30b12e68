"""The specification of a search for the best recipe: its budget and its objective."""

from __future__ import annotations

from datetime import timedelta
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Prefer = Literal["smallest", "best_quality", "fastest"]
"""The choice among passing variants: the one with the fewest bytes, the lowest KL or the most tokens/s."""


class SearchSpec(BaseModel):
    """A search ends when the budget is spent, after `max_trials`, or when no untried recipe can be better.

    Except for time measurements it is deterministic: the same version, recipes and tools give the same order of trials.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    budget: timedelta = Field(
        default=timedelta(hours=1),
        gt=timedelta(0),
        description="No trial starts that is expected to end later; time of interrupted runs counts",
    )
    max_trials: int = Field(default=24, ge=1, le=1000)
    prefer: Prefer = "smallest"
