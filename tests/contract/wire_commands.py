"""One example of every command and its result."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from contract.wire_examples import (
    AT,
    BECAUSE,
    BEFORE,
    BLUEPRINT,
    CONFIG,
    DELTA,
    EVALUATION,
    GOLDEN,
    JOB,
    LATER,
    MANIFEST,
    MEASURED,
    OWN_DATA,
    PROBLEM,
    PUBLIC_KEY,
    QUESTIONS,
    RECIPE,
    REPORT,
    SEARCH,
    SIGNED,
    VERSION,
    WEIGHTS,
    WINDOW,
    digest,
    release,
)
from pydantic import BaseModel

from slmops.contracts import commands as c
from slmops.contracts import events as e
from slmops.contracts.descriptor import Descriptor
from slmops.contracts.evaluation import Figure, Verification
from slmops.contracts.identity import Role
from slmops.contracts.jobs import JobState, JobView
from slmops.contracts.manifest import (
    DeltaStep,
    PackageFile,
)

_VARIANT_VIEW = c.VariantView(
    model="smollm2",
    version=VERSION,
    profile="edge-small",
    recipe="int4",
    digest=digest("f"),
    gate="passed",
    chosen=True,
    reason=BECAUSE,
    evaluation=EVALUATION,
    report=REPORT,
)
_USER_VIEW = c.UserView(
    user="alice",
    role=Role.OPERATOR,
    public_key=PUBLIC_KEY,
    added_at=AT,
    added_by="person:bob",
    expires_at=LATER,
    revoked_at=LATER,
    revoked_by="person:bob",
    reason="left",
)
_PACKAGE_VIEW = c.PackageView(
    profile="edge-small", recipe="int4", manifest=MANIFEST, signature=SIGNED, size_bytes=86_000_120, at=AT
)
_PACKAGE = dict(_PACKAGE_VIEW) | {"model": "smollm2", "version": VERSION, "size_bytes": 86_000_000}
_ASKED: dict[str, Any] = {"manifest": digest("d"), "model": "smollm2", "version": VERSION, "profile": "edge-small"}
_VERSION_VIEW = c.VersionView(
    model="smollm2",
    version=VERSION,
    digest=digest("f"),
    format="gguf",
    architecture="llama",
    size_bytes=86_000_120,
    files=(WEIGHTS,),
    golden=GOLDEN,
    data=OWN_DATA,
    state="registered",
    stage="packaged",
    progress="4 of 4",
    at=AT,
    aliases=("stable",),
    variants=(_VARIANT_VIEW,),
    packages=(_PACKAGE_VIEW,),
)
_JOB_VIEW = JobView(
    job=JOB,
    work="0e1d2c3b-4a59-5687-9a0b-1c2d3e4f5a6b",
    model="smollm2",
    version=VERSION,
    profile="edge-small",
    recipes=("int4", "mine"),
    search=SEARCH,
    state=JobState.RUNNING,
    step="best so far: int4, 93.7 MB, KL 0.17, 80 tokens/s; 2 of 4 on the front, 0:21:00 left",
    done=6,
    of=15,
    worker="edge-lab/4711",
    reason=BECAUSE,
    problem=PROBLEM,
    report=REPORT,
    queued_at=AT,
    at=LATER,
)
_BLUEPRINT_VIEW = c.BlueprintView(revision=2, spec=BLUEPRINT, stable=release(BEFORE, "9"), at=AT)
_ROLLOUT_VIEW = c.RolloutView(
    rollout="edge-chat-2",
    blueprint="edge-chat",
    state="running",
    version=VERSION,
    model="smollm2",
    stage=0,
    stages=(
        c.StageView(name="canary", targets=1, committed=0, failed=0, waiting="gw-1 soaks"),
        c.StageView(name="fleet"),
    ),
    reason="asked by the operator",
    started_at=AT,
    ended_at=LATER,
    candidate_window=WINDOW,
    stable_window=WINDOW,
    attention=(
        c.GatewayProblem(gateway_id="gw-1", stage="canary", failed=True, problem="answers wrongly", last_seen=LATER),
        c.GatewayProblem(gateway_id="gw-2", stage="canary", failed=False),
    ),
)
_ENROLMENT = c.Enrolment(gateway_id="gw-1", blueprint="edge-chat", jwt="eyJ0eXAiOiJKV1QifQ.e30.c2ln")
_GATEWAY_VIEW = c.GatewayView(
    gateway_id="gw-1",
    blueprint="edge-chat",
    standing=c.Standing.MOVING,
    enrolment=2,
    moving_to="kiosk",
    revoked_at=AT,
    revoked_because="stolen",
    reenrol_until=LATER,
    credential_expires_at=LATER,
    labels={"ring": "canary"},
    phase=e.UpdatePhase.FAILED,
    running=digest("9"),
    running_version=BEFORE,
    target=digest("d"),
    desired=digest("d"),
    desired_because={"release": "plan: stage canary of rollout edge-chat-2"},
    problem=PROBLEM,
    measured=MEASURED,
    plan_generation=3,
    dropped_reports=40,
    dropped_measurements=2,
    last_seen=AT,
    clock_ahead_s=259200.5,
    attention=(c.Attention.FAILED, c.Attention.CLOCK),
)


def _file(path: str, descriptor: Descriptor) -> PackageFile:
    return PackageFile(path=path, descriptor=descriptor, url=f"http://s3.example/slmops/{path}?X-Amz-Expires=900")


COMMANDS: tuple[tuple[c.Command[Any], BaseModel], ...] = (
    (
        c.BeginUpload(
            model="smollm2",
            version=VERSION,
            files=(WEIGHTS, QUESTIONS),
            md5={digest("a"): "9e107d9d372bb6826bd81d3542a419d6"},
        ),
        c.UploadTicket(upload="u-1", urls={digest("a"): "http://s3.example/slmops/uploads/u-1/a"}),
    ),
    (
        c.RegisterVersion(
            model="smollm2",
            version=VERSION,
            upload="u-1",
            format="gguf",
            architecture="llama",
            files=(WEIGHTS, QUESTIONS),
            golden=QUESTIONS,
            data=OWN_DATA,
        ),
        _VERSION_VIEW,
    ),
    (c.SetAlias(model="smollm2", alias="stable", version=VERSION), _VERSION_VIEW),
    (c.RetireVersion(model="smollm2", version=VERSION, reason="superseded by 1.0.2"), _VERSION_VIEW),
    (
        c.ListVersions(model="smollm2", version=VERSION, limit=1, cursor="WyJ2ZXJzaW9ucyIsIDkuMF0"),
        c.VersionList(versions=(_VERSION_VIEW,), cursor="WyJ2ZXJzaW9ucyIsIDguMF0"),
    ),
    (
        c.CollectGarbage(dry_run=True, grace=timedelta(days=2), at_most=500),
        c.GarbageReport(
            live=c.Share(objects=42, size_bytes=700_000_000),
            young=c.Share(objects=3, size_bytes=90_000_000),
            garbage=c.Share(objects=9, size_bytes=538_000_000),
            uploads=c.Share(objects=1, size_bytes=98_000_000),
            removed=c.Share(objects=9, size_bytes=538_000_000),
            missing=1,
        ),
    ),
    (
        c.VerifyStorage(
            after=digest("a"), at_most=500, at_most_bytes=1_000_000_000, bytes_per_s=20_000_000, repair=True
        ),
        c.StorageReport(
            checked=c.Share(objects=42, size_bytes=700_000_000),
            damaged=(
                c.DamagedBlob(
                    digest=digest("c"),
                    damage=c.Damage.CORRUPT,
                    size_bytes=86_000_000,
                    needed_by=("smollm2:1.0.1 (variants)",),
                    quarantined=True,
                    fix="Make the variants again: slmops optimize smollm2:1.0.1.",
                ),
            ),
            after=digest("d"),
        ),
    ),
    (
        c.BeginRestore(digests=(digest("c"),)),
        c.UploadTicket(upload="u-1", urls={digest("c"): "http://s3.example/slmops/uploads/u-1/c"}),
    ),
    (c.DescribeTrust(), c.TrustStatus(expires={"root": AT, "timestamp": LATER})),
    (c.RestoreBlobs(upload="u-1", blobs=(REPORT,)), c.RestoredBlobs(restored=(REPORT.digest,))),
    (
        c.DescribeStorage(),
        c.StorageStatus(
            corrupt=1,
            missing=1,
            damaged=(digest("c"), digest("d")),
            verified=c.Share(objects=42, size_bytes=700_000_000),
            verification_began=AT,
            verification_ended=AT,
            collected_at=AT,
            collected=c.Share(objects=9, size_bytes=538_000_000),
            problems={"collect garbage": "events were lost"},
        ),
    ),
    (
        c.UploadData(files=OWN_DATA.files),
        c.UploadTicket(upload="u-2", urls={digest("7"): "http://s3.example/slmops/uploads/u-2/7"}),
    ),
    (
        c.Optimize(
            model="smollm2",
            version=VERSION,
            profile="edge-small",
            recipes=("int4",),
            definitions=(RECIPE,),
            search=SEARCH,
            data=OWN_DATA,
            upload="u-2",
        ),
        _JOB_VIEW,
    ),
    (c.CancelJob(job=JOB, by="alice"), _JOB_VIEW),
    (
        c.ListJobs(job=JOB, model="smollm2", limit=1, cursor="WyJqb2JzIiwgMi4wLCAiYiJd"),
        c.JobList(jobs=(_JOB_VIEW,), cursor="WyJqb2JzIiwgMS4wLCAiYSJd"),
    ),
    (
        c.ListRecipes(),
        c.RecipeList(
            recipes=(RECIPE,),
            passes=(
                c.PassView(
                    name="quantize",
                    description="Weight quantization.",
                    takes="float",
                    gives="coded",
                    parameters=(
                        c.ParameterView(
                            name="bits", kind="4 or 8", default=4, required=False, description="Bits of a weight"
                        ),
                    ),
                ),
            ),
        ),
    ),
    (
        c.FetchEvaluation(job=JOB, model="smollm2", version=VERSION, profile="edge-small", recipe="int4"),
        c.EvaluationFiles(report=_file("job.json", REPORT), pictures=(_file("front.png", REPORT),)),
    ),
    (
        c.VerifyEvaluation(report=digest("c"), model="smollm2", version=VERSION, profile="edge-small", recipe="int4"),
        Verification(
            agrees=False,
            figures=(Figure(name="kl", reported=0.12, found=0.15, agrees=False),),
            differing=("text/evaluation.txt",),
            tools=("torch 2.13.0 → 2.14.0",),
        ),
    ),
    (
        c.FetchPackage(gateway_id="gw-1", manifest=digest("d"), have=(digest("9"),)),
        c.PackageFiles(
            manifest=_file("manifest.json", MANIFEST),
            signature=_file("model.sig", SIGNED),
            files=(_file("golden.jsonl", GOLDEN),),
            route=(DeltaStep(base=digest("9"), target=digest("d"), delta=DELTA, url="http://s3.example/delta"),),
        ),
    ),
    (
        c.FetchMetadata(gateway_id="gw-1", file="7.model-smollm2.json"),
        c.MetadataFile(file="7.model-smollm2.json", content="eyJzaWduZWQiOiB7fX0="),
    ),
    (
        c.ExportPackage(**_ASKED),
        c.PackageExport(
            **_PACKAGE,
            manifest_file=_file("manifest.json", MANIFEST),
            config_file=_file("config.json", CONFIG),
            signature_file=_file("model.sig", SIGNED),
            files=(_file("golden.jsonl", GOLDEN),),
        ),
    ),
    (
        c.WithdrawPackage(
            **_ASKED,
            reason="superseded by 1.0.2",
            even_if_running=True,
            dry_run=True,
        ),
        c.Withdrawal(
            **_PACKAGE,
            deltas=2,
            deltas_bytes=1_400_000,
            running=1,
            dry_run=True,
        ),
    ),
    (
        c.PrepareBundle(blueprint="edge-chat", have=(digest("9"),)),
        c.BundleContents(
            blueprint="edge-chat",
            plan="eyJwYXlsb2FkIjogIiJ9",
            timestamp="eyJzaWduZWQiOiB7fX0=",
            metadata=("1.root.json", "7.model-smollm2.json"),
            packages=(
                c.PackageFiles(
                    manifest=_file("manifest.json", MANIFEST), signature=_file("model.sig", SIGNED), files=()
                ),
            ),
        ),
    ),
    (
        c.EnrolGateway(
            gateway_id="gw-1",
            blueprint="edge-chat",
            labels={"ring": "canary"},
            public_key=PUBLIC_KEY,
            token="site-token",
        ),
        _ENROLMENT,
    ),
    (c.RenewCredential(gateway_id="gw-1", public_key=PUBLIC_KEY), _ENROLMENT),
    (
        c.RenewExpiredCredential(gateway_id="gw-1", public_key=PUBLIC_KEY, signed_at=AT, signature="c2ln"),
        _ENROLMENT,
    ),
    (c.RevokeGateway(gateway_id="gw-1", reason="stolen"), _GATEWAY_VIEW),
    (c.ReenrolGateway(gateway_id="gw-1", within_s=3600.0, same_key=True), _GATEWAY_VIEW),
    (c.MoveGateway(gateway_id="gw-1", blueprint="kiosk"), _GATEWAY_VIEW),
    (
        c.RemoveGateway(gateway_id="gw-1", reason="scrapped"),
        c.GatewayRemoval(gateway_id="gw-1", blueprint="edge-chat", at=AT),
    ),
    (
        c.AddUser(user="alice", role=Role.OPERATOR, public_key=PUBLIC_KEY),
        c.UserCredential(user="alice", role=Role.OPERATOR, jwt="eyJ0eXAiOiJKV1QifQ.e30.c2ln", expires_at=LATER),
    ),
    (
        c.RenewUser(),
        c.UserCredential(user="alice", role=Role.OPERATOR, jwt="eyJ0eXAiOiJKV1QifQ.e30.c2ln", expires_at=LATER),
    ),
    (c.RevokeUser(user="alice", reason="left"), _USER_VIEW),
    (c.ListUsers(limit=1, cursor="al"), c.UserList(users=(_USER_VIEW,), cursor="alice")),
    (c.ApplyBlueprint(spec=BLUEPRINT), _BLUEPRINT_VIEW),
    (c.StartRollout(blueprint="edge-chat", version=VERSION, stages=BLUEPRINT.stages), _ROLLOUT_VIEW),
    (c.PauseRollout(blueprint="edge-chat", reason="lunch"), _ROLLOUT_VIEW),
    (c.ResumeRollout(blueprint="edge-chat", reason="lunch is over"), _ROLLOUT_VIEW),
    (c.AbortRollout(blueprint="edge-chat", reason="wrong version"), _ROLLOUT_VIEW),
    (c.RollbackRollout(blueprint="edge-chat", reason="users complain"), _ROLLOUT_VIEW),
    (
        c.ListRollouts(blueprint="edge-chat", under_way=True, limit=1, cursor="WyJyb2xsb3V0cyIsIDIuMCwgImIiXQ"),
        c.RolloutList(rollouts=(_ROLLOUT_VIEW,), cursor="WyJyb2xsb3V0cyIsIDEuMCwgImEiXQ"),
    ),
    (
        c.ListHistory(blueprint="edge-chat", limit=1, cursor=8),
        c.History(
            entries=(
                c.HistoryEntry(
                    at=AT,
                    event="slmops.rollout.paused.v1",
                    actor="person:alice",
                    rollout="edge-chat-2",
                    reason="lunch",
                ),
            ),
            cursor=7,
        ),
    ),
    (
        c.ListBlueprints(limit=1, cursor="WyJibHVlcHJpbnRzIiwgImEiXQ"),
        c.BlueprintList(blueprints=(_BLUEPRINT_VIEW,), cursor="WyJibHVlcHJpbnRzIiwgImIiXQ"),
    ),
    (
        c.ListGateways(
            gateway_id="gw-1",
            blueprint="edge-chat",
            standing=c.Standing.MOVING,
            labels={"ring": "canary"},
            phase=e.UpdatePhase.FAILED,
            version=BEFORE,
            online=True,
            silent_for_s=3600.0,
            attention=(c.Attention.FAILED,),
            limit=1,
            cursor="WyJnYXRld2F5cyIsICJndy0wIl0",
        ),
        c.GatewayList(gateways=(_GATEWAY_VIEW,), cursor="WyJnYXRld2F5cyIsICJndy0xIl0", total=2),
    ),
    (
        c.SummarizeFleet(blueprint="edge-chat"),
        c.FleetSummary(
            gateways=5,
            online=4,
            offline=1,
            standing=c.Tally(counts={"enrolled": 5, "revoked": 1}),
            phase=c.Tally(counts={"committed": 4, "failed": 1}),
            version=c.Tally(counts={VERSION: 3}, others=2),
            blueprint=c.Tally(counts={"edge-chat": 5}),
            profile=c.Tally(counts={"edge-small": 5}),
            attention=c.Tally(counts={reason.value: int(reason is c.Attention.FAILED) for reason in c.Attention}),
            at=AT,
        ),
    ),
)
