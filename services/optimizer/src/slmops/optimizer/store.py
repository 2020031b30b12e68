"""Results of finished jobs, kept in the object store: the same work is never done twice, by whichever worker.

The optimizer has no journal: a job's outcome follows from its input, and its events have ids that follow from the job,
so that a worker that died before its acknowledgement repeats them instead of inventing others.
"""

from __future__ import annotations

from typing import Protocol

from pydantic import BaseModel, ConfigDict

from slmops.contracts.descriptor import Descriptor, Digest
from slmops.contracts.evaluation import Evaluation
from slmops.contracts.model import ModelFile
from slmops.kit.objects import Objects


class VariantOutcome(BaseModel):
    """One recipe's result. `files` are in the store only for a variant that passed its gate."""

    model_config = ConfigDict(frozen=True)

    recipe: str
    digest: Digest
    files: tuple[ModelFile, ...]
    evaluation: Evaluation
    passed: bool
    chosen: bool
    reason: str
    report: Descriptor


class Outcome(BaseModel):
    model_config = ConfigDict(frozen=True)

    variants: tuple[VariantOutcome, ...]


class Results(Protocol):
    async def get(self, work: str) -> Outcome | None: ...

    async def put(self, work: str, outcome: Outcome) -> None: ...


class ObjectResults:
    """`Results` under `cache/optimizer/` of the bucket; `key` names everything that the outcome depends on."""

    def __init__(self, objects: Objects, key: str) -> None:
        self._objects = objects
        self._key = key

    async def get(self, work: str) -> Outcome | None:
        data = await self._objects.get_object(self._path(work))
        return Outcome.model_validate_json(data) if data else None

    async def put(self, work: str, outcome: Outcome) -> None:
        await self._objects.put_object(self._path(work), outcome.model_dump_json().encode())

    def _path(self, work: str) -> str:
        return f"cache/optimizer/{self._key}/{work}.json"
