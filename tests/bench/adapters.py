"""Measures the speed of a LoRA beside its quantized base (ADR 14): the cost of the adapter inputs and of the LoRA."""

from __future__ import annotations

import os
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path

from bench.bare_runtime import BareRuntime, bare_runtime
from bench.comparison import Measured, Place
from bench.variant import int4, optimize, weights

from slmops.contracts.manifest import ADAPTER_PATH
from slmops.optimizer.intake import materialize
from slmops.optimizer.recipes.library import recipe_named

RECIPE, RANK, TARGETS = "int4-adaptable", 8, ["q_proj", "v_proj"]
PROMPT, MAX_TOKENS, ROUNDS = "Write a long story about a fisherman and the sea.", 96, 8


async def measure(place: Place) -> Measured:
    plain, adapted = await int4(place), await _adapted(place)
    alone = place.scratch / "alone"
    shutil.copytree(adapted, alone, ignore=shutil.ignore_patterns(ADAPTER_PATH), copy_function=os.link)
    async with bare_runtime(plain) as bare, bare_runtime(alone) as base, bare_runtime(adapted) as both:
        sides = [_rate(runtime) for runtime in (bare, base, both)]
        for side in sides:
            await side()  # warm-up: the first answers include lazy initialization
        rows = [
            await place.side_by_side(what, "tokens/s", "the same recipe without adapter inputs", sides[0], side, ROUNDS)
            for what, side in (("adapter inputs without a LoRA", sides[1]), (f"with a LoRA of rank {RANK}", sides[2]))
        ]
    size = (adapted / ADAPTER_PATH).stat().st_size
    return Measured(rows, {"adapter": {"bytes": size, "rank": RANK, "at": " ".join(TARGETS)}})


def _rate(runtime: BareRuntime) -> Callable[[], Awaitable[float]]:
    async def rate() -> float:
        answer = await runtime.answer(PROMPT, MAX_TOKENS)
        return answer.tokens / answer.seconds

    return rate


async def _adapted(place: Place) -> Path:
    """Returns the base and the adapter's file, made from an adapter with random matrices or taken from the cache."""
    kept = place.cache / f"{RECIPE}-{recipe_named(RECIPE).digest[7:19]}"
    if not kept.exists():
        source = _adapter(await weights(place), place.scratch / "adapter")
        result, work = await optimize(place, [RECIPE], source)
        [variant] = result.variants
        assert variant.path, variant.verdict
        shutil.move(work / variant.path, kept)
    return kept


def _adapter(model: Path, folder: Path) -> Path:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder.mkdir()
    base = materialize(model, folder / "base")
    torch.manual_seed(1)
    settings = LoraConfig(r=RANK, lora_alpha=2, target_modules=TARGETS, init_lora_weights=False)
    loaded = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, local_files_only=True)
    get_peft_model(loaded, settings).save_pretrained(folder)
    return folder
