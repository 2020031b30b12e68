"""Jobs that workers pull from a queue, and their progress."""

from __future__ import annotations

from enum import StrEnum

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from slmops.contracts.cloudevent import event_id
from slmops.contracts.descriptor import Descriptor, Digest
from slmops.contracts.errors import Problem
from slmops.contracts.model import ModelFile
from slmops.contracts.names import Name, Version
from slmops.contracts.profile import DeviceProfile
from slmops.contracts.prompts.evaluation_data import EvaluationData
from slmops.contracts.recipe import Recipe
from slmops.contracts.search import SearchSpec


class Predecessor(BaseModel):
    """The package that a new one replaces, and that devices therefore have."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    version: Version
    recipe: Name
    variant: Digest
    manifest: Descriptor


class OptimizeJob(BaseModel):
    """The job of making one version's variants for one device profile. Published on `jobs.optimize.<profile>`."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    model: Name
    version: Version
    digest: Digest = Field(description="Identity of the version's files")
    format: str
    files: tuple[ModelFile, ...] = Field(min_length=1)
    golden: Descriptor | None = None
    profile: DeviceProfile
    recipes: tuple[Name, ...] = Field(min_length=1)
    definitions: tuple[Recipe, ...] = Field(default=(), description="Custom recipes; the other names are bundled")
    search: SearchSpec | None = Field(default=None, description="A search that starts with `recipes` and tries more")
    predecessor: Predecessor | None = Field(default=None, description="Provides the grids for the anchored recipe")
    data: EvaluationData | None = Field(default=None, description="Own texts and tasks instead of the bundled ones")
    asked: str = Field(default="", description="Distinguishes requests for the same work")
    actor: str = Field(default="", description="Who asked for it, such as person:alice; empty: a registered version")

    @property
    def work(self) -> str:
        """An id of the work without the model's name: jobs with the same work have the same outcome."""
        meant = {recipe.name: recipe.digest for recipe in self.definitions}
        recipes = [f"{name}={meant[name]}" if name in meant else name for name in self.recipes]
        golden = self.golden.digest if self.golden else ""
        search = self.search.model_dump_json() if self.search else ""
        more = [f"after={self.predecessor.variant}"] if self.predecessor else []
        if self.data and self.data.files:
            more.append(f"data={self.data.identity}")
        return event_id("optimize", self.digest, self.profile.model_dump_json(), golden, search, *recipes, *more)

    @property
    def source(self) -> str:
        """An id of what a recipe's variant and its measurements depend on besides the recipe."""
        data = [self.data.identity] if self.data and self.data.files else []
        return event_id(self.digest, self.golden.digest if self.golden else "", *data)

    @property
    def id(self) -> str:
        """The job's id. A request that is delivered again has the same id."""
        return event_id(self.work, self.model, self.version, self.asked)


class JobState(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    CANCELLING = "cancelling"
    DONE = "done"
    REFUSED = "refused"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def ended(self) -> bool:
        return self in (JobState.DONE, JobState.REFUSED, JobState.FAILED, JobState.CANCELLED)


class JobView(BaseModel):
    """A job's progress. Done: a variant passed its gate; refused: no variant passed; failed: see `problem`."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    job: str
    work: str = Field(description="Jobs with the same work have the same outcome")
    model: Name
    version: Version
    profile: Name
    recipes: tuple[Name, ...]
    search: SearchSpec | None = None
    state: JobState
    step: str = Field(default="", description="The current step and intermediate results")
    done: int = Field(default=0, ge=0)
    of: int = Field(default=1, ge=1)
    worker: str = Field(default="", description="Host and process that runs it")
    reason: str = Field(default="", description="Why its variant was chosen, why it has none, or why it waits")
    problem: Problem | None = None
    report: Descriptor | None = Field(
        default=None, description="Report with every variant, the front and its pictures, and the choice"
    )
    queued_at: AwareDatetime
    at: AwareDatetime = Field(description="Time of the last change")
