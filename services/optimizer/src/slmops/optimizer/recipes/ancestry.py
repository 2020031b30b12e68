"""What a new version replaces on the devices that have it, and its files, for quantizing on those grids."""

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
    """`wanted`: whether new versions are tried on their predecessor's grids at all."""

    def __init__(self, bus: Bus, objects: Objects, *, wanted: bool) -> None:
        self._bus = bus
        self._objects = objects
        self._wanted = wanted

    async def anchored(self, job: OptimizeJob) -> OptimizeJob:
        """The job, with a recipe more where the version has a predecessor. That is worth no waiting: a registry that
        does not answer is a version that is quantized anew, as it is in any case."""
        if not self._wanted or _beside_its_base(job):
            return job
        try:
            versions = (await self._bus.client.request(ListVersions(model=job.model))).versions
        except SlmopsError as error:
            log.warning("%s:%s is not tried on a predecessor's grids: %s", job.model, job.version, error)
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
        """Its variant as a genai folder. None when it is not in the store any more."""
        await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
        try:
            manifest = await self._objects.get_manifest(before.manifest.digest)
            for path, layer in layers_by_path(manifest).items():
                if layer.media_type in (WEIGHT, WEIGHT_CONFIG):
                    await self._objects.get_file(layer.digest, folder / path)
        except NotFound as error:
            log.warning("the predecessor %s cannot be fetched: %s", before.version, error)
            return None
        return folder


def _beside_its_base(job: OptimizeJob) -> bool:
    """An adapter that is not merged: its base is on the devices already, and changes by nothing."""
    return job.format == "adapter" and any(recipe.takes_adapters for recipe in job.definitions)


def predecessor(versions: Sequence[VersionView], version: str, profile: str) -> Predecessor | None:
    """Of `versions`, newest last, the newest before `version` that has a package for the profile."""
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
    """On the grids of that variant; the same name for all of a line."""
    return Recipe(
        name=before.recipe.removesuffix(ANCHORED) + ANCHORED,
        description=f"On the grids of {before.version}, so that an update from it is small.",
        passes=(PassSpec(pass_=ANCHOR, params={"predecessor": before.variant}),),
    )
