"""Decides whose measurements count. Pure.

Invariants
1. A batch counts only for the blueprint under which its gateway is enrolled.
2. A batch counts only for a release that a rollout of this blueprint gives to this gateway, with the version that the
   rollout names: as the candidate of an open stage, or as the release that all gateways have. The decisive rollout is
   the newest one with this release when the batch ended, because batches wait on gateways without a network, and a
   release that all gateways had before may be a candidate now.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta

from slmops.contracts.blueprint import Stage
from slmops.contracts.cohort import in_stage
from slmops.contracts.descriptor import Digest
from slmops.contracts.plan import Identity, Plan
from slmops.telemetry.domain.windows import Pending


@dataclass(frozen=True)
class Enrolled:
    """A gateway's newest enrolment, with its newest reported labels. `at`: when it was enrolled."""

    identity: Identity
    public_key: str
    at: datetime
    moved_from: str | None = None


def counts(enrolled: Enrolled, revoked_key: str, revoked_at: datetime) -> bool:
    """Returns whether a gateway counts although this key was revoked: it has another key now, or its own again.

    A credential of the revoked key is issued in a later second than the revocation, if at all.
    """
    # An enrolment that an earlier release recorded has no key. It was before every revocation.
    return enrolled.public_key not in ("", revoked_key) or enrolled.at >= revoked_at + timedelta(seconds=1)


@dataclass(frozen=True)
class Offer:
    """The gateways to which one rollout gives one release: stages 0 to `opened` of `stages`, or all if it is None."""

    rollout: str
    version: str
    since: datetime
    stages: tuple[Stage, ...] = ()
    opened: int | None = None

    def reaches(self, identity: Identity) -> bool:
        if self.opened is None:
            return True
        return any(in_stage(stage, self.rollout, identity) for stage in self.stages[: self.opened + 1])


def offers_of(plan: Plan, release: Digest, at: datetime) -> list[Offer]:
    """Returns a plan's offers of a release, with `at` as their start."""
    found = [
        Offer(f"plan {plan.generation}", known.version, at)
        for known in (plan.stable, plan.previous)
        if known is not None and known.manifest.digest == release
    ]
    candidate = plan.candidate
    if candidate is not None and candidate.release.manifest.digest == release:
        found.append(Offer(candidate.rollout, candidate.release.version, at, candidate.stages, candidate.stage))
    return found


def refusal(measured: Pending, enrolled: Identity | None, offers: Iterable[Offer]) -> str:
    """Returns why a batch does not count; empty if it counts. `offers` are those of its release and blueprint."""
    batch = measured.batch
    if enrolled is None:
        return f"{batch.gateway_id} is not enrolled"
    if batch.blueprint != enrolled.blueprint:
        return f"{batch.gateway_id} is enrolled under {enrolled.blueprint} but sent a batch for {batch.blueprint}"
    named = [offer for offer in offers if offer.version == batch.version]
    if not named:
        return f"no rollout of {batch.blueprint} has a release {batch.version} with digest {batch.release}"
    offer = _deciding(named, measured.ended_at)
    if not offer.reaches(enrolled):
        return f"rollout {offer.rollout} does not give {batch.version} to {batch.gateway_id}"
    return ""


def _deciding(offers: list[Offer], at: datetime) -> Offer:
    """Returns the newest offer at that time, or the first one if the gateway's clock is behind all of them."""
    begun = [offer for offer in offers if offer.since <= at]
    return max(begun, key=lambda offer: offer.since) if begun else min(offers, key=lambda offer: offer.since)
