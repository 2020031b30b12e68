"""Finds the predecessor of a version: the variant that devices run before the update and whose grids are reused."""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

from slmops.contracts.commands import ListVersions, VersionView
from slmops.contracts.errors import NotFound, SlmopsError
from slmops.contracts.jobs import OptimizeJob, Predecessor
from slmops.contracts.manifest import WEIGHT, WEIGHT_CONFIG, layers_by_path
from slmops.contracts.recipe import ANCHOR, PassSpec, Recipe
from slmops.kit.bus.service_bus import Bus
from slmops.kit.objects.store import Objects

log = logging.getLogger(__name__)
ANCHORED = "-anchored"


class Ancestry:
    """Finds and downloads predecessors. If `wanted` is false, no job gets a recipe with its predecessor's grids."""

    def __init__(self, bus: Bus, objects: Objects, *, wanted: bool) -> None:
        self._bus = bus
        self._objects = objects
        self._wanted = wanted

    async def anchored(self, job: OptimizeJob) -> OptimizeJob:
        """Returns the job with an additional anchored recipe, if the version has a predecessor.

        If the registry does not answer, the job goes on without it: the other recipes do not need a predecessor.
        """
        if not self._wanted or _beside_its_base(job):
            return job
        try:
            versions = (await self._bus.client.request(ListVersions(model=job.model))).versions
        except SlmopsError as error:
            log.warning("cannot look up the predecessor of %s:%s, going on without: %s", job.model, job.version, error)
            return job
        before = predecessor(versions, job.version, job.profile.name)
        if before is None:
            return job
        recipe = recipe_on(before)
        return job.model_copy(
            update={
                "predecessor": before,
                "recipes": (*job.recipes, recipe.name),
                "definitions": (*job.definitions, recipe),
            }
        )

    async def fetch(self, before: Predecessor, folder: Path) -> Path | None:
        """Downloads the predecessor's variant as a genai folder; returns None when it is no longer in the store."""
        await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
        try:
            manifest = await self._objects.get_manifest(before.manifest.digest)
            for path, layer in layers_by_path(manifest).items():
                if layer.media_type in (WEIGHT, WEIGHT_CONFIG):
                    await self._objects.get_file(layer.digest, folder / path)
        except NotFound as error:
            log.warning("cannot fetch the predecessor %s: %s", before.version, error)
            return None
        return folder


def _beside_its_base(job: OptimizeJob) -> bool:
    """Returns whether the job adds an adapter beside its base. Devices already have that base; it does not change."""
    return job.format == "adapter" and any(recipe.takes_adapters for recipe in job.definitions)


def predecessor(versions: Sequence[VersionView], version: str, profile: str) -> Predecessor | None:
    """Returns the newest version before `version` that has a package for the profile; `versions` is sorted by age."""
    names = [view.version for view in versions]
    earlier = versions[: names.index(version)] if version in names else versions
    for view in reversed(earlier):
        chosen = {v.recipe: v.digest for v in view.variants if v.profile == profile and v.chosen and v.digest}
        for package in reversed(view.packages):
            if view.state != "retired" and package.profile == profile and (variant := chosen.get(package.recipe)):
                return Predecessor(
                    version=view.version, recipe=package.recipe, variant=variant, manifest=package.manifest
                )
    return None


def recipe_on(before: Predecessor) -> Recipe:
    """Returns the recipe that quantizes on the grids of that variant. All versions of a model get the same name."""
    return Recipe(
        name=before.recipe.removesuffix(ANCHORED) + ANCHORED,
        description=f"Quantized on the grids of {before.version}, so that the update from it is small.",
        passes=(PassSpec(pass_=ANCHOR, params={"predecessor": before.variant}),),
    )
