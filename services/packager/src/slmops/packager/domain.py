"""What is published once, and who may have it. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from slmops.contracts.descriptor import Digest
from slmops.contracts.errors import Denied
from slmops.contracts.events import Event, PackagePublished, VariantOptimized
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
    """A variant is published once, however often it is announced or packaged."""
    return [] if published_as(events, variant) else [package]


def planned(plan: Plan) -> set[Digest]:
    """The manifests of the packages that the plan names."""
    releases = [plan.stable, plan.candidate.release if plan.candidate else None]
    return {release.manifest.digest for release in releases if release}


def check_planned(plan: Plan, manifest: Digest, gateway_id: str) -> None:
    """Raises `Denied` for a package that the plan of the gateway's blueprint does not name."""
    if manifest not in planned(plan):
        raise Denied(
            f"the plan of {plan.blueprint} does not name this package for {gateway_id}",
            where=manifest,
            fix="Read the current plan and ask for what it names.",
        )
