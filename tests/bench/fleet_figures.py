"""The figures of `make bench-fleet` in one document, and in a table beside what they should be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

Figures = Mapping[str, Any]


def figures_of(parts: Mapping[str, Figures], gateways: int) -> dict[str, Any]:
    """Returns the content of fleet.json. What was not measured is None."""
    whole = parts.get(f"fleet-{gateways}", {})
    sizes = [part for name, part in parts.items() if name.startswith("fleet-")]
    telemetry = whole.get("telemetry", {})
    enrolled = parts.get("connections") or whole
    return {
        "gateways": whole.get("gateways", gateways),
        "writes_per_stage": whole.get("writes_per_stage"),
        "raw_fanout_p99_s": whole.get("raw_fanout_p99_s"),
        "decided_p99_s": whole.get("decided_p99_s"),
        "reports_per_s": whole.get("reports_per_s"),
        "raw_pull_per_s": whole.get("raw_pull_per_s"),
        "cpu_ms_per_report": _by_size(sizes, "cpu_ms_per_report"),
        "judgement_ms": _by_size(sizes, "judgement_ms"),
        "measurement_batches_per_s": telemetry.get("measurement_batches_per_s"),
        "samples_per_s": telemetry.get("samples_per_s"),
        "reports_lost": whole.get("reports_lost"),
        "bytes_per_idle_gateway_per_s": parts.get("idle", {}).get("bytes_per_idle_gateway_per_s"),
        "hub_bytes_per_gateway": whole.get("hub_bytes_per_gateway"),
        "rollout_s": whole.get("rollout_s"),
        "enrolments_per_s": enrolled.get("enrolments_per_s"),
    }


def _by_size(sizes: list[Figures], figure: str) -> dict[str, Any]:
    return {str(part["gateways"]): part[figure] for part in sizes if part.get(figure) is not None}


class Row(NamedTuple):
    """A figure and its bound. `value` and `good` raise an error if something was not measured."""

    what: str
    unit: str
    value: Callable[[Figures], Any]
    wanted: str
    good: Callable[[Figures], bool] | None = None


ROWS = (
    Row("writes of the plan per stage", "", lambda f: f["writes_per_stage"], "1", lambda f: f["writes_per_stage"] == 1),
    Row("raw fan-out to 99%", "s", lambda f: f["raw_fanout_p99_s"], ""),
    Row(
        "99% have decided",
        "s",
        lambda f: f["decided_p99_s"],
        "2 x the raw fan-out at most",
        lambda f: f["decided_p99_s"] <= 2 * f["raw_fanout_p99_s"],
    ),
    Row("reports, bare loop", "per s", lambda f: f["raw_pull_per_s"], ""),
    Row(
        "reports, rollout service",
        "per s",
        lambda f: f["reports_per_s"],
        "0.5 x the bare loop and 2,000 at least",
        lambda f: f["reports_per_s"] >= max(2000, 0.5 * f["raw_pull_per_s"]),
    ),
    Row("processor time per report, by gateways", "ms", lambda f: _listed(f["cpu_ms_per_report"]), ""),
    Row(
        "the same, largest fleet against smallest",
        "x",
        lambda f: _growth(f["cpu_ms_per_report"]),
        "1.2 at most",
        lambda f: _growth(f["cpu_ms_per_report"]) <= 1.2,
    ),
    Row(
        "evaluating a gate, by gateways",
        "ms",
        lambda f: _listed(f["judgement_ms"]),
        "50 at most",
        lambda f: max(f["judgement_ms"].values()) <= 50,
    ),
    Row("reports lost", "", lambda f: f["reports_lost"], "0", lambda f: f["reports_lost"] == 0),
    Row(
        "measurement batches, telemetry service",
        "per s",
        lambda f: f["measurement_batches_per_s"],
        "2,000 at least",
        lambda f: f["measurement_batches_per_s"] >= 2000,
    ),
    Row(
        "requests in them",
        "per s",
        lambda f: f["samples_per_s"],
        "80,000 at least",
        lambda f: f["samples_per_s"] >= 80_000,
    ),
    Row(
        "an idle gateway",
        "bytes per s",
        lambda f: f["bytes_per_idle_gateway_per_s"],
        "31 at most (0.25 kbit/s)",
        lambda f: f["bytes_per_idle_gateway_per_s"] <= 31.25,
    ),
    Row(
        "memory of our services per gateway",
        "bytes",
        lambda f: f["hub_bytes_per_gateway"],
        "30,000 at most",
        lambda f: f["hub_bytes_per_gateway"] <= 30_000,
    ),
    Row("the whole rollout", "s", lambda f: f["rollout_s"], ""),
    Row("enrolments by the command", "per s", lambda f: f["enrolments_per_s"], ""),
)


def _listed(by_size: Mapping[str, float]) -> str:
    return ", ".join(f"{int(size):,}: {value:g}" for size, value in by_size.items())


def _growth(by_size: Mapping[str, float]) -> float:
    sizes = sorted(by_size, key=int)
    return round(by_size[sizes[-1]] / by_size[sizes[0]], 2)


def judged(row: Row, figures: Figures) -> tuple[str, bool | None]:
    """Returns a row's value as text, and whether it is good; None: it has no bound, or was not measured."""
    try:
        value = row.value(figures)
        good = row.good(figures) if row.good else None
    except (TypeError, ValueError, IndexError):
        return "not measured", None
    if value is None or value == "":
        return "not measured", None
    return f"{value:,}" if isinstance(value, (int, float)) else str(value), good


def show(figures: Figures, parts: Mapping[str, Figures], console: Console) -> None:
    table = Table(title=f"fleet of {figures['gateways']:,} simulated gateways", title_justify="left")
    for column in ("", "unit"):
        table.add_column(column)
    table.add_column("measured", justify="right")
    table.add_column("wanted")
    table.add_column("")
    for row in ROWS:
        text, good = judged(row, figures)
        mark = {True: "[green]✓[/]", False: "[red]✗[/]", None: ""}[good]
        table.add_row(row.what, row.unit, text, row.wanted, mark)
    console.print(table)
    _show_details(parts, console)


def _show_details(parts: Mapping[str, Figures], console: Console) -> None:
    if offline := parts.get("offline"):
        stages = ", ".join(
            f"{s['percent']:g}%: {s['gateways']:,} (off by {s['off_by_percent']}%)" for s in offline["stages"]
        )
        console.print(
            f"  offline: {offline['gateways']:,} gateways in {offline['seconds']} s, {offline['resolutions_per_s']:,}"
            f" resolutions/s; {stages}",
            highlight=False,
        )
    for name, part in parts.items():
        shown = {key: value for key, value in part.items() if isinstance(value, (int, float)) and key != "gateways"}
        if name != "offline" and shown:
            console.print(f"  {name}: " + ", ".join(f"{key} {value}" for key, value in shown.items()), highlight=False)
