"""Several jobs for one version: a later recipe, a search, and a failed job."""

from __future__ import annotations

from itertools import permutations

import pytest
from unit.registry.registry_examples import at
from unit.registry.test_registry_store import BLOB, INT4, JOB, NO_INT8, REGISTERED, STARTED, view

from slmops.contracts.errors import Problem
from slmops.contracts.events import Event, VariantRejected, VariantStarted

LATER = {**JOB, "job": "k"}
CANCELLED = VariantRejected(
    **LATER, recipe="int4", problem=Problem(code="job_cancelled", what="cancelled"), reason="cancelled", at=at(9)
)
FINER = INT4.model_copy(update={"job": "k", "recipe": "finer", "at": at(9)})


@pytest.mark.parametrize("events", permutations([INT4, CANCELLED]))
def test_a_failed_job_does_not_replace_results_of_another_job(events: tuple[Event, ...]) -> None:
    [variant] = view(REGISTERED, *events).variants
    assert (variant.gate, variant.chosen, variant.report) == ("passed", True, BLOB)


def test_a_variant_without_measurements_shows_the_reason() -> None:
    [variant] = view(REGISTERED, CANCELLED).variants
    assert (variant.gate, variant.reason) == ("refused", "cancelled")


@pytest.mark.parametrize("events", permutations([INT4, FINER]))
def test_the_newest_choice_counts(events: tuple[Event, ...]) -> None:
    chosen = {variant.recipe: variant.chosen for variant in view(REGISTERED, *events).variants}
    assert chosen == {"int4": False, "finer": True}


def test_a_search_that_found_another_recipe_is_not_refused() -> None:
    began = VariantStarted(**LATER, recipes=("int8",), at=at(6))
    assert view(REGISTERED, began, NO_INT8).stage == "refused"
    assert view(REGISTERED, began, NO_INT8, FINER).stage == "optimizing"


def test_a_version_lists_its_files() -> None:
    found = view(REGISTERED, STARTED)
    assert (found.files, found.golden) == (REGISTERED.files, REGISTERED.golden)
