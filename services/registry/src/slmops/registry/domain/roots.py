"""What keeps a blob: the events that name it, and the documents that those name. Pure.

Rules it keeps
1. What an event of a version names stays for as long as the version, and for the grace period after its retirement:
   a package of it may be in the making.
2. Packages and what updates to them stay also when their version is retired. Gateways may run them, a rollback may
   return to them, and the packager's metadata vouches for them. They stay until they are withdrawn, and for the grace
   period after it: who was given their addresses may still be fetching.
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
WITHDRAWALS: Final[dict[type[Event], Callable[[Any], Iterable[Digest]]]] = {
    PackageWithdrawn: lambda e: [e.manifest, e.signature],
    PackageDeltaWithdrawn: lambda e: [e.delta],
}
"""Every event that takes back what an event that outlives its version named. Nothing is named again after it."""
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


def withdrawn(event: Any) -> dict[Digest, datetime]:
    """What an event takes back, and when."""
    rule = WITHDRAWALS.get(type(event))
    return dict.fromkeys(rule(event), event.at) if rule else {}


def living(
    everything: Iterable[Named],
    retired: Mapping[Key, datetime],
    withdrawn: Mapping[Digest, datetime],
    before: datetime,
) -> list[Named]:
    """What still counts of all that was ever named; `retired` and `withdrawn` say when."""
    ended = {key for key, at in retired.items() if at < before}
    gone = {digest for digest, at in withdrawn.items() if at < before}

    def lives(one: Named) -> bool:
        return one.digest not in gone if one.kind in _OUTLIVING else (one.model, one.version) not in ended

    return [one for one in everything if lives(one)]


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
