"""Results, kept in the object store: the same work is never done twice, by whichever worker.

The optimizer has no journal: a job's outcome follows from its input, and its events have ids that follow from the job,
so that a worker that died before its acknowledgement repeats them instead of inventing others.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Protocol

from pydantic import BaseModel, ConfigDict

from slmops.contracts.descriptor import Descriptor, Digest
from slmops.contracts.evaluation import Evaluation
from slmops.contracts.model import ModelFile
from slmops.contracts.recipe import Recipe


class VariantOutcome(BaseModel):
    """One recipe's result. `files` are in the store only if `passed`. What failed has neither files nor a report."""

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
    """Of one job. `reason` says why its variant was chosen, or why none was; `report` has everything."""

    model_config = ConfigDict(frozen=True)

    variants: tuple[VariantOutcome, ...]
    reason: str
    report: Descriptor
    pictures: tuple[Descriptor, ...] = ()

    @property
    def blobs(self) -> set[Digest]:
        """All that it names."""
        reports = [self.report, *(variant.report for variant in self.variants), *self.pictures]
        files = {file.digest for variant in self.variants if variant.passed for file in variant.files}
        return {report.digest for report in reports if report} | files


class Measured(BaseModel):
    """One recipe's variant of one input, whatever the job and its device profile were."""

    model_config = ConfigDict(frozen=True)

    definition: Recipe
    evaluation: Evaluation
    files: tuple[ModelFile, ...]
    report: Descriptor
    stored: bool
    """Whether the files are in the store. If not, the variant has to be made again to be delivered."""
    path: str
    """Of its folder in a work folder, which is named by everything that went into it."""
    notes: dict[str, str]
    """What the work folder says of it: its measurements. Path in the work folder → text."""

    @property
    def blobs(self) -> set[Digest]:
        """All that it names."""
        return {self.report.digest} | {file.digest for file in self.files if self.stored}


class ObjectStore(Protocol):
    """What we need of `slmops.kit.objects.store.Objects`."""

    async def get_object(self, key: str) -> bytes | None: ...

    async def put_object(self, key: str, data: bytes) -> None: ...

    async def keys(self, prefix: str = "") -> list[str]: ...

    async def keep(self, digest: Digest) -> bool: ...


class Results:
    """Under `cache/optimizer/<environment>/` of the bucket: `jobs/<work>.json`, and by input `variants/<recipe>.json`.

    A job's work names the version's files, the recipes, the search, the profile and the golden prompts; a variant's
    input only the files and the prompts, because a gate is judged anew. `environment` names everything else that a
    result depends on, and may take a while to find out.

    What is kept here keeps no blob: collections remove those of retired versions. A result of which a blob is gone is
    not found, and the blobs of one that is found stay until its events name them.
    """

    def __init__(self, objects: ObjectStore, environment: Callable[[], Digest]) -> None:
        self._objects = objects
        self._environment = environment

    async def outcome(self, work: str) -> Outcome | None:
        data = await self._objects.get_object(await self._job(work))
        found = Outcome.model_validate_json(data) if data else None
        return found if found and await self._kept(found.blobs) else None

    async def put_outcome(self, work: str, outcome: Outcome) -> None:
        await self._objects.put_object(await self._job(work), outcome.model_dump_json().encode())

    async def measured(self, source: str) -> list[Measured]:
        """Every variant that was ever made and measured of this input, and is still there."""
        keys = await self._objects.keys(await self._variants(source))
        found = await asyncio.gather(*map(self._objects.get_object, keys))
        known = [Measured.model_validate_json(data) for data in found if data]
        return [one for one in known if await self._kept(one.blobs)]

    async def put_measured(self, source: str, measured: Measured) -> None:
        key = f"{await self._variants(source)}{measured.definition.digest.removeprefix('sha256:')}.json"
        await self._objects.put_object(key, measured.model_dump_json(by_alias=True).encode())

    async def _kept(self, blobs: Iterable[Digest]) -> bool:
        return all(await asyncio.gather(*map(self._objects.keep, blobs)))

    async def _job(self, work: str) -> str:
        return f"{await self._root()}/jobs/{work}.json"

    async def _variants(self, source: str) -> str:
        return f"{await self._root()}/variants/{source}/"

    async def _root(self) -> str:
        digest = await asyncio.to_thread(self._environment)
        return f"cache/optimizer/{digest.removeprefix('sha256:')[:16]}"
