"""Which blobs stay."""

from __future__ import annotations

import json
from typing import Any

import pytest
from contract.wire_examples import EVENTS
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel
from unit.registry.registry_examples import at

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
from slmops.contracts.manifest import JOB_REPORT, MODEL_CONFIG, OCI_MANIFEST, WEIGHT, Manifest
from slmops.contracts.model import ModelFile
from slmops.registry.domain.live_blobs import (
    RULES,
    BlobReference,
    living,
    named,
    named_in,
    needed_by,
    restoring,
    withdrawn,
)


def blobs_in(value: Any) -> set[Digest]:
    """Returns every blob in a value, at any depth."""
    if isinstance(value, Descriptor | ModelFile):
        return {value.digest}
    if isinstance(value, BaseModel):
        return blobs_in([getattr(value, field) for field in type(value).model_fields])
    if isinstance(value, list | tuple):
        return set().union(*map(blobs_in, value)) if value else set()
    return set()


def of_a_version(event: Event) -> bool:
    return {"model", "version"} <= type(event).model_fields.keys()


@pytest.mark.parametrize("event", [e for e in EVENTS if of_a_version(e)], ids=lambda e: e.type)
def test_every_blob_in_an_event_of_a_version_is_named(event: Event) -> None:
    """An event type that names blobs needs a line in `RULES`."""
    assert {one.digest for one in named(event)} == blobs_in(event)
    assert {(one.kind, one.model, one.version) for one in named(event)} <= {(event.type, "smollm2", event.version)}  # type: ignore[attr-defined]


def test_other_events_contain_only_packages() -> None:
    packages = set().union(*(blobs_in(e) for e in EVENTS if isinstance(e, PackagePublished)))
    for event in EVENTS:
        if not of_a_version(event):
            assert {one.digest for one in named(event)} == set()
            assert blobs_in(event) <= packages | {"sha256:" + "9" * 64}, "the package before, in the examples"


def test_a_manifest_and_a_jobs_report_are_documents() -> None:
    documents = {one.digest for event in EVENTS for one in named(event) if one.document}
    [optimized] = [event for event in EVENTS if isinstance(event, VariantOptimized)]
    [published] = [event for event in EVENTS if isinstance(event, PackagePublished)]
    assert optimized.job_report
    assert documents == {optimized.job_report.digest, published.manifest.digest}
    assert {published.manifest.media_type, optimized.job_report.media_type} == {OCI_MANIFEST, JOB_REPORT}


def test_a_manifest_names_its_config_and_layers_and_a_jobs_report_its_pictures() -> None:
    config, layer = Descriptor.of(b"{}", MODEL_CONFIG), Descriptor.of(b"weights", WEIGHT)
    assert named_in(Manifest(config=config, layers=(layer,)).encode()) == {config.digest, layer.digest}
    picture = Descriptor.of(b"picture", "image/png")
    report = {"variants": [], "pictures": [picture.model_dump(mode="json", by_alias=True)]}
    assert named_in(json.dumps(report).encode()) == {picture.digest}
    with pytest.raises(InvalidMessage):
        named_in(b"not json")


_KINDS = st.sampled_from([kind.type for kind in RULES])
_VERSIONS = st.sampled_from(["1.0.0", "1.0.1", "2.0.0"])
_NAMED = st.builds(
    BlobReference, kind=_KINDS, model=st.just("smollm2"), version=_VERSIONS, digest=st.sampled_from("abcdef")
)


@given(
    st.lists(_NAMED),
    st.dictionaries(_VERSIONS, st.integers(0, 20)),
    st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 20)),
    st.integers(0, 20),
)
def test_a_blob_lives_while_anything_that_is_not_long_retired_or_withdrawn_names_it(
    everything: list[BlobReference], retired: dict[str, int], taken_back: dict[str, int], before: int
) -> None:
    when = {("smollm2", version): at(seconds) for version, seconds in retired.items()}
    back = {digest: at(seconds) for digest, seconds in taken_back.items()}
    live = {one.digest for one in living(everything, when, back, at(before))}
    for digest in {one.digest for one in everything}:
        names = [one for one in everything if one.digest == digest]
        packaged = {one for one in names if one.kind in (PackagePublished.type, PackageDeltaPublished.type)}
        in_use = any(retired.get(one.version, before) >= before for one in names if one not in packaged)
        assert (digest in live) == (in_use or (bool(packaged) and taken_back.get(digest, before) >= before))


def test_a_withdrawal_withdraws_every_blob_of_the_publication() -> None:
    by_type = {type(event): event for event in EVENTS}
    published = by_type[PackagePublished]
    assert isinstance(published, PackagePublished)
    event = PackageWithdrawn(
        **published.model_dump(include={"model", "version", "profile", "at"}),
        manifest=published.manifest.digest,
        signature=published.signature.digest,
    )
    assert set(withdrawn(event)) == {one.digest for one in named(published)}
    assert set(withdrawn(by_type[PackageDeltaWithdrawn])) == {
        one.digest for one in named(by_type[PackageDeltaPublished])
    }
    assert withdrawn(published) == {}


@pytest.mark.parametrize(
    ("kinds", "needed", "fix"),
    [
        ((ModelVersionRegistered, VariantOptimized), 2, "slmops model push PATH --name m --version 1.0.0"),
        ((PackagePublished, VariantOptimized), 2, "slmops storage verify --repair --from FOLDER"),
        ((VariantRejected,), 1, "slmops optimize m:1.0.0"),
        ((), 0, "Nothing needs it"),
    ],
)
def test_a_damaged_blob_says_what_needs_it_and_how_it_comes_back(
    kinds: tuple[type[Event], ...], needed: int, fix: str
) -> None:
    references = [BlobReference(kind.type, "m", "1.0.0", "sha256:" + "a" * 64) for kind in kinds] * 2
    assert len(needed_by(references)) == needed
    assert fix in restoring(references)


def test_every_event_that_names_blobs_has_a_name_for_people() -> None:
    for kind in RULES:
        assert needed_by([BlobReference(kind.type, "m", "1.0.0", "sha256:" + "a" * 64)])
