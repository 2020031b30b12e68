"""`make bench-optimizer`: compares every recipe on a real model with the builder's, and measures the time.

Prints a table, draws the front, and writes build/bench/optimizer.json. Variants and their evaluations are kept in
build/bench/optimizer, so an interrupted run continues; `--fresh` starts from scratch.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import sys
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import median
from typing import Any

from bench.comparison import Place
from bench.optimizer_bare import ask, dequantize_and_build
from bench.optimizer_service import job_twice
from bench.run import OUT, machine, run_to_exit_code
from bench.variant import weights
from rich.console import Console
from rich.table import Table

from slmops.contracts.descriptor import digest_of
from slmops.contracts.profile import DeviceProfile
from slmops.contracts.recipe import PassSpec, Recipe
from slmops.local.demo.story import Story
from slmops.optimizer.domain.candidate import Variant
from slmops.optimizer.domain.result import PICTURES, JobResult
from slmops.optimizer.jobs.process import run_job
from slmops.optimizer.measure.benchmark import Questions, benchmark
from slmops.optimizer.measure.plot import draw
from slmops.optimizer.recipes.library import bundled, recipe_named
from slmops.optimizer.recipes.spec import JobSpec

WORK = OUT / "optimizer"
PROFILE = DeviceProfile(
    name="bench",
    arch="amd64",
    ram_bytes=1_000_000_000,
    disk_bytes=1_000_000_000,
    max_package_bytes=100_000_000,
    min_tokens_per_s=5,
    max_kl=0.08,
    min_top1=0.82,  # for the interval's lower end, which is 0.02 to 0.03 below the figure on so few windows
)
# Debian's licences. Two are for evaluation; others and Python's reference (two thirds of the text) for calibration. The
# job rejects a calibration text that contains more than a hundredth of the evaluation text's 13-grams.
_LICENCES = Path("/usr/share/common-licenses")
JUDGED = tuple(_LICENCES / name for name in ("Apache-2.0", "MPL-2.0"))
CALIBRATED = tuple(_LICENCES / name for name in ("GPL-3", "LGPL-2.1", "GFDL-1.3", "Artistic", "GPL-1", "CC0-1.0"))
STOCK = "stock-"
JOB_WITHIN = timedelta(hours=2)
ROUNDS = 4
Figures = dict[str, Any]


def student(minutes: float) -> tuple[Recipe, Recipe]:
    """Returns recipes for a smaller model before and after distillation, both in float32, so only the cut loses
    quality."""
    whole = recipe_named("student")
    cuts = tuple(step for step in whole.passes if step.pass_.startswith("prune-"))
    learnt = PassSpec(pass_="distill", params={"minutes": minutes})
    float32 = PassSpec(pass_="build", params={"precision": "fp32", "options": {}})
    return (
        Recipe(name="student-cut", passes=(*cuts, float32)),
        Recipe(name="student-distilled", passes=(*cuts, learnt, float32)),
    )


async def measure(place: Place, minutes: float, report: Callable[[Figures], None]) -> None:
    """Passes all known figures to `report` after each part, because the last part takes longest."""
    source = await weights(place)
    recipes = tuple(recipe for recipe in bundled().values() if recipe.name != "student")
    points = await _timed_in_turns(await _run(source, WORK / "points", recipes, place), place)
    draw(points, PROFILE, [OUT / f"optimizer-{name}" for name in PICTURES])
    figures: Figures = {
        "points": [_point(variant) for variant in points.variants],
        "reference": points.reference.model_dump(mode="json"),
        "chosen": points.choice.model_dump(mode="json") | {"plain_onnxruntime_genai_says": await _plain(points, place)},
    }
    report(figures)
    figures["time_s"] = await dequantize_and_build(source, place) | await job_twice(source, place)
    report(figures)
    figures["student"] = _student(await _run(source, WORK / "student", student(minutes), place), minutes)
    report(figures)


async def _run(source: Path, work: Path, recipes: tuple[Recipe, ...], place: Place) -> JobResult:
    async def progress(step: str, done: int, of: int) -> None:
        place.step.progress(f"{step} ({done} of {of})")

    texts = {"evaluation_texts": JUDGED, "calibration_texts": (*CALIBRATED, _reference())}
    spec = JobSpec(recipes=recipes, profile=PROFILE, **texts)
    return await run_job(source, work, spec, progress, JOB_WITHIN)


async def _timed_in_turns(result: JobResult, place: Place) -> JobResult:
    """Measures tokens/s again in several rounds over all variants, so that the load is the same for each."""
    found: dict[str, list[float]] = {v.recipe: [] for v in result.variants if v.path}
    for number in range(1, ROUNDS + 1):
        for variant in result.variants:
            if variant.path:
                place.step.progress(f"speed, round {number} of {ROUNDS}: {variant.recipe}")
                with benchmark(WORK / "points" / variant.path, Questions()) as running:
                    found[variant.recipe].append(running.speed().tokens_per_s)
    return result.model_copy(update={"variants": tuple(_with_speed(v, found.get(v.recipe)) for v in result.variants)})


def _with_speed(variant: Variant, rounds: list[float] | None) -> Variant:
    if not rounds or variant.evaluation is None:
        return variant
    evaluation = variant.evaluation.model_copy(update={"tokens_per_s": median(rounds)})
    return variant.model_copy(update={"evaluation": evaluation})


def _reference() -> Path:
    """Returns Python's language reference as a file."""
    from pydoc_data.topics import topics

    path = WORK / "reference.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(topics[name] for name in sorted(topics))[:200_000])
    return path


async def _plain(points: JobResult, place: Place) -> str | None:
    path = next((v.path for v in points.variants if v.recipe == points.choice.recipe), None)
    return await ask(WORK / "points" / path, place) if path else None


def _point(variant: Variant) -> Figures:
    evaluation, stock = variant.evaluation, variant.recipe.startswith(STOCK)
    if evaluation is None:
        return {"recipe": variant.recipe, "stock": stock, "failed": list(variant.verdict.reasons)}
    weights_bytes = sum(path.stat().st_size for path in (WORK / "points" / (variant.path or "")).glob("model.onnx*"))
    return {
        "recipe": variant.recipe,
        "stock": stock,
        "weights_bytes": weights_bytes,
        "passed": variant.verdict.passed,
        "seconds": variant.seconds,
        **evaluation.model_dump(mode="json"),
    }


def _student(result: JobResult, minutes: float) -> Figures:
    cut, distilled = result.variants
    found: Figures = {"params": None, "parent_params": result.reference.parameters, "minutes": minutes}
    if cut.evaluation and distilled.evaluation and cut.evaluation.kl and distilled.evaluation.kl:
        before, after = cut.evaluation, distilled.evaluation
        found |= {"kl_before": before.kl, "kl_after": after.kl, "won_back": 1 - after.kl / before.kl}
        found |= {"top1_before": before.top1, "top1_after": after.top1, "params": _parameters(distilled)}
    else:
        found["failed"] = [*cut.verdict.reasons, *distilled.verdict.reasons]
    return found


def _parameters(variant: Variant) -> int:
    """Returns the parameters of a float32 graph without its sine and cosine tables. A tied embedding counts once."""
    import onnx

    model = onnx.load(WORK / "student" / (variant.path or "") / "model.onnx", load_external_data=False)
    sizes = {t.name: _product(t.dims) for t in model.graph.initializer if not t.name.endswith("_cache")}
    return sum(sizes.values())


def _product(dims: Any) -> int:
    total = 1
    for size in dims:
        total *= size
    return total


def show(figures: Mapping[str, Any], console: Console) -> None:
    table = Table(title="SmolLM2-135M-Instruct, licences, against its own float32", title_justify="left")
    for column in ("recipe", "MB of weights", "KL", "95%", "top-1", "perplexity", "tokens/s", "peak MB", "made in s"):
        table.add_column(column, justify="left" if column == "recipe" else "right", no_wrap=True)
    for point in figures["points"]:
        if "failed" in point:
            table.add_row(point["recipe"], "failed: " + "; ".join(point["failed"])[:60])
            continue
        style = "dim" if point["stock"] else "bold green" if point["passed"] else ""
        table.add_row(
            point["recipe"],
            f"{point['weights_bytes'] / 1e6:.1f}",
            f"{point['kl']:.4f}",
            f"{point['kl_low']:.3f}–{point['kl_high']:.3f}",
            f"{point['top1']:.3f}",
            f"{point['ppl']:.2f}",
            f"{point['tokens_per_s']:.1f}",
            f"{point['peak_rss_bytes'] / 1e6:.0f}",
            f"{point['seconds']:.0f}",
            style=style,
        )
    console.print(table)
    for name in ("student", "time_s", "chosen", "targets"):
        console.print(f"{name}: {json.dumps(figures.get(name, 'not measured'))}", highlight=False)


def targets(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the targets for points and times. Stock recipes must be dominated in bytes and divergence."""
    points = [point for point in figures["points"] if "failed" not in point]
    stock = [point for point in points if point["stock"]]
    ours = [point for point in points if not point["stock"]]
    speed = next((point["tokens_per_s"] for point in stock if point["recipe"] == "stock-int4"), None)
    good = [
        point["recipe"]
        for point in ours
        if point["bytes"] <= 100_000_000 and point["kl"] <= 0.08 and point["top1"] >= 0.85
        if speed and point["tokens_per_s"] >= 0.9 * speed
    ]
    found: dict[str, Any] = {
        "small_and_faithful": good,
        "stock_dominated": {s["recipe"]: [o["recipe"] for o in ours if _dominates(o, s)] for s in stock},
    }
    if times := figures.get("time_s"):
        found["job_over_bare"] = round(times["job"] / (times["dequantize"] + times["builder"]), 2)
    return found


def _dominates(ours: Figures, stock: Figures) -> bool:
    return bool(
        ours["weights_bytes"] <= stock["weights_bytes"]
        and ours["kl"] <= stock["kl"]
        and (ours["weights_bytes"], ours["kl"]) != (stock["weights_bytes"], stock["kl"])
    )


async def main(arguments: argparse.Namespace) -> int:
    console = Console()
    if not console.is_terminal:
        console.width = 140
    if arguments.fresh:
        shutil.rmtree(WORK, ignore_errors=True)
    scratch = OUT / "scratch"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    story = Story(console)
    last: Figures = {}

    def report(figures: Figures) -> None:
        last.update(_complete(figures))
        (OUT / "optimizer.json").write_text(json.dumps(last, indent=2) + "\n")

    async def work() -> None:
        with story.step("optimizer", "Measuring: optimizer") as step:
            await measure(Place(scratch, OUT / "cache", step), arguments.minutes, report)

    try:
        return await run_to_exit_code(work(), console, "run it again to continue.")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        if last:
            show(last, console)


def _complete(figures: Mapping[str, Any]) -> Figures:
    texts = {path.name: digest_of(path.read_bytes()) for path in JUDGED}
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {**figures, "targets": targets(figures), "evaluation_texts": texts, "machine": machine(), "at": now}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=15, help="minutes of the student's distillation, on two cores")
    parser.add_argument("--fresh", action="store_true", help="discard earlier results")
    sys.exit(asyncio.run(main(parser.parse_args())))
