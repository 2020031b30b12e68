"""The optimizer's job, which measures and judges what it makes, against only making it with the bare tools."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from pathlib import Path

from bench.comparison import Comparison, Measured, Place
from bench.variant import keep, optimize, weights

from slmops.optimizer.quantize import recipe_named

RECIPES = ["int8", "int4"]
# What the model cards and the runtime's own guide tell to do.
_DEQUANTIZE = """
import sys, torch
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
source, target = Path(sys.argv[1]), sys.argv[2]
where = {"gguf_file": source.name, "local_files_only": True}
AutoTokenizer.from_pretrained(source.parent, **where).save_pretrained(target)
config = GgufConfig(dequantize=True)
model = AutoModelForCausalLM.from_pretrained(source.parent, dtype=torch.float32, quantization_config=config, **where)
model.save_pretrained(target)
"""


async def measure(place: Place) -> Measured:
    """One round: it is minutes, and the steps are long enough to even out what else the machine does."""
    source = await weights(place)
    start = time.perf_counter()
    result, variants = await optimize(place, RECIPES)
    total_s = time.perf_counter() - start
    keep(variants / "int4", place)
    bare = await _bare(source, place)
    ours = result.timings_s
    making_s = ours["read"] + sum(ours[f"quantize {recipe}"] for recipe in RECIPES)
    tools, all_s = "transformers, then the builder, a process each", sum(bare.values())
    rows = [
        _row("GGUF to int8 and int4, measured, judged", f"{tools}; nothing measured", all_s, total_s),
        _row("the same without measuring", tools, all_s, making_s),
        _row("read: GGUF to float32", "transformers", bare["dequantize"], ours["read"]),
    ]
    for recipe in RECIPES:
        rows.append(_row(f"quantize {recipe}", "onnxruntime-genai builder", bare[recipe], ours[f"quantize {recipe}"]))
    return Measured(rows, {"seconds by step of ours": dict(ours), "seconds by step of bare": dict(bare)})


def _row(what: str, bare_is: str, bare_s: float, ours_s: float) -> Comparison:
    return Comparison(what, bare_is, "s", [bare_s], [ours_s])


async def _bare(source: Path, place: Place) -> dict[str, float]:
    full = place.scratch / "full"
    seconds = {"dequantize": await _timed(place, "dequantize", "-c", _DEQUANTIZE, source, full)}
    for recipe in map(recipe_named, RECIPES):
        out, cache = place.scratch / recipe.name, place.scratch / f"{recipe.name}-cache"
        builder = ("-m", "onnxruntime_genai.models.builder", "-p", recipe.precision, "-e", "cpu")
        options = [f"{key}={value}" for key, value in recipe.options.items()]
        places = ("-i", full, "-o", out, "-c", cache)
        seconds[recipe.name] = await _timed(place, recipe.name, *builder, *places, "--extra_options", *options)
    return seconds


async def _timed(place: Place, name: str, *arguments: str | Path) -> float:
    place.step.progress(f"bare tools: {name}")
    start = time.perf_counter()
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *map(str, arguments),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    try:
        said, _ = await process.communicate()
    finally:
        if process.returncode is None:  # interrupted
            process.kill()
            await process.wait()
    if process.returncode:
        raise RuntimeError(f"{name} failed:\n{said.decode(errors='replace')[-2000:]}")
    return round(time.perf_counter() - start, 2)
