"""The model of the benchmarks: the optimizer's int4 variant of SmolLM2-135M-Instruct, made once and kept."""

from __future__ import annotations

import os
import shutil
from datetime import timedelta
from pathlib import Path

from bench.comparison import Place

from slmops.local.demo.weights import fetch_weights
from slmops.optimizer.domain.result import JobResult
from slmops.optimizer.jobs.process import run_job
from slmops.optimizer.recipes.library import recipe_named
from slmops.optimizer.recipes.spec import JobSpec

RECIPE = "int4"
JOB_WITHIN = timedelta(minutes=15)


async def weights(place: Place) -> Path:
    """Returns the GGUF file."""
    place.step.progress("fetching SmolLM2-135M-Instruct")
    return (await fetch_weights(place.cache))[0]


async def optimize(place: Place, recipes: list[str], source: Path | None = None) -> tuple[JobResult, Path]:
    """Runs the whole job without a cache on `source` or the GGUF file. Returns its result and its work folder."""
    work, source = place.scratch / "job", source or await weights(place)

    async def progress(step: str, done: int, of: int) -> None:
        place.step.progress(f"optimizer's job: {step} ({done} of {of})")

    spec = JobSpec(recipes=tuple(map(recipe_named, recipes)))
    return await run_job(source, work, spec, progress, JOB_WITHIN), work


async def int4(place: Place) -> Path:
    """Returns the genai folder, from the cache if this recipe made it before."""
    target = _kept(place)
    if not target.exists():
        result, work = await optimize(place, [RECIPE])
        path = result.variants[0].path
        assert path, result.variants[0].verdict
        keep(work / path, place)
    return target


def keep(variant: Path, place: Place) -> None:
    """Caches a new int4 variant for the next benchmark."""
    target = _kept(place)
    if not target.exists():
        part = target.with_name(target.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(variant, part)
        os.replace(part, target)


def _kept(place: Place) -> Path:
    place.cache.mkdir(parents=True, exist_ok=True)
    return place.cache / f"{RECIPE}-{recipe_named(RECIPE).digest[7:19]}"
