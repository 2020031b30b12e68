"""Commands and queries that the optimizer answers."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field, JsonValue

from slmops.contracts.commands.base import Command, Result
from slmops.contracts.commands.registry import UploadTicket
from slmops.contracts.descriptor import Digest
from slmops.contracts.evaluation import Verification
from slmops.contracts.jobs import JobView
from slmops.contracts.manifest import PackageFile
from slmops.contracts.model import ModelFile
from slmops.contracts.names import Name, Version
from slmops.contracts.prompts.evaluation_data import EvaluationData
from slmops.contracts.recipe import Recipe
from slmops.contracts.search import SearchSpec


class UploadData(Command[UploadTicket]):
    """Request URLs for uploading own texts and tasks. Until `Optimize` names them they belong to nothing."""

    service: ClassVar[str] = "optimizer"
    name: ClassVar[str] = "upload_data"
    files: tuple[ModelFile, ...] = Field(min_length=1)


class Optimize(Command[JobView]):
    """Make variants of a registered version. If the same work is already under way, the reply is that job.

    `ListJobs` shows its progress; so do the events `slmops.variant.*` with the job's id, as each step begins.
    """

    service: ClassVar[str] = "optimizer"
    name: ClassVar[str] = "optimize"
    model: Name
    version: Version
    profile: Name | None = Field(default=None, description="A bundled device profile; by default the optimizer's first")
    recipes: tuple[Name, ...] = Field(
        default=(), description="Bundled recipes; if there are no `definitions` either, the default recipes"
    )
    definitions: tuple[Recipe, ...] = Field(default=(), description="Custom recipes")
    search: SearchSpec | None = Field(default=None, description="Search for better recipes, starting with those named")
    data: EvaluationData | None = Field(
        default=None, description="Own texts and tasks; a kind without files uses those of the version"
    )
    upload: str = Field(default="", description="The upload with the files of `data`")


class CancelJob(Command[JobView]):
    """Cancel a job. It stops within seconds or never starts; its recipes are reported as rejected."""

    service: ClassVar[str] = "optimizer"
    name: ClassVar[str] = "cancel_job"
    job: str = Field(min_length=1, max_length=64, pattern=r"^[0-9a-f-]+$")
    by: str = "the operator"


class JobList(Result):
    jobs: tuple[JobView, ...]
    cursor: str | None = Field(default=None, description="Ask with it for older ones; None: these are the oldest")


class ListJobs(Command[JobList]):
    """List the newest jobs of the last three months, or one of them, the newest last. The cursor asks for the page
    before."""

    service: ClassVar[str] = "optimizer"
    name: ClassVar[str] = "list_jobs"
    job: str | None = None
    model: Name | None = None
    limit: int = Field(default=200, ge=1, le=500)
    cursor: str | None = None


class ParameterView(Result):
    name: str
    kind: str = Field(description="Allowed values, as text: `4 or 8`, `integer ≥ 1`")
    default: JsonValue = None
    required: bool = False
    description: str = ""


class PassView(Result):
    """A pass of a recipe. `takes` and `gives` determine which passes may come before and after it."""

    name: Name
    description: str
    takes: str
    gives: str
    parameters: tuple[ParameterView, ...]


class RecipeList(Result):
    """Recipes with all their parameters, including defaults, and the available passes."""

    recipes: tuple[Recipe, ...]
    passes: tuple[PassView, ...]


class ListRecipes(Command[RecipeList]):
    """List the bundled recipes, and the passes that a custom recipe may contain."""

    service: ClassVar[str] = "optimizer"
    name: ClassVar[str] = "list_recipes"


class EvaluationFiles(Result):
    """A report, and the pictures of a search's Pareto front. The URLs expire."""

    report: PackageFile
    pictures: tuple[PackageFile, ...] = ()


class FetchEvaluation(Command[EvaluationFiles]):
    """Fetch the report of a variant with its evidence, or of a whole job. Name one of them. The default recipe is the
    chosen one."""

    service: ClassVar[str] = "optimizer"
    name: ClassVar[str] = "fetch_evaluation"
    job: str | None = None
    model: Name | None = None
    version: Version | None = None
    profile: Name | None = None
    recipe: Name | None = None


class VerifyEvaluation(Command[Verification]):
    """Measure the figures of a variant's report again. It takes as long as the evaluation: use a long timeout.

    Name the variant by its report, or as in `FetchEvaluation`.
    """

    service: ClassVar[str] = "optimizer"
    name: ClassVar[str] = "verify_evaluation"
    report: Digest | None = None
    model: Name | None = None
    version: Version | None = None
    profile: Name | None = None
    recipe: Name | None = None
