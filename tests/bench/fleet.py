"""`make bench-fleet`: what a fleet of simulated gateways costs, against the real rollout and telemetry services.

Prints tables, draws plots and writes build/bench/fleet.json; all details are in build/bench/fleet/PART.json. Parts that
were measured with the same options are not repeated, so an interrupted run continues.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import sys
from collections.abc import Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench import fleet_offline, fleet_plots
from bench.fleet_backlog import measure_batches, measure_reports
from bench.fleet_connections import measure_presence
from bench.fleet_deployment import deployment
from bench.fleet_figures import figures_of, show
from bench.fleet_rollout import assemble, measure
from bench.run import OUT, machine, run_to_exit_code
from rich.console import Console

from slmops.local.demo.story import Step, Story

PARTS = OUT / "fleet"
SMALLER = (1_000, 10_000)
"""Sizes of fleets that are compared with the whole one."""
Figures = dict[str, Any]
Save = Callable[[Figures], None]


async def measure_offline(gateways: int, step: Step, save: Save) -> None:
    save(await fleet_offline.measure(gateways, step.progress))


async def measure_fleet(gateways: int, database: str | None, telemetry: bool, step: Step, save: Save) -> None:
    """Rolls out to gateways that share a few connections; then works off what waited while a service was stopped."""
    async with _scratch(f"fleet-{gateways}") as folder, deployment(folder, database) as deployed:
        fleet = await assemble(deployed, gateways, step.progress)
        try:
            found = await measure(fleet, "2.0.0")
            save(found)
            if telemetry:
                save(found := found | {"telemetry": await measure_batches(fleet)})
            save(found | await measure_reports(fleet, "3.0.0"))
        finally:
            await fleet.simulator.stop()


async def measure_connections(gateways: int, database: str | None, step: Step, save: Save) -> None:
    """Rolls out to gateways that enrolled by the command and have a connection each; then all of them say hello."""
    async with _scratch("connections") as folder, deployment(folder, database) as deployed:
        fleet = await assemble(deployed, gateways, step.progress, own_wires=True)
        try:
            found = await measure(fleet, "2.0.0")
            save(found)
            save(found | await measure_presence(fleet))
        finally:
            await fleet.simulator.stop()


async def measure_idle(step: Step, save: Save) -> None:
    """Measures a real gateway that has nothing to do, with the benchmark of `bench.idle`, if this release has it."""
    if find_spec("bench.idle") is None:
        step.progress("this release has no benchmark of an idle gateway")
        return
    found = await asyncio.to_thread(import_module("bench.idle").idle_bytes_per_s)
    save(found | {"bytes_per_idle_gateway_per_s": round(found["bytes_per_s"], 2)})


@asynccontextmanager
async def _scratch(name: str) -> Any:
    folder = OUT / "scratch" / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


Part = Callable[[Step, Save], Awaitable[None]]


def parts_of(options: argparse.Namespace) -> dict[str, tuple[Figures, Part]]:
    """Returns the parts by name, the quick ones first: what was asked for, and what measures it."""
    database = options.database
    sizes = [*(size for size in SMALLER if size < options.gateways), options.gateways]
    found: dict[str, tuple[Figures, Part]] = {
        "offline": ({"gateways": options.offline}, partial(measure_offline, options.offline)),
        "idle": ({}, measure_idle),
        "connections": (
            {"gateways": options.connections, "database": database},
            partial(measure_connections, options.connections, database),
        ),
    }
    for size in sizes:
        whole = size == options.gateways
        asked = {"gateways": size, "database": database, "telemetry": whole}
        found[f"fleet-{size}"] = asked, partial(measure_fleet, size, database, whole)
    return found


async def run(options: argparse.Namespace, story: Story) -> None:
    """Measures what is missing, within the time. Raises `TimeoutError` if that was not enough."""
    if options.fresh:
        shutil.rmtree(PARTS, ignore_errors=True)
    PARTS.mkdir(parents=True, exist_ok=True)
    parts = parts_of(options)
    if unknown := set(options.only) - set(parts):
        raise SystemExit(f"unknown parts: {', '.join(sorted(unknown))}; there are {', '.join(parts)}")
    async with asyncio.timeout(options.minutes * 60):
        for name, (asked, part) in parts.items():
            if name not in options.only if options.only else _measured(name, asked):
                continue
            with story.step(name, f"Measuring: {name}") as step:
                load = os.getloadavg()[0]
                (PARTS / f"{name}.json").unlink(
                    missing_ok=True
                )  # if it fails, older figures must not look like new ones
                save = partial(_save, name, asked | {"machine": machine() | {"load_before": load}})
                await part(step, save)
                _finish(name)


def _measured(name: str, asked: Mapping[str, Any]) -> bool:
    kept = read(name)
    return (
        bool(kept)
        and bool(kept.get("finished"))
        and all(kept["asked"].get(key) == value for key, value in asked.items())
    )


def read(name: str) -> Figures:
    file = PARTS / f"{name}.json"
    found: Figures = json.loads(file.read_text()) if file.exists() else {}
    return found


def _save(name: str, asked: Figures, figures: Figures) -> None:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    _write(PARTS / f"{name}.json", {"asked": asked, "at": now, "figures": figures})


def _finish(name: str) -> None:
    if kept := read(name):
        _write(PARTS / f"{name}.json", kept | {"finished": True})


def _write(path: Path, content: Figures) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def summarize(options: argparse.Namespace, console: Console) -> None:
    """Writes and shows what is measured so far."""
    measured = {name: kept["figures"] for name in parts_of(options) if (kept := read(name))}
    figures = figures_of(measured, options.gateways)
    _write(OUT / "fleet.json", figures)
    sizes = [measured[name] for name in measured if name.startswith("fleet-")]
    plots = fleet_plots.write(OUT, sizes, measured.get("offline"))
    show(figures, measured, console)
    console.print(f"figures: {OUT / 'fleet.json'}; {len(plots)} plots beside it; details: {PARTS}", highlight=False)


async def main(options: argparse.Namespace) -> int:
    console = Console()
    if not console.is_terminal:
        console.width = 140  # a log has no width
    try:
        code = await run_to_exit_code(run(options, Story(console)), console, "run it again to continue.")
    except TimeoutError:
        console.print(f"[yellow]{options.minutes:g} minutes are over; run it again to continue.[/]", highlight=False)
        code = 1
    summarize(options, console)
    return code


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gateways", type=int, default=100_000, help="size of the whole fleet")
    parser.add_argument("--connections", type=int, default=5_000, help="gateways with a connection each")
    parser.add_argument("--offline", type=int, default=1_000_000, help="gateways that resolve a plan offline")
    parser.add_argument("--minutes", type=float, default=120, help="stop after this time")
    parser.add_argument("--only", nargs="+", default=[], metavar="PART", help="measure these parts again, and no other")
    parser.add_argument("--fresh", action="store_true", help="discard earlier results")
    parser.add_argument("--database", help="URL of a PostgreSQL server; default: SQLite files")
    return parser


if __name__ == "__main__":
    sys.exit(asyncio.run(main(arguments().parse_args())))
