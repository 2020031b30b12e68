"""Candidates for the choice: a recipe, the measurements of its variant, and the verdict of the gate."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from slmops.contracts.evaluation import Evaluation, Verdict
from slmops.contracts.recipe import Recipe


class Candidate(BaseModel):
    """One recipe's variant before the choice."""

    model_config = ConfigDict(frozen=True)

    recipe: str
    evaluation: Evaluation | None
    """None if the recipe failed; then `verdict` has the error."""
    verdict: Verdict


class Variant(Candidate):
    """A candidate with its recipe and its folder."""

    definition: Recipe
    """The recipe with every parameter written out."""
    path: str | None
    """The genai folder, relative to the job's work folder; None if the recipe failed."""
    seconds: float
    """Time for making and measuring it; steps that an earlier run finished are not included."""
