"""Gate and choice: pure decisions on measurements."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict

from slmops.contracts.evaluation import Evaluation, Verdict
from slmops.contracts.profile import DeviceProfile

RELEASES_ON_DISK = 2  # a gateway keeps the running release while it installs the next


class Candidate(BaseModel):
    """One recipe's variant before the choice."""

    model_config = ConfigDict(frozen=True)

    recipe: str
    evaluation: Evaluation
    verdict: Verdict


class Choice(BaseModel):
    """`recipe` is None if nothing passed. `reason` is one sentence for a person."""

    model_config = ConfigDict(frozen=True)

    recipe: str | None
    reason: str


class _Limit(NamedTuple):
    metric: str
    value: float | None
    bound: Literal["at most", "at least"]
    limit: float

    def refusal(self) -> str | None:
        """None if the limit is kept. A value that is absent, NaN or infinite keeps no limit."""
        name, value, bound, limit = self
        if value is None or not math.isfinite(value):
            return f"{name} {'not measured' if value is None else value}, must be {bound} {_shown(name, limit)}"
        if value <= limit if bound == "at most" else value >= limit:
            return None
        return f"{name} {_shown(name, value)} {'>' if bound == 'at most' else '<'} {_shown(name, limit)}"


def judge(evaluation: Evaluation, profile: DeviceProfile) -> Verdict:
    """Passed if every limit is kept and every measurement is a finite number: what is missing or NaN never passes."""
    e, p = evaluation, profile
    limits = (
        _Limit("bytes", e.bytes, "at most", min(p.max_package_bytes, p.disk_bytes // RELEASES_ON_DISK)),
        _Limit("kl", e.kl, "at most", p.max_kl),
        _Limit("top1", e.top1, "at least", p.min_top1),
        _Limit("ppl", e.ppl, "at most", math.inf),
        _Limit("reference_ppl", e.reference_ppl, "at most", math.inf),
        _Limit("tokens_per_s", e.tokens_per_s, "at least", p.min_tokens_per_s),
        _Limit("ttft_s", e.ttft_s, "at most", math.inf),
        _Limit("peak_rss_bytes", e.peak_rss_bytes, "at most", p.ram_bytes),
    )
    reasons = tuple(reason for limit in limits if (reason := limit.refusal()))
    return Verdict(passed=not reasons, reasons=reasons)


def choose(candidates: Sequence[Candidate], profile: DeviceProfile) -> Choice:
    """The smallest that passed; the order decides between equals."""
    passed = [c for c in candidates if c.verdict.passed]
    parts = [f"{c.recipe} refused: {', '.join(c.verdict.reasons)}" for c in candidates if not c.verdict.passed]
    if not passed:
        return Choice(recipe=None, reason="; ".join([f"nothing passes {profile.name}", *parts]))
    best = min(passed, key=lambda c: c.evaluation.bytes)
    size = _shown("bytes", best.evaluation.bytes)
    parts.insert(0, f"{best.recipe}: smallest of {len(passed)} that pass {profile.name}, {size}")
    return Choice(recipe=best.recipe, reason="; ".join(parts))


def _shown(metric: str, value: float) -> str:
    if not math.isfinite(value):
        return "finite"
    return f"{value / 1e6:.4g} MB" if metric.endswith("bytes") else f"{value:.3g}"
