"""The input of a job's process."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from slmops.contracts.profile import EDGE_SMALL, DeviceProfile
from slmops.contracts.prompts.golden import GoldenPrompt
from slmops.contracts.recipe import Recipe
from slmops.contracts.search import SearchSpec

SPEC_FILE = "spec.json"


class JobSpec(BaseModel):
    """Everything that the outcome of a job depends on besides the source and the tools."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    recipes: tuple[Recipe, ...] = Field(min_length=1, description="The recipes to try; a search starts with them")
    profile: DeviceProfile = EDGE_SMALL
    search: SearchSpec | None = Field(default=None, description="Search for more recipes than `recipes`")
    golden: tuple[GoldenPrompt, ...] = ()
    seed: int = Field(default=0, ge=0)
    evaluation_texts: tuple[Path, ...] = Field(default=(), description="Replace the bundled evaluation text")
    calibration_texts: tuple[Path, ...] = Field(default=(), description="Replace the default calibration text")
    tasks: tuple[Path, ...] = Field(default=(), description="Replace the bundled tasks")
    predecessor: Path | None = Field(default=None, description="Genai folder of the predecessor's variant")
    memory_limit_bytes: int | None = Field(
        default=None, gt=0, description="A model that needs more memory is refused; None: the free memory"
    )

    @model_validator(mode="after")
    def _names_are_unique(self) -> Self:
        names = [recipe.name for recipe in self.recipes]
        if doubled := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"there are several recipes {doubled[0]!r}")
        return self
