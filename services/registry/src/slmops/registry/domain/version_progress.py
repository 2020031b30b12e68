"""Computes the stage of a version between registration and package from its variants' events in any order."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum

from slmops.contracts.commands import PackageView, VariantView

PASSED, REFUSED = "passed", "refused"
"""A gate's results."""


class Stage(StrEnum):
    REGISTERED = "registered"
    OPTIMIZING = "optimizing"
    PACKAGED = "packaged"
    REFUSED = "refused"


@dataclass(frozen=True)
class Optimization:
    """One job: a version for one profile. `recipes` is empty if the job's start is not known yet."""

    profile: str
    recipes: tuple[str, ...] = ()
    progress: str = ""


def stage_of(
    jobs: Collection[Optimization], variants: Collection[VariantView], packages: Collection[PackageView]
) -> Stage:
    """Returns the stage: refused only if every recipe of every known job was refused and a search found no other."""
    if packages:
        return Stage.PACKAGED
    if not jobs and not variants:
        return Stage.REGISTERED
    gates = {(v.profile, v.recipe): v.gate for v in variants}
    wanted = [(job.profile, recipe) for job in jobs for recipe in job.recipes]
    refused = bool(wanted) and all(gates.get(pair) == REFUSED for pair in wanted) and PASSED not in gates.values()
    return Stage.REFUSED if refused else Stage.OPTIMIZING


def progress_of(stage: Stage, jobs: Collection[Optimization], variants: Collection[VariantView]) -> str:
    """Returns one line of text; empty if nothing is under way."""
    if stage is not Stage.OPTIMIZING:
        return ""
    chosen = {v.profile: f"{v.recipe} chosen, being packaged" for v in variants if v.chosen}
    known = {job.profile: job.progress for job in jobs if job.progress} | chosen
    return "; ".join(f"{profile}: {text}" for profile, text in sorted(known.items()))
