"""One example of everything that crosses the wire. Every field is set, so the golden file shows each field."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from pydantic import BaseModel

from slmops.contracts import events as e
from slmops.contracts.blueprint import Blueprint, Stage
from slmops.contracts.descriptor import Descriptor
from slmops.contracts.errors import Problem
from slmops.contracts.evaluation import Evaluation
from slmops.contracts.freshness import GatewayPresence
from slmops.contracts.identity import Role
from slmops.contracts.jobs import OptimizeJob, Predecessor
from slmops.contracts.manifest import (
    DATASET,
    FILE_PATH,
    MODEL_CONFIG,
    OCI_MANIFEST,
    SIGNATURE,
    WEIGHT,
    Manifest,
)
from slmops.contracts.manifest import DELTA as DELTA_TYPE
from slmops.contracts.manifest import JOB_REPORT as JOB_REPORT_TYPE
from slmops.contracts.measurement import CohortWindow, MeasurementBatch
from slmops.contracts.model import ModelFile
from slmops.contracts.plan import Candidate, Overlay, Plan, Release
from slmops.contracts.profile import EDGE_SMALL
from slmops.contracts.prompts.evaluation_data import EvaluationData
from slmops.contracts.recipe import PassSpec, Recipe
from slmops.contracts.search import SearchSpec
from slmops.contracts.signed import PlanSignature, PlanStatement, SignedPlan
from slmops.contracts.tuf_names import KeyValue, RolloutKeys, TrustedKey

AT = datetime(2026, 1, 2, 3, 4, 5, 678000, tzinfo=UTC)
LATER = datetime(2026, 1, 2, 3, 4, 35, tzinfo=UTC)
TRACEPARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
VERSION, BEFORE = "1.0.1", "1.0.0"
PUBLIC_KEY = "U" + "A" * 55
BECAUSE = "int4: 3.1 × smaller, KL 0.12 ≤ 0.5"


def digest(letter: str) -> str:
    return "sha256:" + letter * 64


def release(version: str = VERSION, letter: str = "d") -> Release:
    return Release(
        revision=2,
        model="smollm2",
        version=version,
        manifest=MANIFEST if letter == "d" else MANIFEST.model_copy(update={"digest": digest(letter)}),
        signature=SIGNED,
        size_bytes=86_000_000,
        min_tokens_per_s=3.0,
        max_rss_bytes=1_000_000_000,
    )


WEIGHTS = ModelFile(path="onnx/model.onnx", digest=digest("a"), size_bytes=86_000_000)
QUESTIONS = ModelFile(path="golden.jsonl", digest=digest("b"), size_bytes=120)
GOLDEN = Descriptor(media_type=DATASET, digest=digest("b"), size=120, annotations={FILE_PATH: "golden.jsonl"})
REPORT = Descriptor(media_type="application/json", digest=digest("c"), size=2048)
JOB_REPORT = Descriptor(media_type=JOB_REPORT_TYPE, digest=digest("6"), size=8192)
MANIFEST = Descriptor(media_type=OCI_MANIFEST, digest=digest("d"), size=1234)
KEY = TrustedKey(keyid="ab" * 32, keytype="ed25519", scheme="ed25519", keyval=KeyValue(public="cd" * 32))
DELTA = Descriptor(media_type=DELTA_TYPE, digest=digest("8"), size=675_432)
CONFIG = Descriptor(media_type=MODEL_CONFIG, digest=digest("1"), size=321)
SIGNED = Descriptor(media_type=SIGNATURE, digest=digest("e"), size=4321)
EVALUATION = Evaluation(
    bytes=86_000_000,
    kl=0.12,
    kl_low=0.11,
    kl_high=0.14,
    top1=0.83,
    top1_low=0.81,
    top1_high=0.85,
    ppl=21.5,
    ppl_low=19.75,
    ppl_high=23.25,
    reference_ppl=20.25,
    tokens_per_s=80.5,
    ttft_s=0.15,
    peak_rss_bytes=222_000_000,
    tasks={"everyday": 0.85},
    golden_passed=3,
    golden_total=4,
    repetition=0.25,
    joules_per_token=0.05,
    joules_source="modelled",
)
PROBLEM = Problem(
    code="inference_failed", what="the probe failed", where="golden prompt 1", fix="Push another version."
)
RECIPE = Recipe(
    name="mine",
    description="Coarse and small.",
    passes=(PassSpec(pass_="quantize", params={"bits": 4, "block": 64}), PassSpec(pass_="pack", params={})),
)
SEARCH = SearchSpec(budget=timedelta(minutes=30), max_trials=12, prefer="smallest")
JOB = "5f0c9d5e-5b1e-5c0a-9d7c-0a1b2c3d4e5f"
CANARY = Stage(name="canary", percent=10, selector={"ring": "canary"})
BLUEPRINT = Blueprint(name="edge-chat", model="smollm2", stages=(CANARY, Stage(name="fleet")))
WINDOW = CohortWindow(
    blueprint="edge-chat",
    release=digest("d"),
    version=VERSION,
    started_at=AT,
    ended_at=LATER,
    gateways=3,
    requests=120,
    failed_requests=1,
    golden_passed=30,
    golden_failed=1,
    completion_tokens=2400,
    decode_seconds=30.5,
    ttft_seconds=12.25,
)
_VARIANT: dict[str, Any] = {
    "job": "smollm2-1.0.1-edge-small",
    "model": "smollm2",
    "version": VERSION,
    "profile": "edge-small",
}
_ROLLOUT: dict[str, Any] = {"blueprint": "edge-chat", "rollout": "edge-chat-2", "at": AT}
MEASURED = {"tokens_per_s": 80.5, "ttft_s": 0.15}

OWN_DATA = EvaluationData(
    texts=(ModelFile(path="texts/support.jsonl", digest=digest("7"), size_bytes=52_000),),
    calibration_texts=(ModelFile(path="calibration/manual.txt", digest=digest("6"), size_bytes=900_000),),
    tasks=(ModelFile(path="tasks/products.jsonl", digest=digest("5"), size_bytes=8_000),),
)

EVENTS: tuple[e.Event, ...] = (
    e.ModelVersionRegistered(
        model="smollm2",
        version=VERSION,
        digest=digest("f"),
        format="gguf",
        architecture="llama",
        files=(WEIGHTS, QUESTIONS),
        golden=GOLDEN,
        data=OWN_DATA,
        at=AT,
    ),
    e.ModelAliasMoved(model="smollm2", alias="stable", version=VERSION, previous=BEFORE, at=AT),
    e.ModelVersionRetired(model="smollm2", version=BEFORE, reason="superseded by 1.0.1", at=AT),
    e.VariantStarted(**_VARIANT, recipes=("int8", "int4"), data=OWN_DATA, at=AT),
    e.VariantProgressed(**_VARIANT, step="int4: quantize", done=1, of=4, at=AT),
    e.VariantOptimized(
        **_VARIANT,
        recipe="int4",
        digest=digest("f"),
        files=(WEIGHTS,),
        evaluation=EVALUATION,
        report=REPORT,
        job_report=JOB_REPORT,
        golden=GOLDEN,
        chosen=True,
        reason=BECAUSE,
        at=AT,
    ),
    e.VariantRejected(
        **_VARIANT,
        recipe="int8",
        digest=digest("f"),
        evaluation=EVALUATION,
        report=REPORT,
        job_report=JOB_REPORT,
        problem=PROBLEM,
        reason="160 MB are allowed, it has 170 MB",
        at=AT,
    ),
    e.PackagePublished(
        model="smollm2",
        version=VERSION,
        profile="edge-small",
        recipe="int4",
        variant=digest("f"),
        manifest=MANIFEST,
        signature=SIGNED,
        size_bytes=86_000_120,
        at=AT,
    ),
    e.PackageDeltaPublished(
        model="smollm2",
        version=VERSION,
        base=digest("9"),
        target=MANIFEST.digest,
        delta=DELTA,
        full_bytes=86_000_120,
        at=AT,
    ),
    e.PackageWithdrawn(
        model="smollm2",
        version=BEFORE,
        profile="edge-small",
        manifest=digest("9"),
        signature=digest("8"),
        reason="superseded by 1.0.1",
        at=AT,
    ),
    e.PackageDeltaWithdrawn(
        model="smollm2", version=VERSION, base=digest("9"), target=MANIFEST.digest, delta=DELTA.digest, at=AT
    ),
    e.BlueprintApplied(blueprint="edge-chat", revision=2, spec=BLUEPRINT, at=AT),
    e.RolloutStarted(**_ROLLOUT, candidate=release(), stable=release(BEFORE, "9"), stages=BLUEPRINT.stages),
    e.RolloutStageAdvanced(**_ROLLOUT, stage=1, reason="1 of 1 gateways committed"),
    e.RolloutHeld(**_ROLLOUT, stage=0, reason="no data for 600 s"),
    e.RolloutPaused(**_ROLLOUT),
    e.RolloutResumed(**_ROLLOUT),
    e.RolloutCompleted(**_ROLLOUT, reason="3 of 3 gateways committed"),
    e.RolloutAborted(**_ROLLOUT, reason="asked by the operator"),
    e.RolloutRolledBack(**_ROLLOUT, reason="gw-1: the probe failed", restored=release(BEFORE, "9")),
    e.GatewayEnrolled(
        gateway_id="gw-1",
        blueprint="edge-chat",
        public_key=PUBLIC_KEY,
        labels={"ring": "canary"},
        enrolment=2,
        moved_from="kiosk",
        expires_at=LATER,
        at=AT,
    ),
    e.GatewayMoved(gateway_id="gw-1", previous="kiosk", blueprint="edge-chat", at=AT),
    e.GatewayReenrolmentAllowed(gateway_id="gw-1", until=LATER, same_key=True, at=AT),
    e.GatewayRemoved(gateway_id="gw-1", blueprint="edge-chat", reason="scrapped", at=AT),
    e.GatewayRevoked(
        gateway_id="gw-1", public_key=PUBLIC_KEY, revoked_at=LATER, reason="stolen from the van", expires_at=LATER
    ),
    e.GatewayReported(
        gateway_id="gw-1",
        blueprint="edge-chat",
        enrolment=2,
        sequence=7,
        boot="f00dcafe00000001",
        labels={"ring": "canary"},
        phase=e.UpdatePhase.FAILED,
        running=digest("9"),
        running_version=BEFORE,
        target=digest("d"),
        problem=PROBLEM,
        plan_generation=3,
        measured=MEASURED,
        dropped_reports=40,
        dropped_measurements=2,
        at=AT,
    ),
    e.UserAdded(user="alice", role=Role.OPERATOR, public_key=PUBLIC_KEY, expires_at=LATER, at=AT),
    e.UserRenewed(user="alice", expires_at=LATER, at=AT),
    e.UserRevoked(user="alice", public_key=PUBLIC_KEY, reason="left", at=AT),
    e.CohortMeasured(blueprint="edge-chat", window=WINDOW, at=AT),
)

DOCUMENTS: dict[str, BaseModel] = {
    "presence": GatewayPresence(enrolment=2, sequence=17),
    "measure": MeasurementBatch(
        batch_id="gw-1/17",
        gateway_id="gw-1",
        blueprint="edge-chat",
        release=digest("d"),
        version=VERSION,
        started_at=AT,
        ended_at=LATER,
        requests=40,
        synthetic_requests=10,
        failed_requests=1,
        golden_passed=10,
        golden_failed=0,
        prompt_tokens=900,
        completion_tokens=800,
        decode_seconds=10.5,
        ttft_seconds=4.25,
        peak_rss_bytes=222_000_000,
        boot="5f2b1c0de8a94a6f",
        sequence=17,
    ),
    "jobs.optimize": OptimizeJob(
        model="smollm2",
        version=VERSION,
        digest=digest("f"),
        format="gguf",
        files=(WEIGHTS, QUESTIONS),
        golden=GOLDEN,
        profile=EDGE_SMALL,
        recipes=("int8", "mine"),
        definitions=(RECIPE,),
        search=SEARCH,
        predecessor=Predecessor(version=BEFORE, recipe="int4", variant=digest("9"), manifest=MANIFEST),
        data=OWN_DATA,
        asked="1d2c3b4a-5968-4776-8594-a3b2c1d0e0f0",
        actor="person:alice",
    ),
    "plan": Plan(
        blueprint="edge-chat",
        generation=3,
        stable=release(BEFORE, "9"),
        candidate=Candidate(rollout="edge-chat-2", release=release(), stages=BLUEPRINT.stages, stage=1),
        previous=release("0.9.0", "8"),
        traceparent=TRACEPARENT,
    ),
    "plan-statement": PlanStatement(
        plan=Plan(blueprint="edge-chat", generation=3, stable=release(BEFORE, "9")),
        signed_at=AT,
        expires_at=AT + timedelta(days=7),
    ),
    "plan-signed": SignedPlan(
        payload="eyJwbGFuIjoge319",
        signatures=(PlanSignature(keyid=KEY.keyid, sig="c2lnbmF0dXJl"),),
    ),
    "rollout-keys": RolloutKeys(keys=(KEY,)),
    "overlay": Overlay(gateway_id="gw-1", blueprint="kiosk", pinned_to_stable=True, max_tokens=64, set_by="operator"),
    "manifest": Manifest(
        config=Descriptor(media_type=MODEL_CONFIG, digest=digest("1"), size=321),
        layers=(
            Descriptor(
                media_type=WEIGHT, digest=digest("a"), size=86_000_000, annotations={FILE_PATH: "onnx/model.onnx"}
            ),
            GOLDEN,
        ),
        annotations={"org.opencontainers.image.version": VERSION},
    ),
    "problem": PROBLEM,
}
"""Documents that are neither events nor commands, by the name of their golden file."""
