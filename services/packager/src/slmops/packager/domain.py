"""Decides what is published, and which gateway may fetch it. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from datetime import datetime
from typing import Any

from slmops.contracts.commands import ExportPackage, PackageCommand, WithdrawPackage
from slmops.contracts.descriptor import Digest
from slmops.contracts.errors import Denied, IllegalTransition, InvalidMessage, NotFound
from slmops.contracts.events import (
    Event,
    PackageDeltaPublished,
    PackageDeltaWithdrawn,
    PackagePublished,
    PackageWithdrawn,
    VariantOptimized,
)
from slmops.contracts.manifest import ADAPTER_PATH, Manifest, layers_by_path
from slmops.contracts.plan import Plan


def published_as(events: Iterable[Event], variant: VariantOptimized) -> PackagePublished | None:
    """The package of this variant among the events of its stream."""
    for event in events:
        if (
            isinstance(event, PackagePublished)
            and event.variant == variant.digest
            and event.recipe == variant.recipe
            and event.profile == variant.profile
        ):
            return event
    return None


def decide(events: Iterable[Event], variant: VariantOptimized, package: PackagePublished) -> list[Event]:
    """A variant is published once, however often it is announced or packaged, also when its package was withdrawn."""
    return [] if published_as(events, variant) else [package]


def newest_of(packages: Sequence[PackagePublished], wanted: ExportPackage) -> PackagePublished:
    """What the operator means. Raises `NotFound`, and `InvalidMessage` when it could be for several profiles."""
    found = _meant(packages, wanted)
    if len(profiles := sorted({package.profile for package in found})) > 1:
        raise InvalidMessage(f"there are packages for {', '.join(profiles)}", fix="Name one with --profile.")
    return max(found, key=lambda package: package.at)


def only_of(packages: Sequence[PackagePublished], wanted: WithdrawPackage) -> PackagePublished:
    """What the operator means, of all that were ever published: or the command, given again, would mean the next
    one. Raises `NotFound`, and `InvalidMessage` when it could be several."""
    found = _meant(packages, wanted)
    if len(found) > 1:
        manifests = ", ".join(package.manifest.digest for package in found)
        raise InvalidMessage(f"this may be any of {len(found)} packages", fix=f"Name its manifest: {manifests}.")
    return found[0]


def _meant(packages: Sequence[PackagePublished], wanted: PackageCommand[Any]) -> Sequence[PackagePublished]:
    asked = {"model": wanted.model, "version": wanted.version, "profile": wanted.profile}
    named = {name: value for name, value in asked.items() if value is not None}
    found = [package for package in packages if named.items() <= dict(package).items()]
    if wanted.manifest is not None:
        found = [package for package in found if package.manifest.digest == wanted.manifest]
    elif "model" not in named:
        raise InvalidMessage("nothing says which package is meant", fix="Name a manifest, or a model and a version.")
    if not found:
        what = wanted.manifest or ":".join(named.values())
        raise NotFound(f"no package {what} was published here", fix="List them: slmops package ls.")
    return found


def check_unneeded(package: PackagePublished, needing: Collection[str], running: int) -> None:
    """`needing`: blueprints whose plan names the package; `running`: gateways. Raises `IllegalTransition`."""
    if needing:
        raise IllegalTransition(
            f"{package.model}:{package.version} is needed by the plan of {', '.join(sorted(needing))}",
            where=package.manifest.digest,
            fix="Roll out another version there: what is stable, on its way, or returned to by a rollback stays.",
        )
    if running:
        raise IllegalTransition(
            f"{running} gateways said last that they run {package.model}:{package.version}",
            where=package.manifest.digest,
            fix="Wait until they have followed their plan, or say --even-if-running if they are lost.",
        )


def withdrawn(package: PackagePublished, reason: str, now: datetime) -> PackageWithdrawn:
    return PackageWithdrawn(
        **package.model_dump(include={"model", "version", "profile"}),
        manifest=package.manifest.digest,
        signature=package.signature.digest,
        reason=reason,
        at=now,
    )


def offered_no_more(deltas: Iterable[PackageDeltaPublished], now: datetime) -> list[PackageDeltaWithdrawn]:
    return [
        PackageDeltaWithdrawn(
            **delta.model_dump(include={"model", "version", "base", "target"}), delta=delta.delta.digest, at=now
        )
        for delta in deltas
    ]


def is_base(manifest: Manifest, variant: VariantOptimized) -> bool:
    """Whether the package has every file of an adapter's variant but the adapter, and none itself."""
    here = layers_by_path(manifest)
    below = [file for file in variant.files if file.path != ADAPTER_PATH]
    return ADAPTER_PATH not in here and all(
        file.path in here and here[file.path].digest == file.digest for file in below
    )


def planned(plan: Plan) -> set[Digest]:
    """The manifests of the packages that the plan names."""
    releases = [plan.stable, plan.candidate.release if plan.candidate else None]
    return {release.manifest.digest for release in releases if release}


def needed(plan: Plan) -> set[Digest]:
    """As `planned`, and that of the release to which a rollback returns."""
    return planned(plan) | ({plan.previous.manifest.digest} if plan.previous else set())


def check_planned(plan: Plan, manifest: Digest, gateway_id: str) -> None:
    """Raises `Denied` for a package that the plan of the gateway's blueprint does not name."""
    if manifest not in planned(plan):
        raise Denied(
            f"the plan of {plan.blueprint} does not name this package for {gateway_id}",
            where=manifest,
            fix="Read the current plan and ask for what it names.",
        )
