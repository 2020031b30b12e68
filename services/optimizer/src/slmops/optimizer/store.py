"""Caches results in the object store, so that no worker repeats work that another one has done.

The optimizer has no journal: a job's outcome is determined by its input, and the ids of its events by the job. A worker
that repeats a job after a crash therefore publishes the same events again, and the server drops the duplicates.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Protocol

from pydantic import BaseModel, ConfigDict

from slmops.contracts.descriptor import Descriptor, Digest
from slmops.contracts.evaluation import Evaluation
from slmops.contracts.model import ModelFile
from slmops.contracts.recipe import Recipe

_CACHE = "cache/optimizer"


class VariantOutcome(BaseModel):
    """One recipe's result. `files` are in the store only if `passed`. A failed recipe has no files and no report."""

    model_config = ConfigDict(frozen=True)

    recipe: str
    digest: Digest | None
    files: tuple[ModelFile, ...]
    evaluation: Evaluation | None
    passed: bool
    chosen: bool
    reason: str
    report: Descriptor | None


class Outcome(BaseModel):
    """The outcome of a job. `reason` says why a variant was chosen, or why none was; `report` has all details."""

    model_config = ConfigDict(frozen=True)

    variants: tuple[VariantOutcome, ...]
    reason: str
    report: Descriptor
    pictures: tuple[Descriptor, ...] = ()

    @property
    def blobs(self) -> set[Digest]:
        """The digests of all blobs that it names."""
        reports = [self.report, *(variant.report for variant in self.variants), *self.pictures]
        files = {file.digest for variant in self.variants if variant.passed for file in variant.files}
        return {report.digest for report in reports if report} | files


class Measured(BaseModel):
    """One recipe's variant of one input. It does not depend on the job or its device profile."""

    model_config = ConfigDict(frozen=True)

    definition: Recipe
    evaluation: Evaluation
    files: tuple[ModelFile, ...]
    report: Descriptor
    stored: bool
    """Whether the files are in the store. If not, the variant must be made again before it can be delivered."""
    path: str
    """Its folder in a work folder. The folder's name is a digest of all its inputs."""
    notes: dict[str, str]
    """The files with its measurements: path in the work folder → text."""

    @property
    def blobs(self) -> set[Digest]:
        """The digests of all blobs that it names."""
        return {self.report.digest} | {file.digest for file in self.files if self.stored}


class ObjectStore(Protocol):
    """The methods of `slmops.kit.objects.store.Objects` that we need."""

    async def get_object(self, key: str) -> bytes | None: ...

    async def put_object(self, key: str, data: bytes) -> None: ...

    async def keys(self, prefix: str = "") -> list[str]: ...

    async def keep(self, digest: Digest) -> bool: ...

    async def remove_old(self, prefix: str, before: datetime) -> int: ...


class Results:
    """The cache: `jobs/<work>.json` and `variants/<source>/<recipe>.json` below `cache/optimizer/<environment>/`.

    `work` is a digest of the version's files, the recipes, the search, the profile and the golden prompts; `source` of
    the files and the prompts only, because gates are judged again. `environment` returns a digest of everything else
    that a result depends on; computing it may take a while.

    A cached result does not protect its blobs from garbage collection. A result that has lost a blob counts as missing;
    the blobs of a result that was found are kept until events name them.
    """

    def __init__(self, objects: ObjectStore, environment: Callable[[], Digest]) -> None:
        self._objects = objects
        self._environment = environment

    async def outcome(self, work: str) -> Outcome | None:
        key = await self._job(work)
        data = await self._objects.get_object(key)
        found = Outcome.model_validate_json(data) if data else None
        if not data or not found or not await self._keep_all(found.blobs):
            return None
        await self._objects.put_object(key, data)  # it was used now
        return found

    async def put_outcome(self, work: str, outcome: Outcome) -> None:
        await self._objects.put_object(await self._job(work), outcome.model_dump_json().encode())

    async def measured(self, source: str) -> list[Measured]:
        """Returns every variant of this input that was ever made and measured and still has its blobs."""
        keys = await self._objects.keys(await self._variants(source))
        found = zip(keys, await asyncio.gather(*map(self._objects.get_object, keys)), strict=True)
        known = []
        for key, data in found:
            if data and await self._keep_all((one := Measured.model_validate_json(data)).blobs):
                await self._objects.put_object(key, data)  # it was used now
                known.append(one)
        return known

    async def put_measured(self, source: str, measured: Measured) -> None:
        key = f"{await self._variants(source)}{measured.definition.digest.removeprefix('sha256:')}.json"
        await self._objects.put_object(key, measured.model_dump_json(by_alias=True).encode())

    async def forget(self, before: datetime) -> int:
        """Removes the results that were neither written nor used since then, of every environment. Returns how many."""
        return await self._objects.remove_old(f"{_CACHE}/", before)

    async def _keep_all(self, blobs: Iterable[Digest]) -> bool:
        """Keeps the blobs for the grace period; returns False when one is gone."""
        return all(await asyncio.gather(*map(self._objects.keep, blobs)))

    async def _job(self, work: str) -> str:
        return f"{await self._root()}/jobs/{work}.json"

    async def _variants(self, source: str) -> str:
        return f"{await self._root()}/variants/{source}/"

    async def _root(self) -> str:
        digest = await asyncio.to_thread(self._environment)
        return f"{_CACHE}/{digest.removeprefix('sha256:')[:16]}"
