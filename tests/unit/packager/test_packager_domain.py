"""What is published once, and who may have it."""

from __future__ import annotations

import pytest
from unit.packager.packager_examples import T0, variant

from slmops.contracts.blueprint import Stage
from slmops.contracts.descriptor import Descriptor, digest_of
from slmops.contracts.errors import Denied
from slmops.contracts.events import PackagePublished
from slmops.contracts.plan import Candidate, Plan, Release
from slmops.packager.domain import check_planned, decide, published_as

BLOB = Descriptor.of(b"signature", "application/json")


def package(manifest: bytes = b"manifest") -> PackagePublished:
    made = variant()
    return PackagePublished(
        model=made.model,
        version=made.version,
        profile=made.profile,
        recipe=made.recipe,
        variant=made.digest,
        manifest=Descriptor.of(manifest, "application/json"),
        signature=BLOB,
        size_bytes=1,
        at=T0,
    )


def release(manifest: bytes) -> Release:
    described = Descriptor.of(manifest, "application/json")
    return Release(revision=1, model="smollm2", version="1.0.0", manifest=described, signature=BLOB, size_bytes=1)


def test_a_variant_is_published_once() -> None:
    first = package()
    assert decide([], variant(), first) == [first]
    assert decide([first], variant(), package(b"announced again at another time")) == []
    assert published_as([first], variant()) == first


@pytest.mark.parametrize("change", [{"recipe": "int8"}, {"digest": digest_of(b"other")}, {"profile": "edge-large"}])
def test_another_variant_of_the_version_is_another_package(change: dict[str, str]) -> None:
    assert published_as([package()], variant(**change)) is None


def test_a_gateway_may_have_what_its_plan_names() -> None:
    candidate = Candidate(rollout="r-1", release=release(b"new"), stages=(Stage(name="fleet"),))
    plan = Plan(blueprint="edge-chat", generation=1, stable=release(b"old"), candidate=candidate)
    check_planned(plan, digest_of(b"old"), "gw-1")
    check_planned(plan, digest_of(b"new"), "gw-1")
    with pytest.raises(Denied):
        check_planned(plan, digest_of(b"older"), "gw-1")
    with pytest.raises(Denied):
        check_planned(Plan(blueprint="edge-chat", generation=1), digest_of(b"old"), "gw-1")
