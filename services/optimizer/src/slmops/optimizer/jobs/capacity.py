"""Checks memory and disk before a job starts, so that it is refused with figures instead of being killed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

from slmops.contracts.errors import DiskFull, NotEnoughMemory
from slmops.contracts.recipe import Recipe
from slmops.kit.modelfile import ModelFacts
from slmops.optimizer.intake import needed_bytes
from slmops.optimizer.recipes.library import check

_FLOAT32_BYTES = 4
_BASE_COPIES = 3
"""Of the model in float32 on the disk: the reference, its export, and the export in the making."""
COPIES_PER_VARIANT = 0.6
"""Codes take a byte per weight, and a variant in 8 bits a little more: 0.53 measured on SmolLM2."""
_CGROUP = Path("/sys/fs/cgroup")


class Memory(NamedTuple):
    """What a job may have, and why not more."""

    size_bytes: int
    why: str


def memory(limit_bytes: int | None) -> Memory:
    """For a job that has not begun."""
    free = free_memory_bytes()
    return Memory(free, "free") if limit_bytes is None or free < limit_bytes else Memory(limit_bytes, "the job's limit")


def check_memory(facts: ModelFacts, there: Memory, recipe: Recipe | None = None) -> None:
    """Raises `NotEnoughMemory` if any job on this model needs more than `there` is; or this recipe does."""
    needed = needed_bytes(facts, calibrated=recipe is not None and _learns(recipe))
    if needed > there.size_bytes:
        raise NotEnoughMemory(
            f"{'this recipe' if recipe else 'optimizing this model'} takes about {_gb(needed)} of memory; "
            f"{_gb(there.size_bytes)} are {there.why}",
            fix="Use a host or a limit with more memory, or a "
            + ("recipe without gptq." if recipe else "smaller model."),
        )


def _learns(recipe: Recipe) -> bool:
    """From gradients of much text. Sensitivity alone is measured on little."""
    return any(step.params.get("method") == "gptq" for step in recipe.passes)


def copies(recipe: Recipe) -> float:
    """How many times the model in float32 its passes leave behind: every cut one, and the last one's export."""
    cut = sum(step.kind.gives == "float" for step in check(recipe))
    return COPIES_PER_VARIANT + cut + bool(cut)


def check_disk(facts: ModelFacts, work: Path, left_behind: float) -> None:
    """Raises `DiskFull` if `work`, which exists, has no room for so many times the model in float32, and what comes
    before all recipes. What an earlier run left there counts as done."""
    float32 = facts.parameters * _FLOAT32_BYTES
    there = sum(
        path.lstat().st_size for part in ("reference", "exports", "passes") for path in (work / part).rglob("*")
    )
    needed = round(float32 * (_BASE_COPIES + left_behind)) - there
    free = shutil.disk_usage(work).free
    if needed > free:
        raise DiskFull(
            f"the job takes about {_gb(needed)} on the disk; {_gb(free)} are free",
            where=str(work),
            fix="Free space there, or ask for fewer recipes.",
        )


def free_memory_bytes(cgroup: Path = _CGROUP) -> int:
    """Of the host, or of the container that we are in if it has less: nobody tells `psutil` about that."""
    import psutil

    free = int(psutil.virtual_memory().available)
    limit = cgroup / "memory.max"
    if not limit.exists() or limit.read_text().strip() == "max":
        return free
    used = int((cgroup / "memory.current").read_text())
    stat = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    return min(free, int(limit.read_text()) - used + int(stat["inactive_file"]))  # the page cache makes room


def _gb(size: float) -> str:
    return f"{size / 1e9:.3g} GB"
