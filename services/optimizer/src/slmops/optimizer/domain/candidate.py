"""A candidate of the choice: a recipe, the measurements of its variant, and the verdict of the gate."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from slmops.contracts.evaluation import Evaluation, Verdict
from slmops.contracts.recipe import Recipe


class Candidate(BaseModel):
    """One recipe's variant before the choice."""

    model_config = ConfigDict(frozen=True)

    recipe: str
    evaluation: Evaluation | None
    """None if the recipe failed; then `verdict` says how."""
    verdict: Verdict


class Variant(Candidate):
    """A candidate, and where it came from."""

    definition: Recipe
    """What `recipe` means, with every parameter."""
    path: str | None
    """The genai folder, relative to the job's work folder; None if the recipe failed."""
    seconds: float
    """That making and measuring it took, where they were not done before."""
