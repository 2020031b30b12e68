"""A search proposes promising recipes, keeps its budget, and continues after a kill.

It runs on a simulated model with the sizes and the order of divergences of SmolLM2.
"""

from __future__ import annotations

from datetime import timedelta

import pytest
from pydantic import JsonValue

from slmops.contracts.errors import InvalidRecipe
from slmops.contracts.evaluation import Evaluation, Verdict
from slmops.contracts.profile import EDGE_SMALL, DeviceProfile
from slmops.contracts.recipe import PassSpec, Recipe
from slmops.contracts.search import SearchSpec
from slmops.optimizer.domain.candidate import Variant
from slmops.optimizer.domain.choice import choose
from slmops.optimizer.domain.gate import judge
from slmops.optimizer.domain.shares import largest_fitting, smallest_sufficient
from slmops.optimizer.recipes.library import recipe_named
from slmops.optimizer.recipes.progress import Progress
from slmops.optimizer.recipes.search import Search, explicit

EMBEDDING, LAYERS = 28_000_000, 106_000_000  # weights
INT8: dict[str, JsonValue] = {"bits": 8}
INT4: dict[str, JsonValue] = {"scale_bits": 8, "upgraded_share": 0.17}
HOUR = timedelta(hours=1)


def quantized(name: str, **params: JsonValue) -> Recipe:
    return explicit(Recipe(name=name, passes=(PassSpec(pass_="quantize", params=params), PassSpec(pass_="pack"))))


START = [quantized("int8", **INT8), quantized("int4", **INT4), explicit(recipe_named("stock-int4"))]


class Simulated:
    """A model with known size, divergence and time for every recipe. `now_s` is its clock."""

    def __init__(self, profile: DeviceProfile) -> None:
        self.profile, self.now_s = profile, 0.0
        self.tried: list[str] = []

    def __call__(self, recipe: Recipe) -> Variant:
        self.tried.append(recipe.name)
        evaluation = None
        verdict = Verdict(passed=False, reasons=("576 columns cannot be divided into blocks of 128",))
        if not any(step.params.get("block") == 128 for step in recipe.passes):
            evaluation = self._evaluation(recipe)
            verdict = judge(evaluation, self.profile)
        seconds = 300.0 if any(step.params.get("method") == "gptq" for step in recipe.passes) else 20.0
        seconds += sum(900 for step in recipe.passes if step.pass_ == "distill")
        self.now_s += seconds
        return Variant(
            recipe=recipe.name, definition=recipe, evaluation=evaluation, verdict=verdict, path="x", seconds=seconds
        )

    def _evaluation(self, recipe: Recipe) -> Evaluation:
        passes = {step.pass_: step.params for step in recipe.passes}
        if "build" in passes:
            return measured(86e6, 0.46, 84.0)
        p, pruned = passes["quantize"], float(passes.get("prune-width", {}).get("share", 0))
        share = float(p["upgraded_share"]) if p["bits"] == 4 else 1.0
        per_block = int(p["scale_bits"]) + (0 if p["symmetric"] or p["bits"] == 8 else int(p["bits"]))
        weights = LAYERS * (1 - 0.6 * pruned)
        bits = weights * (4 + 4 * share + per_block / int(p["block"])) + EMBEDDING * (
            int(p["embedding_bits"] or 32) + 0.5
        )
        kl = 0.005 + 0.4 * (1 - share) ** 6 * (int(p["block"]) / 32) ** 0.4 * (1.2 if p["symmetric"] else 1)
        kl = kl * (0.5 if p["method"] == "gptq" else 1) + (0.13 if p["embedding_bits"] == 4 else 0)
        return measured(bits / 8, kl + pruned * (0.3 if "distill" in passes else 3), 9e10 / bits)


def measured(bytes: float, kl: float, tokens_per_s: float) -> Evaluation:
    return Evaluation(
        bytes=round(bytes),
        kl=kl,
        kl_low=kl * 0.9,
        kl_high=kl * 1.1,
        top1=max(0.0, 1 - kl**0.5 * 0.5),
        ppl=16.0,
        reference_ppl=15.8,
        tokens_per_s=tokens_per_s,
        ttft_s=0.1,
        peak_rss_bytes=300_000_000,
    )


@pytest.fixture
def reported() -> list[dict[str, object]]:
    return []


@pytest.fixture
def search(tmp_path, reported):
    def made(profile: DeviceProfile = EDGE_SMALL, *, start=START, model=None, log="trials.jsonl", **spec: object):
        model = model or Simulated(profile)
        asked = SearchSpec(**{"max_trials": 30, "budget": 10 * HOUR} | spec)
        progress = Progress(asked.max_trials, reported.append)
        found = Search(asked, profile, start, tmp_path / "notes" / log, progress, lambda: model.now_s)
        return found.run(model), model

    return made


def tight(**limits: object) -> DeviceProfile:
    return EDGE_SMALL.model_copy(update=limits)


def the_best(trials, profile: DeviceProfile, prefer="smallest") -> Variant:
    choice = choose(trials, profile, prefer)
    return next(trial for trial in trials if trial.recipe == choice.recipe)


def test_a_search_starts_with_the_given_recipes_cheap_ones_first(search):
    dear = quantized("int4-calibrated", method="gptq", **INT4)
    _, model = search(start=[dear, *START], max_trials=4)
    assert model.tried == ["stock-int4", "int8", "int4", "int4-calibrated"]


@pytest.mark.parametrize("prefer", ["smallest", "best_quality", "fastest"])
@pytest.mark.parametrize("limits", [{}, {"max_package_bytes": 100_000_000}, {"max_kl": 0.05}, {"max_kl": 1e-9}])
def test_no_recipe_and_no_name_is_tried_twice(search, prefer, limits):
    trials, model = search(tight(**limits), prefer=prefer, max_trials=60)
    assert len({trial.definition.digest for trial in trials}) == len(trials)
    assert len(set(model.tried)) == len(trials) > len(START)


def test_a_search_finds_a_smaller_variant_than_the_given_recipes(search):
    trials, _ = search(EDGE_SMALL)
    best, given = the_best(trials, EDGE_SMALL), the_best(trials[: len(START)], EDGE_SMALL)
    assert best.evaluation.bytes < 0.9 * given.evaluation.bytes
    assert best.evaluation.kl_high <= EDGE_SMALL.max_kl


def test_a_search_finds_the_largest_share_of_8_bits_that_fits_the_size_limit(search):
    profile = tight(max_package_bytes=100_000_000, max_kl=0.1, min_top1=0.8)
    trials, _ = search(profile, prefer="best_quality")
    best = the_best(trials, profile, "best_quality")
    assert 0.98 * profile.max_package_bytes < best.evaluation.bytes <= profile.max_package_bytes
    assert best.definition.passes[0].params["method"] == "gptq"
    # The best of the whole grid, by exhaustive search.
    model, quantize = Simulated(profile), best.definition.passes[0].params
    everything = (
        model._evaluation(Recipe(name="x", passes=(PassSpec(pass_="quantize", params=quantize | changes),)))
        for changes in (
            {"upgraded_share": share / 100, "block": block, "symmetric": symmetric, "scale_bits": bits}
            for share in range(101)
            for block in (16, 32, 64)
            for symmetric in (False, True)
            for bits in (8, 16)
        )
    )
    assert best.evaluation.kl <= 1.15 * min(e.kl for e in everything if e.bytes <= profile.max_package_bytes)


def test_a_block_size_that_failed_is_not_tried_again(search):
    trials, _ = search(EDGE_SMALL)
    assert sum(trial.evaluation is None for trial in trials) == 1


def test_a_search_prunes_and_distills_only_if_nothing_else_fits(search):
    def pruned(trials):
        return [
            [step.pass_ for step in t.definition.passes]
            for t in trials
            if "prune-width" in t.definition.passes[0].pass_
        ]

    assert not pruned(search(tight(max_package_bytes=90_000_000))[0])
    small = tight(max_package_bytes=57_000_000, max_kl=1.0, min_top1=0.1)
    trials, _ = search(small, log="another", budget=100 * HOUR)
    assert pruned(trials)[0] == ["prune-width", "distill", "quantize", "pack"]
    assert the_best(trials, small).evaluation.bytes <= 57_000_000


def test_a_trial_that_would_exceed_the_remaining_time_is_not_started(search):
    _, model = search(EDGE_SMALL, budget=timedelta(seconds=700))
    assert model.now_s <= 700
    assert len(model.tried) > len(START)
    assert sum("gptq" in name for name in model.tried) <= 2


def test_at_least_one_trial_is_made_however_short_the_budget_is(search):
    assert len(search(EDGE_SMALL, budget=timedelta(seconds=1))[0]) == 1


def test_progress_reports_the_best_result_so_far(search, reported):
    search(EDGE_SMALL, max_trials=2, budget=HOUR)
    assert [line["step"] for line in reported] == [
        "nothing passes so far; 1 of 1 on the front, 0:59:40 left",
        "best so far: int8, 142.4 MB, KL 0.005, 79 tokens/s; 2 of 2 on the front, 0:59:20 left",
    ]


def test_a_killed_search_continues_with_its_earlier_trials(search, tmp_path):
    whole, _ = search(EDGE_SMALL, max_trials=8)
    log = tmp_path / "notes" / "trials.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    assert len(lines) == 8
    log.write_bytes(b"".join(lines[:4]) + lines[4][:100])  # in the middle of a line
    again, model = search(EDGE_SMALL, max_trials=8)
    assert again == whole
    assert model.tried == [trial.recipe for trial in whole[4:]]
    assert log.read_bytes() == b"".join(lines)
    assert search(EDGE_SMALL, max_trials=8)[1].tried == []


def test_the_time_of_earlier_trials_counts_after_a_restart(search):
    search(EDGE_SMALL, max_trials=3)  # 60 s
    _, model = search(EDGE_SMALL, budget=timedelta(seconds=70))
    assert model.tried == []


def test_earlier_trials_are_judged_by_the_current_limits(search):
    search(EDGE_SMALL, max_trials=3)
    trials, _ = search(tight(max_package_bytes=1_000_000), max_trials=3)
    assert not any(trial.verdict.passed for trial in trials)
    assert "bytes 142.4 MB > 1 MB" in trials[1].verdict.reasons


def test_equivalent_recipes_are_equal_when_written_out():
    short = Recipe(name="a", passes=(PassSpec(pass_="quantize"), PassSpec(pass_="pack")))
    long = Recipe(name="b", passes=(PassSpec(pass_="quantize", params={"bits": 4}), PassSpec(pass_="pack")))
    assert short.digest != long.digest
    assert explicit(short).digest == explicit(long).digest
    with pytest.raises(InvalidRecipe):
        explicit(Recipe(name="c", passes=(PassSpec(pass_="pack"),)))


@pytest.mark.parametrize(
    ("sizes", "limit", "share"),
    [
        ([(0.0, 100)], 100, 0.5),
        ([(0.0, 100), (0.5, 150)], 120, 0.2),
        ([(0.0, 100), (0.5, 150)], 180, 0.8),
        ([(0.0, 100), (0.5, 150)], 500, 1.0),
        ([(0.0, 100), (1.0, 200)], 500, None),
        ([(0.2, 120), (0.21, 121)], 120, None),
        ([(0.5, 150)], 120, 0.0),
        ([(0.0, 100)], 99, None),
    ],
)
def test_next_share_when_looking_for_the_largest_that_fits(sizes, limit, share):
    assert largest_fitting(sizes, limit) == share


@pytest.mark.parametrize(
    ("suffices", "share"),
    [
        ([(0.5, True)], 0.0),
        ([(0.0, False)], 0.5),
        ([(0.0, False), (0.5, True)], 0.25),
        ([(0.0, False), (0.24, False), (0.26, True)], None),
        ([(0.0, True)], None),
    ],
)
def test_next_share_when_looking_for_the_smallest_that_suffices(suffices, share):
    assert smallest_sufficient(suffices) == share
