"""The probe, the last gate before a release serves: golden prompts, speed and memory, measured on this device."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass
from datetime import timedelta
from statistics import median

from slmops.contracts.errors import InferenceFailed
from slmops.contracts.prompts.golden import GoldenPrompt
from slmops.gateway.install.golden import GoldenPrompts
from slmops.gateway.serving.inference import Done, InferenceRequest
from slmops.gateway.serving.runner import Runner


@dataclass(frozen=True, slots=True)
class ProbeBudget:
    """The limits that a release must meet. Every bound is inclusive; a figure that is missing or NaN meets none."""

    min_tokens_per_s: float
    max_ttft_s: float
    max_rss_bytes: int
    min_pass_share: float = 1.0
    timeout: timedelta = timedelta(minutes=2)
    """For all prompts together."""


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """The result of one golden prompt. It has no field for the answer, which must not leave the gateway."""

    index: int
    passed: bool
    tokens: int


@dataclass(frozen=True, slots=True)
class ProbeReport:
    """The result of a probe. `tokens_per_s` and `ttft_s` are medians over the prompts; None: not measured."""

    passed: bool
    reasons: tuple[str, ...]
    tokens_per_s: float | None
    ttft_s: float | None
    peak_rss_bytes: int
    results: tuple[ProbeResult, ...]


async def probe(runner: Runner, golden: GoldenPrompts, budget: ProbeBudget) -> ProbeReport:
    """Runs every golden prompt in order with greedy decoding. A bad model raises nothing; the report says so."""
    done: list[Done] = []
    broken = None
    try:
        async with asyncio.timeout(budget.timeout.total_seconds()):
            for prompt in golden.prompts:
                done.append(await _ask(runner, golden.request(prompt)))
    except InferenceFailed as error:
        broken = f"prompt {len(done)} failed: {error.what}"
    except TimeoutError:
        broken = f"prompt {len(done)} was not answered within {budget.timeout.total_seconds():g} s for all"
    return judge(golden.prompts, done, budget, peak_rss_bytes=runner.peak_rss_bytes(), broken=broken)


def judge(
    golden: Sequence[GoldenPrompt],
    done: Sequence[Done],
    budget: ProbeBudget,
    *,
    peak_rss_bytes: int,
    broken: str | None = None,
) -> ProbeReport:
    """Decides whether the release passed. Pure.

    `done` holds the answers to the first prompts of `golden`, in order; `broken` is why the others have none.
    """
    results = tuple(
        ProbeResult(index, prompt.passes(answer.text), answer.completion_tokens)
        for index, (prompt, answer) in enumerate(zip(golden, done, strict=False))
    )
    tokens_per_s = _median([answer.tokens_per_s for answer in done if answer.tokens_per_s is not None])
    ttft_s = _median([answer.ttft_s for answer in done])
    right = sum(result.passed for result in results)
    checks = {
        "there are no golden prompts": len(golden) > 0,
        broken or "not every prompt was answered": broken is None and len(done) == len(golden),
        f"{right} of {len(golden)} golden prompts passed (required: {budget.min_pass_share:.0%})": bool(golden)
        and right / len(golden) >= budget.min_pass_share,
        f"{_shown(tokens_per_s)} tokens/s (minimum: {budget.min_tokens_per_s:g})": tokens_per_s is not None
        and tokens_per_s >= budget.min_tokens_per_s,
        f"{_shown(ttft_s)} s to the first token (maximum: {budget.max_ttft_s:g})": ttft_s is not None
        and ttft_s <= budget.max_ttft_s,
        # A peak of 0 means that the memory was not measured.
        f"{peak_rss_bytes} bytes of memory (maximum: {budget.max_rss_bytes})": 0
        < peak_rss_bytes
        <= budget.max_rss_bytes,
    }
    reasons = tuple(reason for reason, kept in checks.items() if not kept)
    return ProbeReport(not reasons, reasons, tokens_per_s, ttft_s, peak_rss_bytes, results)


async def _ask(runner: Runner, request: InferenceRequest) -> Done:
    async with aclosing(runner.generate(request)) as items:
        async for item in items:
            if isinstance(item, Done):
                return item
    raise InferenceFailed("the runner's answer stopped before it was complete")


def _median(values: list[float]) -> float | None:
    return median(values) if values else None


def _shown(value: float | None) -> str:
    return "unmeasured" if value is None else f"{value:.3g}"
