"""Work that one of several workers pulls from a queue, and how far it came."""

from __future__ import annotations

from enum import StrEnum

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from slmops.contracts.cloudevent import event_id
from slmops.contracts.descriptor import Descriptor, Digest
from slmops.contracts.errors import Problem
from slmops.contracts.model import ModelFile
from slmops.contracts.names import Name, Version
from slmops.contracts.profile import DeviceProfile
from slmops.contracts.recipe import Recipe
from slmops.contracts.search import SearchSpec


class Predecessor(BaseModel):
    """The package that a new one replaces: what devices have already."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    version: Version
    recipe: Name
    variant: Digest
    manifest: Descriptor


class OptimizeJob(BaseModel):
    """Make the variants of one version for one device profile. On `jobs.optimize.<profile>`."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    model: Name
    version: Version
    digest: Digest = Field(description="Identity of the version's files")
    format: str
    files: tuple[ModelFile, ...] = Field(min_length=1)
    golden: Descriptor | None = None
    profile: DeviceProfile
    recipes: tuple[Name, ...] = Field(min_length=1)
    definitions: tuple[Recipe, ...] = Field(default=(), description="What those names mean; others are bundled ones")
    search: SearchSpec | None = Field(default=None, description="Try more than `recipes`, which it begins with")
    predecessor: Predecessor | None = Field(default=None, description="On whose grids one of `recipes` quantizes")
    asked: str = Field(default="", description="Tells one request for the same work from another")

    @property
    def work(self) -> str:
        """What there is to do, whatever it is called: jobs with the same work have the same outcome."""
        meant = {recipe.name: recipe.digest for recipe in self.definitions}
        recipes = [f"{name}={meant[name]}" if name in meant else name for name in self.recipes]
        golden = self.golden.digest if self.golden else ""
        search = self.search.model_dump_json() if self.search else ""
        before = [f"after={self.predecessor.variant}"] if self.predecessor else []
        return event_id("optimize", self.digest, self.profile.model_dump_json(), golden, search, *recipes, *before)

    @property
    def id(self) -> str:
        """The same request for a job has the same id, however often it is delivered."""
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
    """How far a job came. Done: a variant passed its gate; refused: none did; failed: `problem` says why."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    job: str
    work: str = Field(description="Jobs with the same work have the same outcome")
    model: Name
    version: Version
    profile: Name
    recipes: tuple[Name, ...]
    search: SearchSpec | None = None
    state: JobState
    step: str = Field(default="", description="What it does now, with what is known so far")
    done: int = Field(default=0, ge=0)
    of: int = Field(default=1, ge=1)
    worker: str = Field(default="", description="Host and process that has it")
    reason: str = Field(default="", description="Why its variant was chosen, or why it waits or has none")
    problem: Problem | None = None
    report: Descriptor | None = Field(default=None, description="Every variant, the front and its pictures, the choice")
    queued_at: AwareDatetime
    at: AwareDatetime = Field(description="Of the last change")
