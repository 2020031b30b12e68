"""The gate and the choice."""

from __future__ import annotations

import math

import pytest

from slmops.contracts.evaluation import Evaluation, Verdict
from slmops.contracts.profile import EDGE_SMALL
from slmops.optimizer.domain import Candidate, choose, judge

GOOD = Evaluation(
    bytes=117_000_000,
    kl=0.17,
    top1=0.77,
    ppl=18.2,
    reference_ppl=15.8,
    tokens_per_s=70.0,
    ttft_s=0.08,
    peak_rss_bytes=280_000_000,
)
METRICS = [name for name in Evaluation.model_fields if name != "bytes"]


def but(**changes: object) -> Evaluation:
    return GOOD.model_copy(update=changes)


def test_a_variant_within_every_limit_passes():
    assert judge(GOOD, EDGE_SMALL) == Verdict(passed=True, reasons=())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"bytes": 267_000_000}, "bytes 267 MB > 160 MB"),
        ({"kl": 0.36}, "kl 0.36 > 0.3"),
        ({"top1": 0.5}, "top1 0.5 < 0.65"),
        ({"tokens_per_s": 1.5}, "tokens_per_s 1.5 < 5"),
        ({"peak_rss_bytes": 1_200_000_000}, "peak_rss_bytes 1200 MB > 1000 MB"),
        ({"kl": math.nan}, "kl nan, must be at most 0.3"),
        ({"tokens_per_s": math.inf}, "tokens_per_s inf, must be at least 5"),
        ({"kl": None}, "kl not measured, must be at most 0.3"),
        ({"ttft_s": math.nan}, "ttft_s nan, must be at most finite"),
    ],
)
def test_a_broken_limit_is_named_with_its_value(changes, reason):
    assert judge(but(**changes), EDGE_SMALL) == Verdict(passed=False, reasons=(reason,))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("value", [None, math.nan, math.inf, -math.inf])
def test_what_is_missing_or_no_number_never_passes(metric, value):
    verdict = judge(but(**{metric: value}), EDGE_SMALL)
    assert not verdict.passed
    assert any(reason.startswith(metric) for reason in verdict.reasons)


def test_two_releases_must_fit_on_the_disk():
    small_disk = EDGE_SMALL.model_copy(update={"disk_bytes": 200_000_000})
    assert judge(GOOD, small_disk).reasons == ("bytes 117 MB > 100 MB",)


def test_nan_survives_json_in_a_model_of_its_own_and_inside_another():
    evaluation = but(kl=math.nan)
    for text in (
        evaluation.model_dump_json(),
        candidate("int4", evaluation).model_dump_json(include={"evaluation"}),
    ):
        assert '"kl":"NaN"' in text
    again = Evaluation.model_validate_json(evaluation.model_dump_json())
    assert again.kl is not None
    assert math.isnan(again.kl)


def candidate(recipe: str, evaluation: Evaluation) -> Candidate:
    return Candidate(recipe=recipe, evaluation=evaluation, verdict=judge(evaluation, EDGE_SMALL))


def test_the_smallest_that_passes_is_chosen_and_the_others_are_explained():
    choice = choose([candidate("int8", but(bytes=267_000_000)), candidate("int4", GOOD)], EDGE_SMALL)
    assert choice.recipe == "int4"
    assert choice.reason == ("int4: smallest of 1 that pass edge-small, 117 MB; int8 refused: bytes 267 MB > 160 MB")


def test_of_two_that_pass_the_smaller_wins_in_either_order():
    both = [candidate("large", but(bytes=150_000_000)), candidate("small", GOOD)]
    assert {choose(order, EDGE_SMALL).recipe for order in (both, both[::-1])} == {"small"}


def test_nothing_is_chosen_when_nothing_passes():
    choice = choose([candidate("int4", but(kl=math.nan))], EDGE_SMALL)
    assert choice.recipe is None
    assert choice.reason == "nothing passes edge-small; int4 refused: kl nan, must be at most 0.3"
    assert choose([], EDGE_SMALL).recipe is None
