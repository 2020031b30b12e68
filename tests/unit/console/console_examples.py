"""Example views as services return them, and a function that runs the command line."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from slmops.console import settings
from slmops.console.app import build
from slmops.contracts.blueprint import Blueprint
from slmops.contracts.commands import (
    BlueprintView,
    GatewayView,
    PackageView,
    RolloutView,
    StageView,
    VariantView,
    VersionView,
)
from slmops.contracts.descriptor import Descriptor, digest_of
from slmops.contracts.errors import Problem
from slmops.contracts.evaluation import Evaluation
from slmops.contracts.events import UpdatePhase
from slmops.kit.bus.deadletters import DeadLetter

NOW = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
AT = NOW - timedelta(minutes=5)


def nothing_set_up(monkeypatch: pytest.MonkeyPatch, nowhere: Path) -> None:
    """Hides any system on this machine: no environment variables, no data folder, an address without a server."""
    for name in ("SLMOPS_NATS_CREDS", "SLMOPS_DATA", "SLMOPS_TRACE_FILE", "TRACEPARENT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLMOPS_NATS_URL", "nats://127.0.0.1:1")
    monkeypatch.setattr(settings, "DEFAULT_DATA", nowhere)


def slmops(*arguments: str, stdin: str | None = None, app: typer.Typer | None = None) -> Result:
    return CliRunner().invoke(app or build(), list(arguments), input=stdin, prog_name="slmops")


def variant(recipe: str = "int4-k-quant", *, chosen: bool = True) -> VariantView:
    evaluation = Evaluation(
        bytes=86_000_000,
        kl=0.0391,
        kl_low=0.0372,
        kl_high=0.0411,
        top1=0.912,
        ppl=31.4,
        tokens_per_s=91.2,
        ttft_s=0.123,
        peak_rss_bytes=222_000_000,
    )
    return VariantView(
        model="smollm2",
        version="1.0.0",
        profile="edge-small",
        recipe=recipe,
        digest=digest_of(recipe.encode()),
        gate="passed" if chosen else "refused",
        chosen=chosen,
        reason="fastest of the two that pass" if chosen else "KL 0.612 is over 0.5, [red]top-1[/red] 48% is below 60%",
        evaluation=evaluation,
    )


def version() -> VersionView:
    manifest = Descriptor.of(b"manifest", "application/json")
    package = PackageView(
        profile="edge-small", recipe="int4-k-quant", manifest=manifest, signature=manifest, size_bytes=86_100_000, at=AT
    )
    return VersionView(
        model="smollm2",
        version="1.0.0",
        digest=digest_of(b"1.0.0"),
        format="gguf",
        architecture="llama",
        size_bytes=98_362_432,
        state="registered",
        stage="packaged",
        at=AT,
        aliases=("stable",),
        variants=(variant(), variant("int8", chosen=False)),
        packages=(package,),
    )


def blueprint() -> BlueprintView:
    return BlueprintView(revision=3, spec=Blueprint(name="edge-chat", model="smollm2"), at=AT)


def rollout(state: str = "running") -> RolloutView:
    ended = state in ("completed", "rolled_back", "aborted")
    return RolloutView(
        rollout="edge-chat-r3-smollm2-1-0-1",
        blueprint="edge-chat",
        state=state,
        version="1.0.1",
        model="smollm2",
        stage=0,
        stages=(
            StageView(name="canary", targets=1, failed=1, waiting="" if ended else "gw-1 to commit"),
            StageView(name="fleet", targets=3, waiting="" if ended else "the stage before it"),
        ),
        reason="gw-1: 0 of 5 golden prompts pass" if ended else "",
        started_at=AT,
        ended_at=NOW if ended else None,
    )


def gateway(gateway_id: str = "gw-1", problem: str | None = None) -> GatewayView:
    return GatewayView(
        gateway_id=gateway_id,
        blueprint="edge-chat",
        labels={"ring": "canary"},
        phase=UpdatePhase.FAILED if problem else UpdatePhase.COMMITTED,
        running=digest_of(b"1.0.0"),
        running_version="1.0.0",
        desired=digest_of(b"1.0.1" if problem else b"1.0.0"),
        desired_because={"release": "plan: stable, no rollout under way"},
        problem=Problem(code="inference_failed", what=problem) if problem else None,
        measured={"tokens_per_s": 80.2, "ttft_s": 0.2},
        plan_generation=4,
        last_seen=NOW - timedelta(seconds=3),
    )


def dead_letter(reason: str = "the payload does not validate: model: Field required") -> DeadLetter:
    return DeadLetter(
        sequence=17,
        subject="slmops.model.version_registered.v1",
        consumer="optimizer/slmops.model.version_registered.v1",
        code="invalid_message",
        reason=reason,
        at=AT,
        size_bytes=15,
        payload=b'{"secret":"yes"}',
        headers={},
    )
