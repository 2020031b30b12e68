"""Compares an update on a serving gateway, from written plan to committed release, with the minimum of its steps."""

from __future__ import annotations

import shutil
import time
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from statistics import median

import httpx
from bench.bare_runtime import bare_runtime
from bench.comparison import Measured, Place
from bench.deployment import Deployment, Phases, deployment
from bench.variant import int4

from slmops.contracts.descriptor import Digest
from slmops.contracts.events import PackagePublished, UpdatePhase
from slmops.contracts.manifest import FILE_PATH, Manifest
from slmops.contracts.prompts.golden import parse_golden
from slmops.local.demo.run import GOLDEN

ROUNDS = 2
_STEPS = {
    UpdatePhase.DOWNLOADING: "notice",
    UpdatePhase.INSTALLED: "download, lay out, verify",
    UpdatePhase.LOADED: "load",
    UpdatePhase.PROBED: "probe",
    UpdatePhase.SOAKING: "swap",
    UpdatePhase.COMMITTED: "soak (0 s: one golden prompt), commit",
}


async def measure(place: Place) -> Measured:
    model = await int4(place)
    async with deployment(place) as deployed:
        place.step.progress("packaging three versions")
        first, *others = [
            await deployed.publish(f"1.0.{number}", _version(model, place.scratch, number))
            for number in range(ROUNDS + 1)
        ]
        place.step.progress("installing the first")
        await deployed.install(first)
        waiting, steps = iter(others), []

        async def bare() -> float:
            return await _bare(deployed, first, place.scratch / "bare")

        async def ours() -> float:
            written, phases = await deployed.install(next(waiting))
            steps.append(_seconds(written, phases))
            return sum(steps[-1].values())

        row = await place.side_by_side(
            "plan written to committed, 117 MB", "s", "httpx to files, load, golden prompts", bare, ours, ROUNDS
        )
        return Measured(
            [row], {"seconds by step of ours": {s: round(median(r[s] for r in steps), 3) for s in steps[0]}}
        )


def _version(model: Path, scratch: Path, number: int) -> Path:
    """Copies the model with other bytes after the last tensor, which are never read, so that it is downloaded again."""
    folder = scratch / f"1.0.{number}"
    shutil.copytree(model, folder)
    with (folder / "model.onnx.data").open("ab") as weights:
        weights.write(bytes(number + 1))
    return folder


def _seconds(written: datetime, phases: Phases) -> dict[str, float]:
    times = [written, *(phases[phase] for phase in _STEPS)]
    return {
        step: (after - before).total_seconds()
        for step, (before, after) in zip(_STEPS.values(), pairwise(times), strict=True)
    }


async def _bare(deployed: Deployment, package: PackagePublished, folder: Path) -> float:
    """Does the necessary steps: downloads the bytes, loads the model, and answers each golden prompt."""
    manifest = Manifest.decode(await deployed.objects.get_bytes(package.manifest.digest))
    urls = {folder / layer.annotations[FILE_PATH]: layer.digest for layer in manifest.layers}
    shutil.rmtree(folder, ignore_errors=True)
    start = time.perf_counter()
    for path, digest in urls.items():
        await _download(deployed, digest, path)
    async with bare_runtime(folder) as runtime:
        for prompt in parse_golden(GOLDEN.read_text()):
            await runtime.answer(prompt.prompt, prompt.max_tokens)
        return time.perf_counter() - start


async def _download(deployed: Deployment, digest: Digest, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    url = await deployed.objects.presigned_get(digest)
    async with httpx.AsyncClient() as http, http.stream("GET", url) as response:
        with path.open("wb") as out:
            async for data in response.aiter_raw():
                out.write(data)
