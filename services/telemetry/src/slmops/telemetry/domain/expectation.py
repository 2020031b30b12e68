"""Whose measurements count. Pure.

What always holds
1. A batch counts for the blueprint that its gateway is enrolled under, and for no other.
2. It counts for a release that a rollout of this blueprint gives to this gateway, under the version that the rollout
   names: as its candidate in a stage that is open, or as the release that all gateways have. The rollout that decides
   is the newest with this release when the batch ended: batches wait on gateways without a network, and a release that
   everybody had before may be a canary's now.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

from slmops.contracts.blueprint import Stage
from slmops.contracts.cohort import in_stage
from slmops.contracts.descriptor import Digest
from slmops.contracts.measurement import MeasurementBatch
from slmops.contracts.plan import Identity, Plan


@dataclass(frozen=True)
class Offer:
    """To whom one rollout gives one release: stages 0 to `opened` of `stages`, or every gateway where it is None."""

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
    """Returns the offers of the plan that is valid at `at` for a release."""
    found = [
        Offer(f"plan {plan.generation}", known.version, at)
        for known in (plan.stable, plan.previous)
        if known is not None and known.manifest.digest == release
    ]
    candidate = plan.candidate
    if candidate is not None and candidate.release.manifest.digest == release:
        found.append(Offer(candidate.rollout, candidate.release.version, at, candidate.stages, candidate.stage))
    return found


def refusal(batch: MeasurementBatch, enrolled: Identity | None, offers: Iterable[Offer]) -> str:
    """Why a batch does not count; empty if it does. `offers` are those of its release under its blueprint."""
    if enrolled is None:
        return f"{batch.gateway_id} is not enrolled"
    if batch.blueprint != enrolled.blueprint:
        return f"{batch.gateway_id} is enrolled under {enrolled.blueprint} and measures for {batch.blueprint}"
    named = [offer for offer in offers if offer.version == batch.version]
    if not named:
        return f"no rollout of {batch.blueprint} has a release {batch.version} with digest {batch.release}"
    offer = _deciding(named, batch.ended_at)
    if not offer.reaches(enrolled):
        return f"rollout {offer.rollout} does not give {batch.version} to {batch.gateway_id}"
    return ""


def _deciding(offers: list[Offer], at: datetime) -> Offer:
    """The newest at that time; of a gateway whose clock is behind all of them, the first."""
    begun = [offer for offer in offers if offer.since <= at]
    return max(begun, key=lambda offer: offer.since) if begun else min(offers, key=lambda offer: offer.since)
