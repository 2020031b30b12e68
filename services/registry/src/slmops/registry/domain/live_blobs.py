"""Decides which blobs stay: those that events name, and those that documents named by events name. Pure.

Rules
1. Blobs that an event of a version names stay as long as the version, and for the grace period after its retirement,
   because a package of the version may be in preparation.
2. Packages and deltas to them stay also after their version is retired: gateways may run them, a rollback may return to
   them, and the packager's metadata lists them. They stay until they are withdrawn and for the grace period after that,
   because clients with their URLs may still be downloading.
3. A blob stays as long as anything names it, whatever else is retired.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, ValidationError

from slmops.contracts.descriptor import Descriptor, Digest
from slmops.contracts.errors import InvalidMessage
from slmops.contracts.events import (
    Event,
    ModelVersionRegistered,
    PackageDeltaPublished,
    PackageDeltaWithdrawn,
    PackagePublished,
    PackageWithdrawn,
    VariantOptimized,
    VariantRejected,
    VariantStarted,
)
from slmops.contracts.manifest import JOB_REPORT, OCI_MANIFEST
from slmops.contracts.model import ModelFile
from slmops.contracts.prompts.evaluation_data import EvaluationData

DOCUMENTS: Final = frozenset({OCI_MANIFEST, JOB_REPORT})
"""Media types of blobs that name other blobs."""
Key = tuple[str, str]
"""Model and version."""


@dataclass(frozen=True)
class Rule:
    """Which blobs an event names; the result of `names` may contain None. `outlives`: they outlive the version's
    retirement."""

    names: Callable[[Any], Iterable[Descriptor | ModelFile | None]]
    outlives: bool = False


def _data(data: EvaluationData | None) -> tuple[ModelFile, ...]:
    return data.files if data else ()


RULES: Final[dict[type[Event], Rule]] = {
    ModelVersionRegistered: Rule(lambda e: [*e.files, e.golden, *_data(e.data)]),
    VariantStarted: Rule(lambda e: _data(e.data)),
    VariantOptimized: Rule(lambda e: [*e.files, e.report, e.job_report, e.golden]),
    VariantRejected: Rule(lambda e: [e.report, e.job_report]),
    PackagePublished: Rule(lambda e: [e.manifest, e.signature], outlives=True),
    PackageDeltaPublished: Rule(lambda e: [e.delta], outlives=True),
}
"""Every event that names a blob."""
WITHDRAWALS: Final[dict[type[Event], Callable[[Any], Iterable[Digest]]]] = {
    PackageWithdrawn: lambda e: [e.manifest, e.signature],
    PackageDeltaWithdrawn: lambda e: [e.delta],
}
"""Every event that withdraws blobs which outlive their version. A withdrawn blob is never named again."""
OWN: Final = frozenset({ModelVersionRegistered})
"""Event types of the registry itself, which are in its journal."""
_OUTLIVING: Final = frozenset(kind.type for kind, rule in RULES.items() if rule.outlives)


@dataclass(frozen=True)
class BlobReference:
    """A blob and the event that names it. `document`: the blob names other blobs."""

    kind: str
    model: str
    version: str
    digest: Digest
    document: bool = False


def named(event: Event) -> list[BlobReference]:
    """Returns the blobs that an event names, each once."""
    rule = RULES.get(type(event))
    given = [one for one in rule.names(event) if one is not None] if rule else []
    return list(dict.fromkeys(_named(event, one) for one in given))


def _named(event: Any, one: Descriptor | ModelFile) -> BlobReference:
    document = isinstance(one, Descriptor) and one.media_type in DOCUMENTS
    return BlobReference(event.type, event.model, event.version, one.digest, document)


def withdrawn(event: Any) -> dict[Digest, datetime]:
    """Returns the blobs that an event withdraws and the time."""
    rule = WITHDRAWALS.get(type(event))
    return dict.fromkeys(rule(event), event.at) if rule else {}


def living(
    everything: Iterable[BlobReference],
    retired: Mapping[Key, datetime],
    withdrawn: Mapping[Digest, datetime],
    before: datetime,
) -> list[BlobReference]:
    """Returns the names that still count. `retired` and `withdrawn` hold the times of retirement and withdrawal."""
    ended = {key for key, at in retired.items() if at < before}
    gone = {digest for digest, at in withdrawn.items() if at < before}

    def lives(one: BlobReference) -> bool:
        return one.digest not in gone if one.kind in _OUTLIVING else (one.model, one.version) not in ended

    return [one for one in everything if lives(one)]


class _Document(BaseModel):
    """The fields of a manifest or a job's report that name blobs."""

    model_config = ConfigDict(extra="ignore")

    config: Descriptor | None = None
    layers: tuple[Descriptor, ...] = ()
    pictures: tuple[Descriptor, ...] = ()


def named_in(document: bytes) -> Collection[Digest]:
    """Returns the blobs that a document names. Raises `InvalidMessage`."""
    try:
        read = _Document.model_validate_json(document)
    except ValidationError as error:
        raise InvalidMessage("a document that names blobs cannot be read") from error
    return {one.digest for one in (read.config, *read.layers, *read.pictures) if one}


_ROLES: Final = {
    ModelVersionRegistered.type: "files",
    VariantStarted.type: "own texts and tasks",
    VariantOptimized.type: "variants",
    VariantRejected.type: "reports",
    PackagePublished.type: "packages",
    PackageDeltaPublished.type: "deltas",
}
NEEDED_BY_AT_MOST: Final = 20


def needed_by(references: Iterable[BlobReference]) -> tuple[str, ...]:
    """Returns what names a blob, for people: `smollm2:1.0.0 (packages)`. At most `NEEDED_BY_AT_MOST`."""
    found = sorted({f"{one.model}:{one.version} ({_ROLES[one.kind]})" for one in references})
    return tuple(found[:NEEDED_BY_AT_MOST])


def restoring(references: Iterable[BlobReference]) -> str:
    """Returns how an operator can bring a blob back."""
    found = sorted(references, key=lambda one: (one.model, one.version))
    pushed = next((one for one in found if one.kind == ModelVersionRegistered.type), None)
    if pushed:
        return f"Push the same files again: slmops model push PATH --name {pushed.model} --version {pushed.version}."
    if packed := next((one for one in found if one.kind in _OUTLIVING), None):
        return (
            f"Restore it from an exported package of {packed.model}:{packed.version}: "
            "slmops storage verify --repair --from FOLDER."
        )
    if made := next(iter(found), None):
        return f"Make the variants again: slmops optimize {made.model}:{made.version}."
    return "Nothing needs it: the next collection removes it."
