"""The gate: compares the measurements of a variant with the limits of a device profile.

Invariants
1. A variant fails if a figure with a declared limit is missing, or if any figure is not finite.
2. A figure with a confidence interval is judged at the worse end of the interval, because a single text may happen to
   suit a variant. More text narrows the interval, so a good variant can pass with enough text.
3. A refusal names the metric, its value and the limit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal, NamedTuple

from slmops.contracts.evaluation import Evaluation, Verdict
from slmops.contracts.profile import DeviceProfile

RELEASES_ON_DISK = 2  # a gateway keeps the running release while it installs the next

_REQUIRED = ("kl", "top1", "ppl", "reference_ppl", "tokens_per_s", "ttft_s", "peak_rss_bytes")
_INTERVALS = ("kl_low", "kl_high", "top1_low", "top1_high", "ppl_low", "ppl_high")
_OPTIONAL = (*_INTERVALS, "golden_passed", "repetition", "joules_per_token")


class Limit(NamedTuple):
    """One limit and the measured value. `limit` is infinite if the value only has to be finite."""

    metric: str
    value: float | None
    bound: Literal["at most", "at least"]
    limit: float

    @property
    def sound(self) -> bool:
        return self.value is not None and math.isfinite(self.value)

    @property
    def excess(self) -> float:
        """The share by which the value breaks the limit: 0 if the limit is kept, infinite for a non-finite value."""
        if self.value is None or not math.isfinite(self.value):
            return math.inf
        kept, limit = (self.value, self.limit) if self.bound == "at most" else (self.limit, self.value)
        if kept <= limit:
            return 0
        return kept / limit - 1 if limit > 0 else math.inf

    def refusal(self) -> str | None:
        """Returns why the limit refuses the variant; None if the limit is kept."""
        if not self.excess:
            return None
        name, value, bound, limit = self
        if value is None or not math.isfinite(value):
            must = f"{bound} {shown(name, limit)}" if math.isfinite(limit) else "a finite number"
            return f"{name} {'not measured' if value is None else value}, must be {must}"
        texts = shown(name, value), shown(name, limit)
        if texts[0] == texts[1]:
            texts = f"{value:.9g}", f"{limit:.9g}"
        return f"{name} {texts[0]} {'>' if bound == 'at most' else '<'} {texts[1]}"


def limits(evaluation: Evaluation, profile: DeviceProfile) -> list[Limit]:
    """Returns all limits of `profile`, then for every other measurement the limit that it must be finite.

    A variant with too many bytes is not measured further, so it is judged by its bytes alone.
    """
    if unmeasured(evaluation) and evaluation.bytes > max_bytes(profile):
        return [_bytes(evaluation, profile)]
    found = {limit.metric: limit for limit in _declared(evaluation, profile)}
    for metric in (*_REQUIRED, *_OPTIONAL):
        value = getattr(evaluation, metric)
        if metric in _REQUIRED or value is not None:
            found.setdefault(metric, Limit(metric, value, "at most", math.inf))
    for task, accuracy in evaluation.tasks.items():
        found.setdefault(f"task {task}", Limit(f"task {task}", accuracy, "at most", math.inf))
    return list(found.values())


def unmeasured(evaluation: Evaluation) -> bool:
    """Returns whether only the bytes are known."""
    return evaluation.kl is None and evaluation.tokens_per_s is None


def _bytes(evaluation: Evaluation, profile: DeviceProfile) -> Limit:
    return Limit("bytes", evaluation.bytes, "at most", max_bytes(profile))


def max_bytes(profile: DeviceProfile) -> int:
    return min(profile.max_package_bytes, profile.disk_bytes // RELEASES_ON_DISK)


def _declared(e: Evaluation, p: DeviceProfile) -> Iterator[Limit]:
    yield _bytes(e, p)
    yield _at_worst(e, "kl", "high", p.max_kl)
    yield _at_worst(e, "top1", "low", p.min_top1)
    yield Limit("tokens_per_s", e.tokens_per_s, "at least", p.min_tokens_per_s)
    yield Limit("peak_rss_bytes", e.peak_rss_bytes, "at most", p.ram_bytes)
    if p.max_ppl_ratio is not None:
        limit = math.inf if e.reference_ppl is None else p.max_ppl_ratio * e.reference_ppl
        yield _at_worst(e, "ppl", "high", limit)
    for task, accuracy in p.min_accuracy.items():
        yield Limit(f"task {task}", e.tasks.get(task), "at least", accuracy)
    if p.all_golden:
        yield Limit("golden_passed", e.golden_passed if e.golden_total else None, "at least", e.golden_total or 1)
    if p.max_repetition is not None:
        yield Limit("repetition", e.repetition, "at most", p.max_repetition)
    if p.max_joules_per_token is not None:
        yield Limit("joules_per_token", e.joules_per_token, "at most", p.max_joules_per_token)


def _at_worst(evaluation: Evaluation, metric: str, end: Literal["low", "high"], limit: float) -> Limit:
    """Returns the limit on the worse end of the interval, or on the value itself if there is no interval."""
    worst: float | None = getattr(evaluation, f"{metric}_{end}")
    bound: Literal["at most", "at least"] = "at most" if end == "high" else "at least"
    if worst is None:
        return Limit(metric, getattr(evaluation, metric), bound, limit)
    return Limit(f"{metric}_{end}", worst, bound, limit)


def judge(evaluation: Evaluation, profile: DeviceProfile) -> Verdict:
    """Returns the verdict: the variant passes if it keeps every limit."""
    reasons = tuple(reason for limit in limits(evaluation, profile) if (reason := limit.refusal()))
    return Verdict(passed=not reasons, reasons=reasons)


def shown(metric: str, value: float) -> str:
    """Formats a figure for people."""
    return f"{value / 1e6:.4g} MB" if metric.endswith("bytes") else f"{value:.3g}"
