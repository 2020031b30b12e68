"""Batches count only from the gateway, blueprint, release and stage that enrolment and rollouts expect."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest
from unit.telemetry.test_telemetry_windows import at, batch, release

from slmops.contracts.blueprint import Stage
from slmops.contracts.plan import Candidate, Identity, Plan
from slmops.telemetry.domain.expectation import Offer, offers_of, refusal
from slmops.telemetry.domain.windows import Pending

STAGES = (Stage(name="canary", selector={"ring": "canary"}), Stage(name="half", percent=50), Stage(name="fleet"))
LONG_AGO, NOW = at(-1000), at(0)


def measured(identity: str, ended: float, **changes: Any) -> Pending:
    return Pending(batch(identity, ended, **changes), at(ended))


def gateway(ring: str = "fleet", blueprint: str = "edge-chat") -> Identity:
    return Identity(gateway_id="gw-1", blueprint=blueprint, labels={"ring": ring})


def canary_of(rollout: str = "r-1", since: datetime = NOW, opened: int | None = 0) -> Offer:
    return Offer(rollout, "1.0.0", since, STAGES, opened)


def test_only_the_canary_is_expected_while_its_stage_is_open() -> None:
    assert refusal(measured("a", 5), gateway("canary"), [canary_of()]) == ""
    assert refusal(measured("a", 5), gateway(), [canary_of()]) == "rollout r-1 does not give 1.0.0 to gw-1"


def test_opening_a_stage_only_adds_gateways() -> None:
    assert refusal(measured("a", 5), gateway("canary"), [canary_of(opened=2)]) == ""
    assert refusal(measured("a", 5), gateway(), [canary_of(opened=2)]) == ""


def test_a_completed_rollout_gives_its_release_to_everybody() -> None:
    assert refusal(measured("a", 5), gateway(), [canary_of(opened=None)]) == ""


@pytest.mark.parametrize(
    ("enrolled", "changes", "why"),
    [
        (None, {}, "gw-1 is not enrolled"),
        (gateway(blueprint="kiosk"), {}, "gw-1 is enrolled under kiosk but sent a batch for edge-chat"),
        (gateway("canary"), {"version": "2.0.0"}, "no rollout of edge-chat has a release 2.0.0"),
    ],
)
def test_an_unexpected_batch_is_rejected_with_its_reason(
    enrolled: Identity | None, changes: dict[str, Any], why: str
) -> None:
    assert refusal(measured("a", 5, **changes), enrolled, [canary_of()]).startswith(why)


def test_without_an_offer_nothing_is_expected() -> None:
    assert "no rollout of edge-chat has a release 1.0.0" in refusal(measured("a", 5), gateway(), [])


def test_the_newest_rollout_decides_about_a_release_that_everybody_had() -> None:
    """The release was rolled back, and a second rollout begins with its canary."""
    before, now = canary_of("r-1", LONG_AGO, opened=None), canary_of("r-2", NOW)
    for offers in ([before, now], [now, before]):
        assert refusal(measured("a", 5), gateway(), offers) == "rollout r-2 does not give 1.0.0 to gw-1"
        assert refusal(measured("a", 5), gateway("canary"), offers) == ""
        assert refusal(measured("late", -5), gateway(), offers) == "", "it waited for a network since the first rollout"


def test_a_batch_older_than_all_rollouts_is_judged_by_the_first() -> None:
    assert refusal(measured("a", -5), gateway("canary"), [canary_of()]) == ""
    assert refusal(measured("a", -5), gateway(), [canary_of()]) != ""


def test_a_plan_offers_its_three_releases() -> None:
    candidate = Candidate(rollout="r-9", release=release("3.0.0"), stages=STAGES, stage=1)
    plan = Plan(
        blueprint="edge-chat",
        generation=4,
        stable=release("2.0.0"),
        previous=release("1.0.0"),
        candidate=candidate,
    )
    digests = {version: release(version).manifest.digest for version in ("1.0.0", "2.0.0", "3.0.0")}
    assert offers_of(plan, digests["1.0.0"], NOW) == [Offer("plan 4", "1.0.0", NOW)]
    assert offers_of(plan, digests["2.0.0"], NOW) == [Offer("plan 4", "2.0.0", NOW)]
    assert offers_of(plan, digests["3.0.0"], NOW) == [Offer("r-9", "3.0.0", NOW, STAGES, 1)]
    assert offers_of(plan, release("4.0.0").manifest.digest, NOW) == []
