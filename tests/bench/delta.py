"""`make bench-delta`: compares our updates between versions of a real model with common tools.

Prints a table, draws it, and writes build/bench/delta.json. Models and variants are made during the run and kept in
build/bench/cache. `--only a,b` measures some pairs, `--ours` skips the other tools.
"""

from __future__ import annotations

import argparse
import asyncio
import filecmp
import json
import multiprocessing
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from bench import delta_tools
from bench.comparison import Place
from bench.delta_floor import entropy_bytes
from bench.delta_pairs import Pair, Pairs
from bench.run import OUT, machine, run_to_exit_code
from bench.variant import weights
from rich.console import Console
from rich.table import Table

from slmops.kit.delta import apply, by_digest, make
from slmops.local.demo.story import Story

Figures = dict[str, Any]
_ROUNDS = 3


def measure(pair: Pair, scratch: Path) -> Figures:
    """Measures size, exactness, and time and memory of making and applying, each in a separate process."""
    delta = scratch / "ours.delta"
    seconds = [_in_subprocess(_make, pair, delta)[0] for _ in range(_ROUNDS)]
    applied = [_in_subprocess(_apply, pair, delta, scratch / "out") for _ in range(_ROUNDS)]
    target_bytes = sum(path.stat().st_size for path in _files(pair.target))
    return {
        "pair": pair.name,
        "target_bytes": target_bytes,
        "ours_bytes": delta.stat().st_size,
        "entropy_bytes": entropy_bytes(delta),
        "exact": _same(pair.target, scratch / "out"),
        "make_s": round(median(seconds), 2),
        "apply_mb_per_s": round(target_bytes / 1e6 / median(took for took, _ in applied)),
        "peak_extra_bytes": max(memory for _, memory in applied),
    }


def _in_subprocess(work: Any, *arguments: Any) -> tuple[float, int]:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found: tuple[float, int] = pool.apply(work, arguments)
    return found


def _make(pair: Pair, delta: Path) -> tuple[float, int]:
    start = time.perf_counter()
    make(pair.base, pair.target, delta)
    return time.perf_counter() - start, 0


def _apply(pair: Pair, delta: Path, out: Path) -> tuple[float, int]:
    """Returns seconds without waiting for the disk (the other tools do not wait) and memory above the idle process."""
    shutil.rmtree(out, ignore_errors=True)
    bases = by_digest(pair.base)
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before, start = _resident_bytes("VmRSS"), time.perf_counter()
    apply(delta, bases, lambda file: out / file.path, limit_bytes=1 << 40, durable=False)
    return time.perf_counter() - start, _resident_bytes("VmHWM") - before


def _resident_bytes(kind: str) -> int:
    """Returns `VmRSS`, or `VmHWM`, the peak since its last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(kind)).split()[1]) * 1024


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _same(target: Path, out: Path) -> bool:
    paths = [path.relative_to(target) for path in _files(target)]
    return [path.relative_to(out) for path in _files(out)] == paths and all(
        filecmp.cmp(target / path, out / path, shallow=False) for path in paths
    )


def targets(pairs: Sequence[Figures]) -> dict[str, Any]:
    """Returns the targets for the figures."""
    found: dict[str, Any] = {}
    for figures in pairs:
        name, ours = figures["pair"][0], figures["ours_bytes"]
        if name in "ab":
            found[f"{name}_mb"] = round(ours / 1e6, 2)
        if tools := figures.get("tools"):
            best = min(tools, key=lambda tool: tools[tool]["bytes"])
            found[f"{name}_of_best_tool"] = {"tool": best, "share": round(ours / tools[best]["bytes"], 3)}
        if tools and delta_tools.ZSTD in tools:
            found[f"{name}_times_faster_than_zstd"] = round(tools[delta_tools.ZSTD]["make_s"] / figures["make_s"], 1)
        if name == "f" and "full_zstd19_bytes" in figures:
            found["f_of_zstd19"] = round(ours / figures["full_zstd19_bytes"], 4)
    found["slowest_apply_mb_per_s"] = min(figures["apply_mb_per_s"] for figures in pairs)
    found["largest_peak_extra_mb"] = round(max(figures["peak_extra_bytes"] for figures in pairs) / 1e6, 1)
    return found


def show(pairs: Sequence[Figures], console: Console) -> None:
    table = Table(title="SmolLM2-135M-Instruct: bytes of an update, MB", title_justify="left")
    names = [name for figures in pairs for name in figures.get("tools", {})]
    tools = list(dict.fromkeys(names))
    columns = (
        "target",
        "zstd 19",
        "ours",
        "entropy",
        "exact",
        "make s",
        "apply MB/s",
        "peak MB",
        *tools,
        "KL",
        "top-1",
    )
    for column in ("pair", *columns):
        table.add_column(column, justify="left" if column == "pair" else "right", no_wrap=column == "pair")
    for figures in pairs:
        table.add_row(*_row(figures, tools))
    console.print(table)
    console.print(f"targets: {json.dumps(targets(pairs))}", highlight=False)


def _row(figures: Mapping[str, Any], tools: Sequence[str]) -> list[str]:
    def mb(value: int | None) -> str:
        return "" if value is None else f"{value / 1e6:.2f}"

    others = figures.get("tools", {})
    kind = figures.get("fidelity", {})
    return [
        figures["pair"],
        mb(figures["target_bytes"]),
        mb(figures.get("full_zstd19_bytes")),
        f"[bold]{mb(figures['ours_bytes'])}[/]",
        mb(figures["entropy_bytes"]),
        "yes" if figures["exact"] else "[red]no[/]",
        f"{figures['make_s']:.1f}",
        str(figures["apply_mb_per_s"]),
        mb(figures["peak_extra_bytes"]),
        *(f"{mb(others[t]['bytes'])} ({others[t]['make_s']:.0f} s)" if t in others else "" for t in tools),
        f"{kind['kl']:.4f}" if kind else "",
        f"{kind['top1']:.3f}" if kind else "",
    ]


def draw(pairs: Sequence[Figures], out: Path) -> None:
    """Draws bytes by pair and tool on a logarithmic scale."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), layout="constrained")
    axes = figure.subplots()
    series = {"whole, zstd 19": [f.get("full_zstd19_bytes") for f in pairs], "ours": [f["ours_bytes"] for f in pairs]}
    for tool in dict.fromkeys(name for f in pairs for name in f.get("tools", {})):
        series[tool] = [f.get("tools", {}).get(tool, {}).get("bytes") for f in pairs]
    width = 0.8 / len(series)
    for number, (name, values) in enumerate(series.items()):
        places = [place + number * width for place, value in enumerate(values) if value]
        axes.bar(places, [value / 1e6 for value in values if value], width, label=name)
    axes.set_yscale("log")
    axes.set_xticks([place + 0.4 for place in range(len(pairs))], [f["pair"].replace(", ", "\n") for f in pairs])
    axes.tick_params(axis="x", labelsize=8)
    axes.set_ylabel("MB of an update")
    figure.legend(loc="outside upper center", ncols=len(series), fontsize=8)
    for suffix in ("png", "svg"):
        figure.savefig(out / f"delta.{suffix}", dpi=150)


async def main(arguments: argparse.Namespace) -> int:
    console = Console()
    if not console.is_terminal:
        console.width = 200
    scratch = OUT / "scratch-delta"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    story = Story(console)
    found: list[Figures] = []

    async def work() -> None:
        with story.step("delta", "Measuring: deltas") as step:
            place = Place(scratch, OUT / "cache", step)
            pairs = Pairs(await weights(place), place)
            for pair in pairs.made(arguments.only):
                step.progress(f"{pair.name}: ours")
                found.append(measure(pair, scratch))
                if not arguments.ours:
                    step.progress(f"{pair.name}: {', '.join(delta_tools.tools())}")
                    found[-1]["full_zstd19_bytes"] = delta_tools.zstd_19(pair.target, scratch)
                    found[-1]["tools"] = delta_tools.measure(pair.base, pair.target, scratch)
                if pair.name[0] in "abgh":
                    found[-1]["fidelity"] = asdict(pairs.fidelity(pair))
                _report(found)
        draw(found, OUT)

    try:
        return await run_to_exit_code(work(), console, "run it again: finished models are kept.")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        if found:
            show(found, console)


def _report(pairs: Sequence[Figures]) -> None:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    report = {"pairs": list(pairs), "targets": targets(pairs), "machine": machine(), "at": now}
    (OUT / "delta.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", help="letters of the pairs to measure, as in a,b")
    parser.add_argument("--ours", action="store_true", help="skip the other tools")
    sys.exit(asyncio.run(main(parser.parse_args())))
