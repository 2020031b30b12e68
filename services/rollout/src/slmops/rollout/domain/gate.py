"""The gate between two stages. It compares candidate and stable, measured at the same time on one blueprint's gateways.

Invariants
1. Without a target, a report or a measurement the gate waits. Missing or NaN figures never pass.
2. Failures fail the gate: more failed gateways than the policy allows, wrong answers to golden prompts, or too many
   failed requests.
3. Slowness fails the gate only after the deadline, because tokens/s over a few seconds is noisy and more windows may
   come. With less decoding time than the policy's minimum there is no judgement: on an idle fleet it is milliseconds.
4. After the deadline a waiting gate is overdue: an operator should check.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum

from slmops.contracts.blueprint import GatePolicy
from slmops.contracts.measurement import CohortWindow
from slmops.rollout.domain.blueprint import BlueprintState, Rollout
from slmops.rollout.domain.stages import RolloutProgress, StageTargets, named


class Verdict(StrEnum):
    PASSED = "passed"
    FAILED = "failed"
    WAITING = "waiting"
    OVERDUE = "overdue"


@dataclass(frozen=True)
class GateDecision:
    verdict: Verdict
    reason: str


def assess(
    state: BlueprintState,
    rollout: Rollout,
    progress: RolloutProgress,
    windows: Iterable[CohortWindow],
    now: datetime,
) -> GateDecision:
    """Evaluates the gate of the open stage. `windows` are all of the blueprint. Growth: the stages and the windows."""
    if not progress.complete:
        return GateDecision(Verdict.WAITING, "the stages' gateways are still being counted")
    since = measured_since(rollout, progress)
    # A window that was open at that moment counts: on an idle fleet only the short soak is measured.
    recent = [window for window in windows if window.ended_at > since]
    return judge(
        progress.targets(rollout.stage),
        of_release(recent, rollout.candidate.manifest.digest),
        stable_windows(rollout, recent),
        state.gate_of(rollout),
        rollout.judged_since,
        now,
    )


def measured_since(rollout: Rollout, progress: RolloutProgress) -> datetime:
    """Returns the time from which measurements count: the start of the stage, because it judges the added gateways.

    A stage that added no gateways is judged by the whole rollout.
    """
    if rollout.stage == 0 or progress.added(rollout.stage):
        return rollout.stage_started_at
    return rollout.started_at


def judge(
    targets: StageTargets,
    candidate: Sequence[CohortWindow],
    stable: Sequence[CohortWindow],
    policy: GatePolicy,
    since: datetime,
    now: datetime,
) -> GateDecision:
    """Decides a gate. `candidate` and `stable` are the windows that ended in this stage; the deadline starts at
    `since`."""
    overdue = now - since > timedelta(seconds=policy.deadline_s)
    measured = total(candidate)
    if failure := _failure(targets, measured, policy):
        return GateDecision(Verdict.FAILED, failure)
    missing = _missing(targets, measured, policy)
    if missing or measured is None:
        return GateDecision(Verdict.OVERDUE if overdue else Verdict.WAITING, missing)
    speed, slower = _speed(candidate, stable, policy)
    if slower is not None:
        if not overdue:
            return GateDecision(Verdict.WAITING, speed)
        return GateDecision(Verdict.FAILED if slower else Verdict.OVERDUE, speed)
    share = f"{targets.committed} of {targets.total} gateways committed"
    return GateDecision(
        Verdict.PASSED, f"{share}, {measured.requests} requests, {measured.failed_requests} failed, {speed}"
    )


def total(windows: Sequence[CohortWindow]) -> CohortWindow | None:
    """Returns the sum of windows of one release, or None. `gateways` is the largest number in one window."""
    if not windows:
        return None
    first = windows[0]
    return CohortWindow(
        blueprint=first.blueprint,
        release=first.release,
        version=first.version,
        started_at=min(w.started_at for w in windows),
        ended_at=max(w.ended_at for w in windows),
        gateways=max(w.gateways for w in windows),
        requests=sum(w.requests for w in windows),
        failed_requests=sum(w.failed_requests for w in windows),
        golden_passed=sum(w.golden_passed for w in windows),
        golden_failed=sum(w.golden_failed for w in windows),
        completion_tokens=sum(w.completion_tokens for w in windows),
        decode_seconds=sum(w.decode_seconds for w in windows),
        ttft_seconds=sum(w.ttft_seconds for w in windows),
    )


def of_release(windows: Iterable[CohortWindow], digest: str | None) -> list[CohortWindow]:
    return [window for window in windows if window.release == digest]


def stable_windows(rollout: Rollout, windows: Iterable[CohortWindow]) -> list[CohortWindow]:
    """Returns the windows of the stable release. They are empty if only settings change, because then both sides have
    the same digest."""
    previous = rollout.previous
    if previous is None or previous.manifest.digest == rollout.candidate.manifest.digest:
        return []
    return of_release(windows, previous.manifest.digest)


def _failure(targets: StageTargets, measured: CohortWindow | None, policy: GatePolicy) -> str:
    if targets.failed > policy.max_failed_gateways:
        first = targets.first_failed
        problem = first[0].place.problem if first else ""
        return f"{named(first, targets.failed)} failed the candidate: {problem or 'no reason given'}"
    if measured is None:
        return ""
    if measured.golden_failed:
        asked = measured.golden_failed + measured.golden_passed
        return f"{measured.golden_failed} of {asked} golden prompts failed in service"
    rate = measured.error_rate
    if measured.requests >= policy.min_requests and rate is not None and rate > policy.max_error_rate:
        failures = f"{measured.failed_requests} of {measured.requests} requests failed"
        return f"{failures}, more than {policy.max_error_rate:.2%}"
    return ""


def _missing(targets: StageTargets, measured: CohortWindow | None, policy: GatePolicy) -> str:
    if not targets.total:
        return "no gateway is in this stage"
    if targets.waiting:
        return f"{named(targets.first_waiting, targets.waiting)} of {targets.total} have not committed yet"
    if not targets.committed:
        return "no gateway of this stage committed"
    requests = measured.requests if measured else 0
    if measured is None or requests < policy.min_requests or measured.error_rate is None:
        return f"{requests} of {policy.min_requests} requests measured in this stage"
    return ""


def _speed(
    candidate: Sequence[CohortWindow], stable: Sequence[CohortWindow], policy: GatePolicy
) -> tuple[str, bool | None]:
    """Returns a text about tokens/s, and whether the candidate is too slow: None means no objection, False unknown."""
    ours, theirs = _same_time(candidate, stable)
    new, old = ours and ours.tokens_per_s, theirs and theirs.tokens_per_s
    if not (theirs and old) or theirs.decode_seconds < policy.min_decode_s:
        return (f"{new:.1f} tokens/s" if new else "no tokens/s measured"), None
    if not (ours and new):
        return f"the candidate's tokens/s is not measured, stable has {old:.1f}", False
    text = f"{new:.1f} tokens/s against {old:.1f} of stable"
    if new >= (1 - policy.max_slowdown) * old:  # false for NaN
        return text, None
    if ours.decode_seconds < policy.min_decode_s:
        return f"{text}, measured for {ours.decode_seconds:.2g} s of the required {policy.min_decode_s:g} s", False
    return f"slower than the gate allows: {text}", True


def _same_time(
    candidate: Sequence[CohortWindow], stable: Sequence[CohortWindow]
) -> tuple[CohortWindow | None, CohortWindow | None]:
    """Returns the sums over the windows that both sides have, because load changes over the day; over all windows if
    they share none."""
    shared = _decoding(candidate) & _decoding(stable)
    if not shared:
        return total(candidate), total(stable)
    return (
        total([w for w in candidate if w.started_at in shared]),
        total([w for w in stable if w.started_at in shared]),
    )


def _decoding(windows: Iterable[CohortWindow]) -> set[datetime]:
    return {window.started_at for window in windows if window.decode_seconds > 0}
