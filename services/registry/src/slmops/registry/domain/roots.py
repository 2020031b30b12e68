"""What keeps a blob: the events that name it, and the documents that those name. Pure.

Rules it keeps
1. What an event of a version names stays for as long as the version, and for the grace period after its retirement:
   a package of it may be in the making.
2. Packages and what updates to them stay also when their version is retired. Gateways may run them, a rollback may
   return to them, and the packager's metadata vouches for them.
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
    PackagePublished,
    VariantOptimized,
    VariantRejected,
)
from slmops.contracts.manifest import JOB_REPORT, OCI_MANIFEST
from slmops.contracts.model import ModelFile

DOCUMENTS: Final = frozenset({OCI_MANIFEST, JOB_REPORT})
"""Media types of blobs that name others."""
Key = tuple[str, str]
"""Model and version."""


@dataclass(frozen=True)
class Rule:
    """`names` may hold None. `outlives`: also when the version is retired."""

    names: Callable[[Any], Iterable[Descriptor | ModelFile | None]]
    outlives: bool = False


RULES: Final[dict[type[Event], Rule]] = {
    ModelVersionRegistered: Rule(lambda e: [*e.files, e.golden]),
    VariantOptimized: Rule(lambda e: [*e.files, e.report, e.job_report, e.golden]),
    VariantRejected: Rule(lambda e: [e.report, e.job_report]),
    PackagePublished: Rule(lambda e: [e.manifest, e.signature], outlives=True),
    PackageDeltaPublished: Rule(lambda e: [e.delta], outlives=True),
}
"""Every event that names a blob."""
OWN: Final = frozenset({ModelVersionRegistered})
"""Those of the registry itself, which are in its journal."""
_OUTLIVING: Final = frozenset(kind.type for kind, rule in RULES.items() if rule.outlives)


@dataclass(frozen=True)
class Named:
    """A blob, and what names it. `document`: it names others."""

    kind: str
    model: str
    version: str
    digest: Digest
    document: bool = False


def named(event: Event) -> list[Named]:
    """What an event names, each once."""
    rule = RULES.get(type(event))
    given = [one for one in rule.names(event) if one is not None] if rule else []
    return list(dict.fromkeys(_named(event, one) for one in given))


def _named(event: Any, one: Descriptor | ModelFile) -> Named:
    document = isinstance(one, Descriptor) and one.media_type in DOCUMENTS
    return Named(event.type, event.model, event.version, one.digest, document)


def living(everything: Iterable[Named], retired: Mapping[Key, datetime], before: datetime) -> list[Named]:
    """What still counts of all that was ever named; `retired` says when."""
    gone = {key for key, at in retired.items() if at < before}
    return [one for one in everything if one.kind in _OUTLIVING or (one.model, one.version) not in gone]


class _Document(BaseModel):
    """A manifest, or a job's report, as far as it names blobs."""

    model_config = ConfigDict(extra="ignore")

    config: Descriptor | None = None
    layers: tuple[Descriptor, ...] = ()
    pictures: tuple[Descriptor, ...] = ()


def named_in(document: bytes) -> Collection[Digest]:
    """Raises `InvalidMessage`."""
    try:
        read = _Document.model_validate_json(document)
    except ValidationError as error:
        raise InvalidMessage("a document that names blobs cannot be read") from error
    return {one.digest for one in (read.config, *read.layers, *read.pictures) if one}
