"""The Pareto front: the recipes that no other dominates, and a dominator of each of the others."""

from __future__ import annotations

import itertools
import math

import pytest

from slmops.contracts.evaluation import Evaluation, Verdict
from slmops.optimizer.domain.candidate import Candidate
from slmops.optimizer.domain.front import Front, front, on_front


def candidate(name: str, bytes: int, kl: float | None, tokens_per_s: float | None = 50.0) -> Candidate:
    evaluation = Evaluation(bytes=bytes, kl=kl, tokens_per_s=tokens_per_s)
    return Candidate(recipe=name, evaluation=evaluation, verdict=Verdict(passed=False))


@pytest.mark.parametrize(
    ("a", "b", "dominates"),
    [
        ((10, 0.1, 50.0), (11, 0.1, 50.0), True),
        ((10, 0.1, 50.0), (10, 0.2, 50.0), True),
        ((10, 0.1, 50.0), (10, 0.1, 49.0), True),
        ((10, 0.1, 50.0), (10, 0.1, 50.0), False),
        ((10, 0.1, 50.0), (9, 0.2, 50.0), False),
        ((10, 0.1, 50.0), (11, 0.2, 51.0), False),
    ],
)
def test_a_point_dominates_if_nothing_is_worse_and_something_is_better(a, b, dominates):
    found = front([candidate("a", *a), candidate("b", *b)])
    assert found.dominated == ({"b": "a"} if dominates else {})


def test_the_front_is_sorted_by_size_and_names_a_dominator_of_each_other_recipe():
    found = front(
        [
            candidate("int8", 135, 0.005, 60.0),
            candidate("stock-int8", 267, 0.005, 58.0),
            candidate("stock-int4", 86, 0.46, 79.0),
            candidate("tiny", 80, 0.3, 80.0),
            candidate("large", 140, 0.005, 59.0),
        ]
    )
    assert found == Front(
        recipes=("tiny", "int8"), dominated={"stock-int8": "int8", "stock-int4": "tiny", "large": "int8"}
    )


def test_equal_candidates_are_on_the_front_together():
    assert front([candidate("a", 10, 0.1), candidate("b", 10, 0.1)]).recipes == ("a", "b")


@pytest.mark.parametrize("kl", [None, math.nan, math.inf])
def test_a_candidate_without_measurements_is_neither_on_the_front_nor_dominated(kl):
    assert front([candidate("broken", 1, kl), candidate("a", 10, 0.1)]) == Front(recipes=("a",), dominated={})
    failed = Candidate(recipe="failed", evaluation=None, verdict=Verdict(passed=False, reasons=("no",)))
    assert front([failed]) == Front(recipes=(), dominated={})


def test_no_recipe_on_the_front_is_dominated_and_every_other_is_dominated_by_one_on_it():
    grid = itertools.product((1, 2, 3), (0.1, 0.2, 0.3), (10.0, 20.0, 30.0))
    points = {f"c{number}": point for number, point in enumerate(grid)}
    del points["c2"]  # the best of all
    found = front([candidate(name, *point) for name, point in points.items()])

    def no_worse(a: str, b: str) -> bool:
        (bytes_a, kl_a, speed_a), (bytes_b, kl_b, speed_b) = points[a], points[b]
        return a != b and bytes_a <= bytes_b and kl_a <= kl_b and speed_a >= speed_b

    assert set(found.recipes) | set(found.dominated) == set(points)
    assert not [(a, b) for a in points for b in found.recipes if no_worse(a, b)]
    assert all(by in found.recipes and no_worse(by, name) for name, by in found.dominated.items())


def test_the_front_of_a_panel():
    assert on_front([(3, 1), (1, 3), (2, 3), (2, 2), (4, 1)]) == [1, 3, 0]
