"""The query that summarizes the fleet, and the reasons for which a gateway needs attention."""

from __future__ import annotations

from enum import StrEnum
from typing import ClassVar

from pydantic import AwareDatetime, Field

from slmops.contracts.commands.base import Command, Result
from slmops.contracts.names import Name


class Attention(StrEnum):
    """Why a person should look at a gateway. A revoked gateway has only the first reason."""

    REVOKED = "revoked"
    FAILED = "failed"  # its newest report is about a failure
    OFFLINE = "offline"  # nothing arrived from it for `freshness.OFFLINE_AFTER`
    CLOCK = "clock"  # its clock differs from the services' by more than `clocks.TOLERANCE`
    DROPPED = "dropped"  # it dropped reports or measurements, which waited too long for a network
    CREDENTIAL = "credential"  # its credential is in the last part of its life, `freshness.CREDENTIAL_DUE`


class Tally(Result):
    """Numbers of gateways by value, the largest first. `others`: gateways with values that are not listed."""

    counts: dict[str, int] = Field(default_factory=dict)
    others: int = 0


class FleetSummary(Result):
    """Numbers of gateways. All but `standing` and the revoked ones of `attention` are of gateways that are not revoked.

    `profile` is that of the gateway's blueprint. A gateway that runs nothing yet has the version `none`.
    """

    gateways: int
    online: int
    offline: int
    standing: Tally
    phase: Tally
    version: Tally
    blueprint: Tally
    profile: Tally
    attention: Tally = Field(description="By `Attention`; a gateway may have several reasons, or none")
    at: AwareDatetime


class SummarizeFleet(Command[FleetSummary]):
    """Count the fleet, or the gateways of one blueprint, by state, version, blueprint, profile and attention."""

    service: ClassVar[str] = "rollout"
    name: ClassVar[str] = "summarize_fleet"
    blueprint: Name | None = None
