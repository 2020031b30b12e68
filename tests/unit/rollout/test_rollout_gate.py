"""The gate passes, fails, or waits if evidence is missing."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from datetime import datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from unit.rollout.rollout_examples import (
    applied,
    at,
    committed,
    failed,
    failure,
    listed,
    member,
    report,
    started,
    window,
)
from unit.rollout.test_rollout_decide import PASSED, completed, judged, latest

from slmops.contracts.blueprint import GatePolicy
from slmops.contracts.events import UpdatePhase
from slmops.contracts.measurement import CohortWindow
from slmops.rollout.domain.blueprint import BlueprintState
from slmops.rollout.domain.fleet import Member
from slmops.rollout.domain.gate import GateDecision, Verdict, assess, judge, total
from slmops.rollout.domain.stages import (
    Place,
    Progress,
    RolloutProgress,
    StageTargets,
    Target,
    named,
    place,
    staging_of,
)

GEN = started("1.0.1", completed()).version
CANARY, FLEET = committed("gw-1", "canary", "1.0.1", GEN), member("gw-2")
GOOD = [window("1.0.1", 5)]
SOON = at(20)
DEADLINE_S = GatePolicy().deadline_s


def canary_stage(**gate: Any) -> BlueprintState:
    """Returns a state in which 1.0.0 is stable, and 1.0.1 started at 0 s and is in the canary stage."""
    return started("1.0.1", judged(started("1.0.0", applied(gate=GatePolicy(**gate))), PASSED, PASSED))


def look(
    members: list[Member],
    windows: list[CohortWindow],
    now: datetime = SOON,
    state: BlueprintState | None = None,
    **gate: Any,
) -> GateDecision:
    state = state or canary_stage(**gate)
    progress = placed(state, members)
    assert progress == listed(latest(state), members)
    return assess(state, latest(state), progress, windows, now)


def placed(state: BlueprintState, members: list[Member]) -> RolloutProgress:
    """Returns the progress of members by their places, as the service computes them one by one."""
    staging = staging_of(state)
    assert staging is not None
    found = {m.identity.gateway_id: place(staging, m.identity, m.report, m.failure) for m in members}
    places = {name: found[name] for name in sorted(found)}
    targets = [Target(name, place) for name, place in places.items() if place and place.stage <= latest(state).stage]
    counts = Counter((place.stage, place.progress) for place in places.values() if place)
    failed = [target for target in targets if target.place.progress is Progress.FAILED]
    return RolloutProgress(counts, failed, [t for t in targets if t.place.progress is Progress.WAITING])


def test_a_committed_and_measured_canary_passes() -> None:
    decision = look([CANARY, FLEET], GOOD)
    assert decision.verdict is Verdict.PASSED
    assert decision.reason == "1 of 1 gateways committed, 10 requests, 0 failed, 50.0 tokens/s"


def test_what_a_gateway_ran_before_it_was_moved_here_is_no_evidence() -> None:
    assert CANARY.report is not None
    before = CANARY.report.model_copy(update={"blueprint": "kiosk", "plan_generation": GEN + 50})
    decision = look([replace(CANARY, report=before), FLEET], GOOD)
    assert (decision.verdict, decision.reason) == (Verdict.WAITING, "gw-1 of 1 have not committed yet")


@pytest.mark.parametrize(
    ("members", "windows", "says"),
    [
        ([], GOOD, "no gateway is in this stage"),
        ([FLEET], GOOD, "no gateway is in this stage"),
        ([member("gw-1", "canary"), FLEET], GOOD, "gw-1 of 1 have not committed"),
        (
            [member("gw-1", "canary", report=report("gw-1", UpdatePhase.SOAKING, "1.0.1", GEN))],
            GOOD,
            "gw-1 of 1 have not",
        ),
        ([CANARY, FLEET], [], "0 of 1 requests measured"),
        ([CANARY, FLEET], [window("1.0.0", 5)], "0 of 1 requests measured"),
        ([CANARY, FLEET], [window("1.0.1", 5, requests=0)], "0 of 1 requests measured"),
    ],
)
def test_missing_evidence_waits_and_is_overdue_after_the_deadline(
    members: list[Member], windows: list[CohortWindow], says: str
) -> None:
    waiting, late = look(members, windows), look(members, windows, at(DEADLINE_S + 1))
    assert (waiting.verdict, late.verdict) == (Verdict.WAITING, Verdict.OVERDUE)
    assert says in waiting.reason
    assert late.reason == waiting.reason


def test_measurements_from_before_the_stage_do_not_count() -> None:
    assert look([CANARY], [window("1.0.1", -6)]).verdict is Verdict.WAITING
    state = judged(canary_stage(), PASSED, seconds=30)
    everybody = [CANARY, committed("gw-2", "fleet", "1.0.1", GEN)]
    assert look(everybody, [window("1.0.1", 24)], at(40), state).verdict is Verdict.WAITING
    assert look(everybody, [window("1.0.1", 30)], at(40), state).verdict is Verdict.PASSED


def test_a_stage_that_adds_no_gateway_is_judged_by_the_whole_rollout() -> None:
    state = judged(canary_stage(), PASSED, seconds=30)
    assert look([CANARY], [window("1.0.1", 5)], at(40), state).verdict is Verdict.PASSED
    assert look([CANARY], [window("1.0.1", -6)], at(40), state).verdict is Verdict.WAITING


def test_every_target_of_the_stage_must_commit() -> None:
    state = judged(canary_stage(), PASSED, seconds=30)
    decision = look([CANARY, FLEET, member("gw-3")], [window("1.0.1", 35)], at(40), state)
    assert (decision.verdict, decision.reason) == (Verdict.WAITING, "gw-2, gw-3 of 3 have not committed yet")


def test_fewer_requests_than_required_wait() -> None:
    assert look([CANARY], GOOD, min_requests=11).verdict is Verdict.WAITING
    assert look([CANARY], [*GOOD, window("1.0.1", 10, requests=1)], min_requests=11).verdict is Verdict.PASSED


def test_a_failed_canary_fails_the_gate_with_its_own_reason() -> None:
    decision = look([failed("gw-1", "canary", "1.0.1", GEN), FLEET], GOOD)
    assert decision.verdict is Verdict.FAILED
    assert decision.reason == "gw-1 failed the candidate: it talks nonsense"


def test_a_failure_needs_no_measurement_and_no_deadline() -> None:
    assert look([failed("gw-1", "canary", "1.0.1", GEN)], [], at(0)).verdict is Verdict.FAILED


@pytest.mark.parametrize("generation", [0, GEN - 1])
def test_a_report_on_an_older_plan_does_not_count(generation: int) -> None:
    assert look([failed("gw-1", "canary", "1.0.1", generation)], GOOD).verdict is Verdict.WAITING
    assert look([committed("gw-1", "canary", "1.0.1", generation)], GOOD).verdict is Verdict.WAITING


def test_a_failure_of_another_release_does_not_count() -> None:
    assert look([failed("gw-1", "canary", "1.0.0", GEN)], GOOD).verdict is Verdict.WAITING
    assert look([committed("gw-1", "canary", "1.0.0", GEN)], GOOD).verdict is Verdict.WAITING


def test_a_gateway_that_committed_after_a_failure_is_committed() -> None:
    both = replace(CANARY, failure=failure("gw-1", "1.0.1", GEN))
    assert look([both], GOOD).verdict is Verdict.PASSED


def test_as_many_failures_as_allowed_are_tolerated_and_one_more_is_not() -> None:
    state = judged(canary_stage(max_failed_gateways=1), PASSED, seconds=30)
    windows = [window("1.0.1", 35)]
    one = [CANARY, failed("gw-2", "fleet", "1.0.1", GEN)]
    assert look(one, windows, at(40), state).verdict is Verdict.PASSED
    assert look([*one, failed("gw-3", "fleet", "1.0.1", GEN)], windows, at(40), state).verdict is Verdict.FAILED


def test_a_stage_in_which_everybody_failed_never_passes() -> None:
    decision = look([failed("gw-1", "canary", "1.0.1", GEN)], GOOD, max_failed_gateways=1)
    assert (decision.verdict, decision.reason) == (Verdict.WAITING, "no gateway of this stage committed")


def test_golden_prompts_that_fail_in_service_fail_the_gate() -> None:
    decision = look([CANARY], [window("1.0.1", 5, golden_failed=1)])
    assert (decision.verdict, decision.reason) == (Verdict.FAILED, "1 of 6 golden prompts failed in service")


def test_the_error_rate_fails_above_its_limit_and_not_at_it() -> None:
    assert look([CANARY], [window("1.0.1", 5, failed_requests=1)], max_error_rate=0.1).verdict is Verdict.PASSED
    decision = look([CANARY], [window("1.0.1", 5, failed_requests=2)], max_error_rate=0.1)
    assert (decision.verdict, decision.reason) == (Verdict.FAILED, "2 of 10 requests failed, more than 10.00%")


def test_failed_requests_below_the_minimum_do_not_fail_the_gate() -> None:
    assert look([CANARY], [window("1.0.1", 5, failed_requests=10)], min_requests=11).verdict is Verdict.WAITING


def test_a_slow_candidate_waits_and_fails_after_the_deadline() -> None:
    windows = [window("1.0.0", 5), window("1.0.1", 5, decode_seconds=8.5)]
    decision = look([CANARY], windows)
    assert decision.verdict is Verdict.WAITING
    assert decision.reason == "slower than the gate allows: 23.5 tokens/s against 50.0 of stable"
    assert look([CANARY], windows, at(DEADLINE_S + 1)).verdict is Verdict.FAILED
    assert look([CANARY], [window("1.0.0", 5), window("1.0.1", 5, decode_seconds=8)]).verdict is Verdict.PASSED


@pytest.mark.parametrize("stable_s", [0.0004, 0.99])
def test_a_stable_that_decoded_for_milliseconds_is_not_compared(stable_s: float) -> None:
    slow = window("1.0.1", 5, decode_seconds=100.0)
    stable = window("1.0.0", 5, decode_seconds=stable_s)
    assert look([CANARY], [slow, stable]).reason.endswith(", 2.0 tokens/s")
    assert look([CANARY], [slow, stable]).verdict is Verdict.PASSED
    assert look([CANARY], [slow, stable], min_decode_s=stable_s).verdict is Verdict.WAITING


def test_a_candidate_that_looks_slow_for_a_moment_is_held_and_never_rolled_back() -> None:
    brief = window("1.0.1", 5, completion_tokens=4, decode_seconds=0.5)
    windows = [brief, window("1.0.0", 5)]
    decision, late = look([CANARY], windows), look([CANARY], windows, at(DEADLINE_S + 1))
    assert (decision.verdict, late.verdict) == (Verdict.WAITING, Verdict.OVERDUE)
    assert decision.reason == "8.0 tokens/s against 50.0 of stable, measured for 0.5 s of the required 1 s"
    assert look([CANARY], windows, at(DEADLINE_S + 1), min_decode_s=0.5).verdict is Verdict.FAILED


def test_speed_is_compared_in_the_windows_that_both_have() -> None:
    """Stable ran alone under low load. In the common windows both are equally slow."""
    windows = [window("1.0.0", 5), window("1.0.0", 10, decode_seconds=20.0), window("1.0.1", 10, decode_seconds=20.0)]
    assert look([CANARY], windows).verdict is Verdict.PASSED
    apart = [window("1.0.0", 5), window("1.0.1", 10, decode_seconds=20.0)]
    assert look([CANARY], apart).verdict is Verdict.WAITING


def test_an_unmeasured_candidate_does_not_pass_if_stable_is_measured() -> None:
    silent = window("1.0.1", 5, completion_tokens=0, decode_seconds=0.0)
    assert look([CANARY], [silent]).verdict is Verdict.PASSED
    assert look([CANARY], [silent, window("1.0.0", 5)]).verdict is Verdict.WAITING
    assert look([CANARY], [silent, window("1.0.0", 5)], at(DEADLINE_S + 1)).verdict is Verdict.OVERDUE


@pytest.mark.parametrize("odd", [math.nan, math.inf, -1.0])
def test_a_window_with_an_impossible_number_of_seconds_is_rejected(odd: float) -> None:
    with pytest.raises(ValidationError):
        window("1.0.1", 5, decode_seconds=odd)


def test_the_same_package_under_new_settings_is_not_compared_with_itself() -> None:
    state = canary_stage()
    rollout = latest(state)
    again = replace(rollout, previous=rollout.candidate)
    slow = [window("1.0.1", 5), window("1.0.1", 5, decode_seconds=100.0)]
    assert assess(state, again, listed(again, [CANARY]), slow, at(20)).verdict is Verdict.PASSED


def test_windows_add_up() -> None:
    summed = total([window("1.0.1", 5, gateways=2), window("1.0.1", 10, failed_requests=1)])
    assert summed is not None
    assert (summed.requests, summed.failed_requests, summed.gateways) == (20, 1, 2)
    assert (summed.started_at, summed.ended_at) == (at(5), at(15))
    assert summed.tokens_per_s == 50
    assert total([]) is None


def test_many_gateways_are_named_in_short() -> None:
    first = [Target(f"gw-{n}", Place(0, Progress.WAITING)) for n in range(7)]
    assert named(first, 99) == "gw-0, gw-1, gw-2, gw-3, gw-4 and 94 more"
    assert named(first[:2], 2) == "gw-0, gw-1"


def test_no_gate_is_decided_while_the_gateways_are_still_being_counted() -> None:
    for members in ([CANARY], [failed("gw-1", "canary", "1.0.1", GEN)], []):
        state = canary_stage()
        progress = replace(listed(latest(state), members), complete=False)
        decision = assess(state, latest(state), progress, GOOD, at(DEADLINE_S + 1))
        assert decision.verdict is Verdict.WAITING


@given(
    reached=st.lists(st.sampled_from(Progress), max_size=6),
    requests=st.integers(0, 5),
    failures=st.integers(0, 5),
    golden_failed=st.integers(0, 1),
    allowed=st.integers(0, 2),
    seconds=st.floats(0, 2 * DEADLINE_S),
)
def test_only_evidence_passes_the_gate(
    reached: list[Progress], requests: int, failures: int, golden_failed: int, allowed: int, seconds: float
) -> None:
    found = [Target(f"gw-{n}", Place(0, progress)) for n, progress in enumerate(reached)]
    numbers = (reached.count(progress) for progress in (Progress.COMMITTED, Progress.FAILED, Progress.WAITING))
    of = {p: [target for target in found if target.place.progress is p] for p in Progress}
    targets = StageTargets(*numbers, of[Progress.FAILED], of[Progress.WAITING])
    windows = [
        window("1.0.1", 5, requests=requests, failed_requests=min(failures, requests), golden_failed=golden_failed)
    ]
    policy = GatePolicy(min_requests=2, max_error_rate=0.2, max_failed_gateways=allowed)
    decision = judge(targets, windows, [], policy, at(0), at(seconds))
    evidence = (
        Progress.COMMITTED in reached
        and Progress.WAITING not in reached
        and reached.count(Progress.FAILED) <= allowed
        and requests >= 2
        and min(failures, requests) / requests <= 0.2
        and not golden_failed
    )
    assert (decision.verdict is Verdict.PASSED) == evidence
    assert decision.reason
