"""The results of the demo: the JSON report with its failures, and the closing tables."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field
from rich.console import Console
from rich.table import Table

from slmops.contracts.commands import RolloutView, VariantView, VersionView
from slmops.local.demo.traces import TraceSummary


class ModelReport(BaseModel):
    name: str
    version: str
    digest: str


class VariantReport(BaseModel):
    version: str
    recipe: str
    digest: str | None
    bytes: int | None
    kl: float | None
    top1: float | None
    ppl: float | None
    tokens_per_s: float | None
    ttft_s: float | None
    peak_rss_bytes: int | None
    gate: str
    reason: str

    @classmethod
    def of(cls, view: VariantView) -> VariantReport:
        figures = view.evaluation.model_dump() if view.evaluation else {}
        wanted = {name: figures.get(name) for name in cls.model_fields if name in figures}
        absent = {name: None for name in cls.model_fields if name not in wanted}
        return cls.model_validate(
            {**absent, **wanted, "version": view.version, "recipe": view.recipe, "digest": view.digest}
            | {"gate": view.gate, "reason": view.reason}
        )


class RolloutReport(BaseModel):
    version: str
    outcome: str
    stages: int
    seconds: float


class GatewayReport(BaseModel):
    id: str
    version: str | None
    answer: str
    tokens_per_s: float
    failed_requests: int


class Report(BaseModel):
    """`build/demo/report.json`."""

    model: ModelReport | None = None
    variants: list[VariantReport] = Field(default_factory=list)
    rollouts: list[RolloutReport] = Field(default_factory=list)
    gateways: list[GatewayReport] = Field(default_factory=list)
    timings_s: dict[str, float] = Field(default_factory=dict)
    trace: TraceSummary | None = None
    failures: list[str] = Field(default_factory=list)

    def add_version(self, view: VersionView) -> None:
        self.variants += [VariantReport.of(variant) for variant in view.variants]

    def add_rollout(self, view: RolloutView) -> None:
        ended = view.ended_at or view.started_at
        self.rollouts.append(
            RolloutReport(
                version=view.version,
                outcome=view.state,
                stages=view.stage + 1,
                seconds=round((ended - view.started_at).total_seconds(), 2),
            )
        )

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.model_dump_json(indent=2) + "\n")


def show(report: Report, console: Console) -> None:
    """Prints the closing tables."""
    for table in (_variants(report), _rollouts(report), _gateways(report), _timings(report)):
        console.print(table)
    if report.trace:
        services = ", ".join(report.trace.services)
        console.print(f"trace {report.trace.trace_id}: {report.trace.spans} spans across {services}", highlight=False)


def _variants(report: Report) -> Table:
    table = Table(
        "version", "recipe", "MB", "KL", "top-1", "ppl", "tok/s", "ttft s", "RSS MB", "gate", title="Variants"
    )
    for v in report.variants:
        colour = "green" if v.gate == "passed" else "red"
        table.add_row(
            *(v.version, v.recipe, _mb(v.bytes), _figure(v.kl), _figure(v.top1), _figure(v.ppl)),
            *(_figure(v.tokens_per_s), _figure(v.ttft_s), _mb(v.peak_rss_bytes), f"[{colour}]{v.gate}"),
        )
    return table


def _rollouts(report: Report) -> Table:
    table = Table("version", "outcome", "stages", "seconds", title="Rollouts")
    for r in report.rollouts:
        table.add_row(r.version, r.outcome, str(r.stages), f"{r.seconds:.1f}")
    return table


def _gateways(report: Report) -> Table:
    table = Table("gateway", "version", "answer", "tok/s", "failed requests", title="Gateways")
    for g in report.gateways:
        table.add_row(g.id, g.version or "-", g.answer, f"{g.tokens_per_s:.1f}", str(g.failed_requests))
    return table


def _timings(report: Report) -> Table:
    table = Table("step", "seconds", title="Timings")
    for step, seconds in report.timings_s.items():
        table.add_row(step, f"{seconds:.1f}")
    return table


def _mb(value: int | None) -> str:
    return "-" if value is None else f"{value / 1e6:.1f}"


def _figure(value: Any) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.3g}"
