"""The probe's decision: which releases pass. A missing or NaN figure never passes."""

from dataclasses import asdict, replace
from math import inf, nan

import pytest

from slmops.contracts.prompts.golden import GoldenPrompt
from slmops.gateway.install.probe import ProbeBudget, judge
from slmops.gateway.serving.inference import Done

GOLDEN = [GoldenPrompt(prompt=f"{n}?", expect=(f"right {n}",)) for n in range(4)]
BUDGET = ProbeBudget(min_tokens_per_s=10, max_ttft_s=1, max_rss_bytes=1000)


def done(
    text: str = "all of it: right 0, right 1, right 2, right 3", tokens_per_s: float | None = 50.0, ttft_s: float = 0.1
) -> Done:
    return Done(text, "stop", prompt_tokens=5, completion_tokens=7, ttft_s=ttft_s, tokens_per_s=tokens_per_s)


def test_a_good_release_passes_without_reasons() -> None:
    report = judge(GOLDEN, [done()] * 4, BUDGET, peak_rss_bytes=1000)
    assert (report.passed, report.reasons) == (True, ())
    assert (report.tokens_per_s, report.ttft_s, report.peak_rss_bytes) == (50.0, 0.1, 1000)


def test_a_report_contains_no_text_of_an_answer() -> None:
    report = judge(GOLDEN, [done("the secret, right 0")] * 4, BUDGET, peak_rss_bytes=10)
    assert [result.passed for result in report.results] == [True, False, False, False]
    assert "secret" not in str(asdict(report))


def test_fast_nonsense_does_not_pass() -> None:
    report = judge(GOLDEN, [done("the the the the", tokens_per_s=9999)] * 4, BUDGET, peak_rss_bytes=10)
    assert not report.passed
    assert report.reasons == ("0 of 4 golden prompts passed (required: 100%)",)


def test_the_required_share_of_prompts_can_be_lowered() -> None:
    answers = [done(), done(), done(), done("wrong")]
    assert not judge(GOLDEN, answers, BUDGET, peak_rss_bytes=10).passed
    assert judge(GOLDEN, answers, replace(BUDGET, min_pass_share=0.75), peak_rss_bytes=10).passed


@pytest.mark.parametrize(
    ("answers", "peak", "reason"),
    [
        ([done(tokens_per_s=9.9)] * 4, 10, "tokens/s"),
        ([done(tokens_per_s=nan)] * 4, 10, "tokens/s"),
        ([done(tokens_per_s=None)] * 4, 10, "unmeasured tokens/s"),
        ([done(ttft_s=1.1)] * 4, 10, "first token"),
        ([done(ttft_s=nan)] * 4, 10, "first token"),
        ([done(ttft_s=inf)] * 4, 10, "first token"),
        ([done()] * 4, 1001, "memory"),
        ([done()] * 4, 0, "memory"),
        ([done()] * 3, 10, "not every prompt"),
        ([], 10, "not every prompt"),
    ],
)
def test_a_figure_outside_the_budget_never_passes(answers: list[Done], peak: int, reason: str) -> None:
    report = judge(GOLDEN, answers, BUDGET, peak_rss_bytes=peak)
    assert not report.passed
    assert any(reason in text for text in report.reasons)


@pytest.mark.parametrize("field", ["min_tokens_per_s", "max_ttft_s", "min_pass_share"])
def test_a_budget_of_nan_passes_nothing(field: str) -> None:
    assert not judge(GOLDEN, [done()] * 4, replace(BUDGET, **{field: nan}), peak_rss_bytes=10).passed


def test_without_golden_prompts_no_budget_passes() -> None:
    budget = ProbeBudget(min_tokens_per_s=0, max_ttft_s=inf, max_rss_bytes=10**12, min_pass_share=0)
    report = judge([], [], budget, peak_rss_bytes=10)
    assert not report.passed
    assert "there are no golden prompts" in report.reasons
