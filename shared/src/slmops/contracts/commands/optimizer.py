"""Asked of the optimizer."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field, JsonValue

from slmops.contracts.commands.base import Command, Result
from slmops.contracts.descriptor import Digest
from slmops.contracts.evaluation import Verification
from slmops.contracts.jobs import JobView
from slmops.contracts.manifest import PackageFile
from slmops.contracts.names import Name, Version
from slmops.contracts.recipe import Recipe
from slmops.contracts.search import SearchSpec


class Optimize(Command[JobView]):
    """Make variants of a registered version. While the same work is under way, it is answered with that job.

    `ListJobs` tells how far it came; so do `slmops.variant.*` with the job's id, as each step begins.
    """

    service: ClassVar[str] = "optimizer"
    name: ClassVar[str] = "optimize"
    model: Name
    version: Version
    profile: Name | None = Field(default=None, description="A bundled device profile; absent: the optimizer's first")
    recipes: tuple[Name, ...] = Field(default=(), description="Bundled ones; absent with `definitions`: the defaults")
    definitions: tuple[Recipe, ...] = Field(default=(), description="Recipes of your own")
    search: SearchSpec | None = Field(default=None, description="Look for better recipes, beginning with those named")


class CancelJob(Command[JobView]):
    """End a job. It stops within seconds, or never starts; its recipes are reported as rejected."""

    service: ClassVar[str] = "optimizer"
    name: ClassVar[str] = "cancel_job"
    job: str = Field(min_length=1, max_length=64, pattern=r"^[0-9a-f-]+$")
    by: str = "the operator"


class JobList(Result):
    jobs: tuple[JobView, ...]


class ListJobs(Command[JobList]):
    """Jobs of the last three months, or one of them; the newest last."""

    service: ClassVar[str] = "optimizer"
    name: ClassVar[str] = "list_jobs"
    job: str | None = None
    model: Name | None = None


class ParameterView(Result):
    name: str
    kind: str = Field(description="For a person: `4 or 8`, `integer ≥ 1`")
    default: JsonValue = None
    required: bool = False
    description: str = ""


class PassView(Result):
    """`takes` and `gives` say which passes may stand before and after it."""

    name: Name
    description: str
    takes: str
    gives: str
    parameters: tuple[ParameterView, ...]


class RecipeList(Result):
    """Of each recipe every parameter is written out."""

    recipes: tuple[Recipe, ...]
    passes: tuple[PassView, ...]


class ListRecipes(Command[RecipeList]):
    """The bundled recipes, and the passes that a recipe of your own may be made of."""

    service: ClassVar[str] = "optimizer"
    name: ClassVar[str] = "list_recipes"


class EvaluationFiles(Result):
    """The report, and the pictures of a search's front. Addresses expire."""

    report: PackageFile
    pictures: tuple[PackageFile, ...] = ()


class FetchEvaluation(Command[EvaluationFiles]):
    """The report of a variant with its evidence, or of a whole job: name one of them. Without a recipe: the chosen."""

    service: ClassVar[str] = "optimizer"
    name: ClassVar[str] = "fetch_evaluation"
    job: str | None = None
    model: Name | None = None
    version: Version | None = None
    profile: Name | None = None
    recipe: Name | None = None


class VerifyEvaluation(Command[Verification]):
    """Measure again what a variant's report says. Takes as long as evaluating did: ask with a long timeout.

    A variant is named by its report, or as in `FetchEvaluation`.
    """

    service: ClassVar[str] = "optimizer"
    name: ClassVar[str] = "verify_evaluation"
    report: Digest | None = None
    model: Name | None = None
    version: Version | None = None
    profile: Name | None = None
    recipe: Name | None = None
