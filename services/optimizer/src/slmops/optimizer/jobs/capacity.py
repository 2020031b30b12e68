"""Checks memory and disk before a job starts, so that a job that does not fit is refused with figures, not killed."""

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
"""Copies of the float32 model on the disk: the reference, its export, and a temporary copy during the export."""
COPIES_PER_VARIANT = 0.6
"""Disk for one variant in copies of the float32 model: codes take a byte per weight, an 8-bit variant a little more.
Measured on SmolLM2: 0.53."""
_CGROUP = Path("/sys/fs/cgroup")


class Memory(NamedTuple):
    """The memory that a job may use. `why` says what limits it."""

    size_bytes: int
    why: str


def memory(limit_bytes: int | None) -> Memory:
    """Returns the memory for a job that has not started."""
    free = free_memory_bytes()
    return Memory(free, "free") if limit_bytes is None or free < limit_bytes else Memory(limit_bytes, "the job's limit")


def check_memory(facts: ModelFacts, available: Memory, recipe: Recipe | None = None) -> None:
    """Raises `NotEnoughMemory` if the recipe, or without one any job on this model, needs more than is available."""
    needed = needed_bytes(facts, calibrated=recipe is not None and _uses_gradients(recipe))
    if needed > available.size_bytes:
        raise NotEnoughMemory(
            f"{'this recipe' if recipe else 'optimizing this model'} takes about {_gb(needed)} of memory; "
            f"{_gb(available.size_bytes)} are {available.why}",
            fix="Use a host or a limit with more memory, or a "
            + ("recipe without gptq." if recipe else "smaller model."),
        )


def _uses_gradients(recipe: Recipe) -> bool:
    """Returns whether a pass computes gradients on much text. Measuring sensitivity alone takes only little text."""
    return any(step.params.get("method") == "gptq" for step in recipe.passes)


def copies(recipe: Recipe) -> float:
    """Returns the disk that the recipe's outputs take, in copies of the float32 model.

    Every pass that gives a float model leaves a copy; the last of them is also exported.
    """
    float_models = sum(step.kind.gives == "float" for step in check(recipe))
    return COPIES_PER_VARIANT + float_models + bool(float_models)


def check_disk(facts: ModelFacts, work: Path, left_behind: float) -> None:
    """Raises `DiskFull` if the folder `work` has too little room for the job.

    A job needs the reference, its export, and `left_behind` copies of the float32 model for its variants. Files that an
    earlier run left in `work` are subtracted.
    """
    float32 = facts.parameters * _FLOAT32_BYTES
    present = sum(
        path.lstat().st_size for part in ("reference", "exports", "passes") for path in (work / part).rglob("*")
    )
    needed = round(float32 * (_BASE_COPIES + left_behind)) - present
    free = shutil.disk_usage(work).free
    if needed > free:
        raise DiskFull(
            f"the job takes about {_gb(needed)} on the disk; {_gb(free)} are free",
            where=str(work),
            fix="Free disk space, or request fewer recipes.",
        )


def free_memory_bytes(cgroup: Path = _CGROUP) -> int:
    """Returns the free memory of the host, or of our container if that is less. `psutil` does not know containers."""
    import psutil

    free = int(psutil.virtual_memory().available)
    limit = cgroup / "memory.max"
    if not limit.exists() or limit.read_text().strip() == "max":
        return free
    used = int((cgroup / "memory.current").read_text())
    stat = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    return min(free, int(limit.read_text()) - used + int(stat["inactive_file"]))  # the page cache can be evicted


def _gb(size: float) -> str:
    return f"{size / 1e9:.3g} GB"
