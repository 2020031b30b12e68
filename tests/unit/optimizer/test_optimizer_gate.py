"""The gate: which measurement breaks which limit, and the reasons it gives."""

from __future__ import annotations

import math

import pytest

from slmops.contracts.evaluation import Evaluation, Verdict
from slmops.contracts.profile import EDGE_SMALL
from slmops.optimizer.domain.gate import judge

GOOD = Evaluation(
    bytes=117_000_000,
    kl=0.17,
    kl_low=0.15,
    kl_high=0.19,
    top1=0.77,
    top1_low=0.75,
    top1_high=0.79,
    ppl=18.2,
    ppl_low=16.0,
    ppl_high=20.0,
    reference_ppl=15.8,
    tokens_per_s=70.0,
    ttft_s=0.08,
    peak_rss_bytes=280_000_000,
    tasks={"everyday": 0.6},
    golden_passed=3,
    golden_total=3,
    repetition=0.2,
    joules_per_token=0.5,
    joules_source="modelled",
)
DEMANDING = EDGE_SMALL.model_copy(
    update={
        "max_ppl_ratio": 1.3,
        "min_accuracy": {"everyday": 0.5},
        "all_golden": True,
        "max_repetition": 0.5,
        "max_joules_per_token": 1.0,
    }
)
ALWAYS_NEEDED = ("kl", "top1", "ppl", "reference_ppl", "tokens_per_s", "ttft_s", "peak_rss_bytes")
NEEDED_IF_LIMITED = ("repetition", "joules_per_token", "golden_passed")
INTERVALS = ("kl_low", "kl_high", "top1_low", "top1_high", "ppl_low", "ppl_high")
NO_NUMBERS = (math.nan, math.inf, -math.inf)


def but(**changes: object) -> Evaluation:
    return GOOD.model_copy(update=changes)


@pytest.mark.parametrize("profile", [EDGE_SMALL, DEMANDING])
def test_a_variant_within_every_limit_passes(profile):
    assert judge(GOOD, profile) == Verdict(passed=True, reasons=())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"bytes": 267_000_000}, "bytes 267 MB > 160 MB"),
        ({"kl": 0.36, "kl_high": 0.4}, "kl_high 0.4 > 0.3"),
        ({"kl_high": 0.31}, "kl_high 0.31 > 0.3"),
        ({"kl": 0.36, "kl_low": None, "kl_high": None}, "kl 0.36 > 0.3"),
        ({"top1_low": 0.64}, "top1_low 0.64 < 0.65"),
        ({"top1": 0.5, "top1_low": None}, "top1 0.5 < 0.65"),
        ({"ppl_high": 25.28}, "ppl_high 25.3 > 20.5"),
        ({"ppl": 25.28, "ppl_high": None}, "ppl 25.3 > 20.5"),
        ({"tokens_per_s": 1.5}, "tokens_per_s 1.5 < 5"),
        ({"peak_rss_bytes": 1_200_000_000}, "peak_rss_bytes 1200 MB > 1000 MB"),
        ({"tasks": {"everyday": 0.4}}, "task everyday 0.4 < 0.5"),
        ({"tasks": {"another": 1.0}}, "task everyday not measured, must be at least 0.5"),
        ({"golden_passed": 2}, "golden_passed 2 < 3"),
        ({"golden_passed": None, "golden_total": None}, "golden_passed not measured, must be at least 1"),
        ({"golden_passed": 0, "golden_total": 0}, "golden_passed not measured, must be at least 1"),
        ({"repetition": 0.9}, "repetition 0.9 > 0.5"),
        ({"joules_per_token": 2.0}, "joules_per_token 2 > 1"),
        ({"joules_per_token": None}, "joules_per_token not measured, must be at most 1"),
        ({"ttft_s": math.nan}, "ttft_s nan, must be a finite number"),
        ({"kl_high": math.nan}, "kl_high nan, must be at most 0.3"),
        ({"kl_high": 0.3000001}, "kl_high 0.3000001 > 0.3"),
    ],
)
def test_a_broken_limit_is_named_with_its_value(changes, reason):
    assert judge(but(**changes), DEMANDING) == Verdict(passed=False, reasons=(reason,))


@pytest.mark.parametrize("metric", [*ALWAYS_NEEDED, *NEEDED_IF_LIMITED, *INTERVALS])
@pytest.mark.parametrize("value", NO_NUMBERS)
def test_a_figure_that_is_not_finite_never_passes(metric, value):
    for profile in (EDGE_SMALL, DEMANDING):  # whether or not there is a limit on it
        reasons = judge(but(**{metric: value}), profile).reasons
        assert any(reason.startswith(metric) for reason in reasons), reasons


@pytest.mark.parametrize("metric", [*ALWAYS_NEEDED, *NEEDED_IF_LIMITED])
def test_a_missing_figure_never_passes(metric):
    reasons = judge(but(**{metric: None}), DEMANDING).reasons
    assert [reason for reason in reasons if reason.startswith(f"{metric} not measured")]


@pytest.mark.parametrize("value", NO_NUMBERS)
def test_an_accuracy_without_a_limit_must_be_finite(value):
    assert judge(but(tasks={"everyday": value}), EDGE_SMALL).reasons == (
        f"task everyday {value}, must be a finite number",
    )


@pytest.mark.parametrize("metric", NEEDED_IF_LIMITED)
def test_a_figure_without_a_limit_may_be_missing(metric):
    assert judge(but(**{metric: None}), EDGE_SMALL).passed


def test_an_interval_that_straddles_the_limit_fails():
    assert not judge(but(kl=0.29, kl_low=0.2, kl_high=0.38), EDGE_SMALL).passed
    assert judge(but(kl=0.29, kl_low=0.285, kl_high=0.295), EDGE_SMALL).passed


def test_two_releases_must_fit_on_the_disk():
    small_disk = EDGE_SMALL.model_copy(update={"disk_bytes": 200_000_000})
    assert judge(GOOD, small_disk).reasons == ("bytes 117 MB > 100 MB",)


def test_every_broken_limit_is_named():
    verdict = judge(but(kl_high=9.0, top1_low=0.0, tokens_per_s=math.nan), EDGE_SMALL)
    assert [reason.split()[0] for reason in verdict.reasons] == ["kl_high", "top1_low", "tokens_per_s"]


def test_a_variant_that_is_too_large_is_judged_by_its_bytes_alone():
    """It is not measured, and its other figures must not look like further faults."""
    large = EDGE_SMALL.max_package_bytes + 1_000_000
    assert [reason.split()[0] for reason in judge(Evaluation(bytes=large), EDGE_SMALL).reasons] == ["bytes"]
    assert len(judge(but(bytes=large, kl=math.nan), EDGE_SMALL).reasons) > 1
    assert "kl not measured" in judge(Evaluation(bytes=1), EDGE_SMALL).reasons[0]
