"""The choice among candidates, and NaN in JSON."""

from __future__ import annotations

import math

import pytest

from slmops.contracts.evaluation import Evaluation
from slmops.contracts.profile import EDGE_SMALL
from slmops.optimizer.domain.candidate import Candidate
from slmops.optimizer.domain.choice import choose
from slmops.optimizer.domain.gate import judge

INT4 = Evaluation(
    bytes=94_000_000,
    kl=0.17,
    top1=0.77,
    ppl=18.2,
    reference_ppl=15.8,
    tokens_per_s=80.0,
    ttft_s=0.08,
    peak_rss_bytes=280_000_000,
)
INT8 = INT4.model_copy(update={"bytes": 135_000_000, "kl": 0.005, "tokens_per_s": 60.0})
MIXED = INT4.model_copy(update={"bytes": 103_000_000, "kl": 0.06, "tokens_per_s": 90.0})


def candidate(recipe: str, evaluation: Evaluation, **changes: object) -> Candidate:
    evaluation = evaluation.model_copy(update=changes)
    return Candidate(recipe=recipe, evaluation=evaluation, verdict=judge(evaluation, EDGE_SMALL))


ANCHORED = INT4.model_copy(update={"bytes": 95_000_000, "kl": 0.18})
ALL = [candidate("int8", INT8), candidate("mixed", MIXED), candidate("int4", INT4)]


@pytest.mark.parametrize(
    ("prefer", "recipe", "reason"),
    [
        (
            "smallest",
            "int4",
            "int4: smallest of 3 that pass edge-small, 94 MB, KL 0.17, 80 tokens/s; "
            "the runner-up mixed would be 9 MB larger, at KL 0.06 and 90 tokens/s",
        ),
        (
            "best_quality",
            "int8",
            "int8: closest to the reference of 3 that pass edge-small, 135 MB, KL 0.005, 60 tokens/s; "
            "the runner-up mixed would be 32 MB smaller, at KL 0.06 and 90 tokens/s",
        ),
        (
            "fastest",
            "mixed",
            "mixed: fastest of 3 that pass edge-small, 103 MB, KL 0.06, 90 tokens/s; "
            "the runner-up int4 would be 9 MB smaller, at KL 0.17 and 80 tokens/s",
        ),
    ],
)
def test_the_best_candidate_is_chosen_in_any_order_and_compared_with_the_runner_up(prefer, recipe, reason):
    for order in (ALL, ALL[::-1]):
        choice = choose(order, EDGE_SMALL, prefer)
        assert (choice.recipe, choice.reason) == (recipe, reason)


def test_a_refused_candidate_is_never_chosen():
    small = candidate("small", INT4, bytes=1, kl=0.5)
    assert choose([small, *ALL], EDGE_SMALL).recipe == "int4"
    assert choose([small, candidate("only", INT8)], EDGE_SMALL).reason == (
        "only: smallest of 1 that pass edge-small, 135 MB, KL 0.005, 60 tokens/s"
    )


def test_nothing_is_chosen_when_nothing_passes():
    choice = choose([candidate("int4", INT4, kl=math.nan)], EDGE_SMALL)
    assert choice.recipe is None
    assert choice.reason == "nothing passes edge-small; int4 refused: kl nan, must be at most 0.3"
    assert choose([], EDGE_SMALL).recipe is None
    many = [candidate(f"r{number}", INT4, kl=1.0) for number in range(5)]
    assert choose(many, EDGE_SMALL).reason.endswith("r2 refused: kl 1 > 0.3; and 2 more")


def test_nan_survives_json_also_in_a_nested_model():
    evaluation = INT4.model_copy(update={"kl": math.nan})
    for text in (
        evaluation.model_dump_json(),
        candidate("int4", evaluation).model_dump_json(include={"evaluation"}),
    ):
        assert '"kl":"NaN"' in text
    again = Evaluation.model_validate_json(evaluation.model_dump_json())
    assert again.kl is not None
    assert math.isnan(again.kl)


def test_an_anchored_variant_is_preferred_to_a_slightly_smaller_one():
    variants = [*ALL, candidate("int4-anchored", ANCHORED)]
    choice = choose(variants, EDGE_SMALL, anchored=["int4-anchored"])
    assert choice.recipe == "int4-anchored"
    assert choice.reason == (
        "int4-anchored: on its predecessor's grids, for a small update; passes edge-small, 95 MB, KL 0.18, "
        "80 tokens/s; int4 on new grids would be 1 MB smaller, at KL 0.17 and 80 tokens/s"
    )
    assert choose(variants, EDGE_SMALL).recipe == "int4"


@pytest.mark.parametrize("changes", [{"kl": 9.0}, {"bytes": 97_000_000}], ids=str)
def test_an_anchored_variant_that_is_refused_or_large_is_not_chosen(changes):
    variants = [*ALL, candidate("int4-anchored", ANCHORED, **changes)]
    assert choose(variants, EDGE_SMALL, anchored=["int4-anchored"]).recipe == "int4"


@pytest.mark.parametrize("prefer", ["best_quality", "fastest"])
def test_anchoring_has_no_influence_if_size_is_not_preferred(prefer):
    variants = [*ALL, candidate("int4-anchored", ANCHORED)]
    anchored = choose(variants, EDGE_SMALL, prefer, anchored=["int4-anchored"])
    assert anchored == choose(variants, EDGE_SMALL, prefer)
