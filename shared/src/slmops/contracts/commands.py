"""Every command and query. Imperative, request/reply on `cmd.<service>.<name>`.

Answered with a typed result, or with a `Problem`.
"""

from __future__ import annotations

from typing import Any, ClassVar, Generic, TypeVar

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, JsonValue

from slmops.contracts.blueprint import Blueprint, Stage
from slmops.contracts.descriptor import Descriptor, Digest
from slmops.contracts.errors import Problem
from slmops.contracts.evaluation import Evaluation, Verification
from slmops.contracts.events import UpdatePhase
from slmops.contracts.jobs import JobView
from slmops.contracts.manifest import DeltaStep, PackageFile
from slmops.contracts.measurement import CohortWindow
from slmops.contracts.model import ModelFile
from slmops.contracts.names import Name, Version
from slmops.contracts.plan import Release
from slmops.contracts.recipe import Recipe
from slmops.contracts.search import SearchSpec
from slmops.contracts.trust import METADATA_LIMIT_BYTES, MetadataName

R = TypeVar("R", bound=BaseModel)
COMMANDS: dict[str, type[Command[Any]]] = {}
"""Subject → class of every command."""


class Result(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class Command(BaseModel, Generic[R]):
    """`service` answers it; `name` is what it asks."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    service: ClassVar[str] = ""
    name: ClassVar[str] = ""
    per_gateway: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.name:
            COMMANDS[cls.subject_template()] = cls

    @classmethod
    def subject_template(cls) -> str:
        base = f"cmd.{cls.service}.{cls.name}"
        return f"{base}.{{gateway_id}}" if cls.per_gateway else base

    @property
    def subject(self) -> str:
        base = f"cmd.{self.service}.{self.name}"
        return f"{base}.{self.model_dump()['gateway_id']}" if self.per_gateway else base

    @classmethod
    def result_type(cls) -> type[R]:
        for base in cls.__mro__:
            metadata = getattr(base, "__pydantic_generic_metadata__", None)
            if metadata and metadata["args"]:
                return metadata["args"][0]  # type: ignore[no-any-return]
        raise TypeError(f"{cls.__name__} declares no result")


# ---- registry ---------------------------------------------------------------------------------------------


class UploadTicket(Result):
    """Where to put the missing files: digest → presigned PUT. A digest without a URL is in the store already."""

    upload: str
    urls: dict[Digest, str]


class BeginUpload(Command[UploadTicket]):
    """Ask for a place to put files. Nothing is registered and nothing shows in a list until `RegisterVersion`."""

    service: ClassVar[str] = "registry"
    name: ClassVar[str] = "begin_upload"
    model: Name
    version: Version
    files: tuple[ModelFile, ...] = Field(min_length=1)


class VariantView(Result):
    model: Name
    version: Version
    profile: Name
    recipe: Name
    digest: Digest | None = None
    gate: str = Field(description="passed or refused")
    chosen: bool = False
    reason: str = ""
    evaluation: Evaluation | None = None
    report: Descriptor | None = None


class PackageView(Result):
    profile: Name
    recipe: Name
    manifest: Descriptor
    signature: Descriptor
    size_bytes: int
    at: AwareDatetime


class VersionView(Result):
    model: Name
    version: Version
    digest: Digest
    format: str
    architecture: str
    size_bytes: int
    files: tuple[ModelFile, ...] = ()
    golden: Descriptor | None = None
    state: str = Field(description="registered or retired")
    stage: str = Field(default="registered", description="How far it came: registered, optimizing, packaged, refused")
    progress: str = ""
    at: AwareDatetime
    aliases: tuple[Name, ...] = ()
    variants: tuple[VariantView, ...] = ()
    packages: tuple[PackageView, ...] = ()


class RegisterVersion(Command[VersionView]):
    """Register uploaded files as an immutable version. The same files again answer the same; others are refused."""

    service: ClassVar[str] = "registry"
    name: ClassVar[str] = "register_version"
    model: Name
    version: Version
    upload: str
    format: str
    architecture: str
    files: tuple[ModelFile, ...] = Field(min_length=1)
    golden: ModelFile | None = Field(
        default=None, description="Among the uploaded; absent: the newest version's are kept"
    )


class SetAlias(Command[VersionView]):
    service: ClassVar[str] = "registry"
    name: ClassVar[str] = "set_alias"
    model: Name
    alias: Name
    version: Version


class RetireVersion(Command[VersionView]):
    service: ClassVar[str] = "registry"
    name: ClassVar[str] = "retire_version"
    model: Name
    version: Version
    reason: str = ""


class VersionList(Result):
    versions: tuple[VersionView, ...]


class ListVersions(Command[VersionList]):
    """Versions of one model, or of all; newest last."""

    service: ClassVar[str] = "registry"
    name: ClassVar[str] = "list_versions"
    model: Name | None = None
    version: Version | None = None


# ---- optimizer --------------------------------------------------------------------------------------------


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


# ---- packager ---------------------------------------------------------------------------------------------


class PackageFiles(Result):
    manifest: PackageFile
    signature: PackageFile
    files: tuple[PackageFile, ...]
    route: tuple[DeltaStep, ...] = Field(
        default=(), description="Deltas that lead here from a package the gateway has, in order, where that is cheaper"
    )


class FetchPackage(Command[PackageFiles]):
    """A gateway asks for the files of the package that its plan names. Refused for any other package."""

    service: ClassVar[str] = "packager"
    name: ClassVar[str] = "fetch"
    per_gateway: ClassVar[bool] = True
    gateway_id: Name
    manifest: Digest
    have: tuple[Digest, ...] = Field(default=(), max_length=8, description="Manifests of packages in its slots")


class MetadataFile(Result):
    file: MetadataName
    content: str = Field(max_length=METADATA_LIMIT_BYTES * 4 // 3 + 4, description="Base64")


class FetchMetadata(Command[MetadataFile]):
    """A gateway asks for a file of the TUF repository. Public, and worth nothing until it was verified."""

    service: ClassVar[str] = "packager"
    name: ClassVar[str] = "fetch_metadata"
    per_gateway: ClassVar[bool] = True
    gateway_id: Name
    file: MetadataName


class BundleContents(Result):
    """What crosses an air gap. The other metadata files are fetched by name: a version never changes."""

    blueprint: Name
    plan: str = Field(description="The signed envelope, base64")
    timestamp: str = Field(max_length=METADATA_LIMIT_BYTES * 4 // 3 + 4, description="timestamp.json, base64")
    metadata: tuple[MetadataName, ...] = Field(description="Every root, and what the timestamp leads to")
    packages: tuple[PackageFiles, ...] = Field(description="Of the stable release and of the candidate")


class PrepareBundle(Command[BundleContents]):
    """The operator asks for everything that gateways of a blueprint need when they have no network."""

    service: ClassVar[str] = "packager"
    name: ClassVar[str] = "prepare_bundle"
    blueprint: Name
    have: tuple[Digest, ...] = Field(default=(), max_length=8, description="Manifests from which deltas may start")


# ---- rollout ----------------------------------------------------------------------------------------------


class Enrolment(Result):
    """`jwt` makes the gateway's own nkey a user of the bus; it holds no secret."""

    gateway_id: Name
    blueprint: Name
    jwt: str


class EnrolGateway(Command[Enrolment]):
    """First contact. `token` is the site's enrolment secret; `public_key` the gateway's own user nkey (`U…`)."""

    service: ClassVar[str] = "rollout"
    name: ClassVar[str] = "enrol"
    gateway_id: Name
    blueprint: Name
    labels: dict[str, str] = Field(default_factory=dict)
    public_key: str = Field(pattern=r"^U[A-Z2-7]{55}$")
    token: str = Field(repr=False, min_length=1)


class BlueprintView(Result):
    revision: int
    spec: Blueprint
    stable: Release | None = None
    at: AwareDatetime


class ApplyBlueprint(Command[BlueprintView]):
    """Make this the newest revision. Applying what is already the newest changes nothing."""

    service: ClassVar[str] = "rollout"
    name: ClassVar[str] = "apply_blueprint"
    spec: Blueprint


class StageView(Result):
    name: str
    targets: int = 0
    committed: int = 0
    failed: int = 0
    waiting: str = Field(default="", description="What the gate still waits for")


class RolloutView(Result):
    rollout: str
    blueprint: Name
    state: str
    version: Version
    model: Name
    stage: int
    stages: tuple[StageView, ...]
    reason: str = ""
    started_at: AwareDatetime
    ended_at: AwareDatetime | None = None
    candidate_window: CohortWindow | None = None
    stable_window: CohortWindow | None = None


class StartRollout(Command[RolloutView]):
    """Move a blueprint to a published package. Without a version: the newest one published."""

    service: ClassVar[str] = "rollout"
    name: ClassVar[str] = "start"
    blueprint: Name
    version: Version | None = None
    stages: tuple[Stage, ...] = ()


class _OnRollout(Command[RolloutView]):
    service: ClassVar[str] = "rollout"
    blueprint: Name
    reason: str = "asked by the operator"


class PauseRollout(_OnRollout):
    name: ClassVar[str] = "pause"


class ResumeRollout(_OnRollout):
    name: ClassVar[str] = "resume"


class AbortRollout(_OnRollout):
    name: ClassVar[str] = "abort"


class RollbackRollout(_OnRollout):
    """Take back the rollout under way, or the last completed one: the gateways return to the release before it."""

    name: ClassVar[str] = "rollback"


class RolloutList(Result):
    rollouts: tuple[RolloutView, ...]


class ListRollouts(Command[RolloutList]):
    """All rollouts, or one blueprint's; newest last."""

    service: ClassVar[str] = "rollout"
    name: ClassVar[str] = "list_rollouts"
    blueprint: Name | None = None


class BlueprintList(Result):
    blueprints: tuple[BlueprintView, ...]


class ListBlueprints(Command[BlueprintList]):
    service: ClassVar[str] = "rollout"
    name: ClassVar[str] = "list_blueprints"


class GatewayView(Result):
    gateway_id: Name
    blueprint: Name
    labels: dict[str, str]
    phase: UpdatePhase
    running: Digest | None = None
    running_version: Version | None = None
    target: Digest | None = None
    desired: Digest | None = None
    desired_because: dict[str, str] = Field(default_factory=dict)
    problem: Problem | None = None
    measured: dict[str, float] = Field(default_factory=dict)
    plan_generation: int = 0
    last_seen: AwareDatetime


class GatewayList(Result):
    gateways: tuple[GatewayView, ...]


class ListGateways(Command[GatewayList]):
    """The fleet, or one gateway of it, with what each should run and why."""

    service: ClassVar[str] = "rollout"
    name: ClassVar[str] = "list_gateways"
    gateway_id: Name | None = None
