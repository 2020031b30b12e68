"""Decides which packages are published and withdrawn, and which gateway may fetch them. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from datetime import datetime
from typing import Any

from slmops.contracts.clocks import ReportMark, supersedes
from slmops.contracts.commands import ExportPackage, PackageCommand, WithdrawPackage
from slmops.contracts.descriptor import Digest
from slmops.contracts.errors import Denied, IllegalTransition, InvalidMessage, NotFound
from slmops.contracts.events import (
    Event,
    GatewayReported,
    PackageDeltaPublished,
    PackageDeltaWithdrawn,
    PackagePublished,
    PackageWithdrawn,
    VariantOptimized,
)
from slmops.contracts.manifest import ADAPTER_PATH, Manifest, layers_by_path
from slmops.contracts.plan import Plan


def package_of(events: Iterable[Event], variant: VariantOptimized) -> PackagePublished | None:
    """Returns the package of this variant from the events of its stream; None if it was not published."""
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
    """Returns the events to append.

    A variant is published once, however often it is announced or packaged, and not again after its package was
    withdrawn.
    """
    return [] if package_of(events, variant) else [package]


def newest_match(packages: Sequence[PackagePublished], wanted: ExportPackage) -> PackagePublished:
    """Returns the newest package that matches the command.

    Raises `NotFound`, and `InvalidMessage` when packages for several profiles match.
    """
    found = _matches(packages, wanted)
    if len(profiles := sorted({package.profile for package in found})) > 1:
        raise InvalidMessage(
            f"there are packages for several profiles: {', '.join(profiles)}", fix="Choose one with --profile."
        )
    return max(found, key=lambda package: package.at)


def only_match(packages: Sequence[PackagePublished], wanted: WithdrawPackage) -> PackagePublished:
    """Returns the only package that matches the command.

    `packages` must include withdrawn ones: otherwise the same command, sent twice, would withdraw a second package.
    Raises `NotFound`, and `InvalidMessage` when several match.
    """
    found = _matches(packages, wanted)
    if len(found) > 1:
        manifests = ", ".join(package.manifest.digest for package in found)
        raise InvalidMessage(f"{len(found)} packages match", fix=f"Name one of their manifests: {manifests}.")
    return found[0]


def _matches(packages: Sequence[PackagePublished], wanted: PackageCommand[Any]) -> Sequence[PackagePublished]:
    asked = {"model": wanted.model, "version": wanted.version, "profile": wanted.profile}
    named = {name: value for name, value in asked.items() if value is not None}
    found = [package for package in packages if named.items() <= dict(package).items()]
    if wanted.manifest is not None:
        found = [package for package in found if package.manifest.digest == wanted.manifest]
    elif "model" not in named:
        raise InvalidMessage("the command names no package", fix="Name a manifest, or a model and a version.")
    if not found:
        what = wanted.manifest or ":".join(named.values())
        raise NotFound(f"package {what} was not published here", fix="List the packages: slmops package ls.")
    return found


def check_not_needed(package: PackagePublished, needing: Collection[str], running: int) -> None:
    """Raises `IllegalTransition` when the package is still needed.

    `needing`: blueprints whose plan needs the package; `running`: number of gateways that run it.
    """
    if needing:
        raise IllegalTransition(
            f"{package.model}:{package.version} is needed by the plan of {', '.join(sorted(needing))}",
            where=package.manifest.digest,
            fix="Roll out another version there. A plan needs its stable, its candidate and its previous release.",
        )
    if running:
        raise IllegalTransition(
            f"{running} gateway{'s' * (running > 1)} last reported running {package.model}:{package.version}",
            where=package.manifest.digest,
            fix="Wait until they have followed their plan. If they are lost, use --even-if-running.",
        )


def withdrawn(package: PackagePublished, reason: str, now: datetime) -> PackageWithdrawn:
    return PackageWithdrawn(
        **package.model_dump(include={"model", "version", "profile"}),
        manifest=package.manifest.digest,
        signature=package.signature.digest,
        reason=reason,
        at=now,
    )


def delta_withdrawals(deltas: Iterable[PackageDeltaPublished], now: datetime) -> list[PackageDeltaWithdrawn]:
    return [
        PackageDeltaWithdrawn(
            **delta.model_dump(include={"model", "version", "base", "target"}), delta=delta.delta.digest, at=now
        )
        for delta in deltas
    ]


def is_base(manifest: Manifest, variant: VariantOptimized) -> bool:
    """Returns whether the package has every file of an adapter's variant except the adapter, and no adapter itself."""
    layers = layers_by_path(manifest)
    base_files = [file for file in variant.files if file.path != ADAPTER_PATH]
    return ADAPTER_PATH not in layers and all(
        file.path in layers and layers[file.path].digest == file.digest for file in base_files
    )


def planned(plan: Plan) -> set[Digest]:
    """Returns the manifests of the stable and the candidate release of the plan."""
    releases = [plan.stable, plan.candidate.release if plan.candidate else None]
    return {release.manifest.digest for release in releases if release}


def needed(plan: Plan) -> set[Digest]:
    """Returns the manifests of `planned` and that of the release to which a rollback returns."""
    return planned(plan) | ({plan.previous.manifest.digest} if plan.previous else set())


def check_planned(plan: Plan, manifest: Digest, gateway_id: str) -> None:
    """Raises `Denied` for a package that the plan of the gateway's blueprint does not name."""
    if manifest not in planned(plan):
        raise Denied(
            f"the plan of {plan.blueprint} does not name this package for {gateway_id}",
            where=manifest,
            fix="Read the current plan and fetch a package that it names.",
        )


def is_newer(report: GatewayReported, mark: ReportMark, enrolment: int, known: ReportMark) -> bool:
    """Returns whether a report, whose place is `mark`, follows the gateway's `known` report of that enrolment.

    Each device under an id counts anew, so the enrolment decides first. 0: the report does not know it.
    """
    return report.enrolment > enrolment or (report.enrolment in (0, enrolment) and supersedes(mark, known))
