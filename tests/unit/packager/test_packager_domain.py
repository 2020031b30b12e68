"""Packages are published once, fetched by gateways whose plan names them, and withdrawn when no plan needs them."""

from __future__ import annotations

import pytest
from unit.packager.packager_examples import T0, variant

from slmops.contracts.blueprint import Stage
from slmops.contracts.commands import ExportPackage, WithdrawPackage
from slmops.contracts.descriptor import Descriptor, digest_of
from slmops.contracts.errors import Denied, IllegalTransition, InvalidMessage, NotFound
from slmops.contracts.events import PackagePublished
from slmops.contracts.plan import Candidate, Plan, Release
from slmops.packager.domain import (
    check_not_needed,
    check_planned,
    decide,
    needed,
    newest_match,
    only_match,
    package_of,
    planned,
    withdrawn,
)

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
    assert package_of([first], variant()) == first


@pytest.mark.parametrize("change", [{"recipe": "int8"}, {"digest": digest_of(b"other")}, {"profile": "edge-large"}])
def test_another_variant_of_the_version_is_another_package(change: dict[str, str]) -> None:
    assert package_of([package()], variant(**change)) is None


def test_a_gateway_may_fetch_only_packages_that_its_plan_names() -> None:
    candidate = Candidate(rollout="r-1", release=release(b"new"), stages=(Stage(name="fleet"),))
    plan = Plan(blueprint="edge-chat", generation=1, stable=release(b"old"), candidate=candidate)
    check_planned(plan, digest_of(b"old"), "gw-1")
    check_planned(plan, digest_of(b"new"), "gw-1")
    with pytest.raises(Denied):
        check_planned(plan, digest_of(b"older"), "gw-1")
    with pytest.raises(Denied):
        check_planned(Plan(blueprint="edge-chat", generation=1), digest_of(b"old"), "gw-1")


def test_a_withdrawn_package_is_not_published_again() -> None:
    first = package()
    assert decide([first, withdrawn(first, "", T0)], variant(), first) == []


def test_a_plan_also_needs_the_release_to_which_a_rollback_returns() -> None:
    plan = Plan(blueprint="edge-chat", generation=1, stable=release(b"new"), previous=release(b"old"))
    assert planned(plan) == {digest_of(b"new")}
    assert needed(plan) == {digest_of(b"new"), digest_of(b"old")}
    with pytest.raises(Denied):
        check_planned(plan, digest_of(b"old"), "gw-1")


def test_a_package_that_a_plan_or_a_gateway_needs_is_not_withdrawn() -> None:
    check_not_needed(package(), [], 0)
    with pytest.raises(IllegalTransition, match=r"smollm2:1\.0\.0 is needed by the plan of edge-chat, edge-tiny"):
        check_not_needed(package(), ["edge-tiny", "edge-chat"], 0)
    with pytest.raises(IllegalTransition, match="2 gateways"):
        check_not_needed(package(), [], 2)


def test_the_same_withdraw_command_always_finds_the_same_package() -> None:
    first, second = package(), package(b"optimized again")
    by_version = {"model": "smollm2", "version": "1.0.0"}
    assert only_match([first], WithdrawPackage(**by_version)) == first
    with pytest.raises(InvalidMessage, match="2 packages") as refusal:
        only_match([first, second], WithdrawPackage(**by_version))
    assert second.manifest.digest in str(refusal.value.fix)
    assert only_match([first, second], WithdrawPackage(manifest=second.manifest.digest)) == second
    assert newest_match([first, second], ExportPackage(**by_version)) == first, "the first of two with the same date"
    with pytest.raises(NotFound):
        only_match([first], WithdrawPackage(manifest=digest_of(b"unknown")))
    with pytest.raises(InvalidMessage, match="names no package"):
        only_match([first], WithdrawPackage(profile="edge-small"))
