"""Wrong clocks of gateways, as a remark for the operator. A gateway's clock decides nothing (`contracts.clocks`), but a
gateway whose clock is wrong may refuse valid metadata or certificates, and then a stage waits for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from typing import NamedTuple

from slmops.contracts.clocks import clock_text
from slmops.rollout.domain.gate import GateDecision, Verdict

NAMED = 5


class WrongClock(NamedTuple):
    """A gateway whose clock is `ahead` of the services', or behind if negative."""

    gateway_id: str
    ahead: timedelta


def clock_remark(found: Sequence[WrongClock]) -> str:
    """Returns a text that names up to `NAMED` gateways; empty if no clock is wrong.

    Like `the clock of gw-3 is 3:00:00 behind the services' clock: correct it`.
    """
    if not found:
        return ""
    texts = [f"the clock of {one.gateway_id} is {clock_text(one.ahead)}" for one in found[:NAMED]]
    more = ", and more clocks are wrong" if len(found) > NAMED else ""
    return f"{', '.join(texts)}{more}: correct {'it' if len(found) == 1 else 'them'}"


def with_clocks(decision: GateDecision, found: Sequence[WrongClock]) -> GateDecision:
    """Returns a gate's decision whose reason names the wrong clocks of the blueprint's gateways, if the gate waits."""
    remark = clock_remark(found)
    if not remark or decision.verdict not in (Verdict.WAITING, Verdict.OVERDUE):
        return decision
    return replace(decision, reason=f"{decision.reason}; {remark}")
