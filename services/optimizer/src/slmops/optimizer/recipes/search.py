"""Searches over recipes: one trial after the other until the budget is spent or no promising recipe is left.

Each trial is appended to a file and synced to disk when it ends. A search that is restarted reads the file and
continues; the time of the earlier trials counts as spent.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

from slmops.contracts.errors import InvalidRecipe
from slmops.contracts.profile import DeviceProfile
from slmops.contracts.recipe import PassSpec, Recipe
from slmops.contracts.search import SearchSpec
from slmops.optimizer.domain.candidate import Variant
from slmops.optimizer.domain.choice import choose, figures
from slmops.optimizer.domain.front import front
from slmops.optimizer.domain.gate import judge
from slmops.optimizer.domain.quantized import cost, least_seconds
from slmops.optimizer.domain.space import propose
from slmops.optimizer.recipes.library import check, shown
from slmops.optimizer.recipes.progress import Progress

Attempt = Callable[[Recipe], Variant]
"""Makes, measures and judges the variant of a recipe. A recipe that fails gives a refused variant."""


class Search:
    """A search with a time budget, which starts when the object is created.

    `log` is the file of trials; all of them must belong to this version and be measured in the same way.
    """

    def __init__(
        self,
        spec: SearchSpec,
        profile: DeviceProfile,
        start: Sequence[Recipe],
        log: Path,
        progress: Progress,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._spec, self._profile, self._start, self._log = spec, profile, start, log
        self._progress, self._clock_s, self._began_s = progress, clock_s, clock_s()
        self._trials: list[Variant] = []
        self._spent_before_s = 0.0

    def run(self, attempt: Attempt) -> tuple[Variant, ...]:
        """Runs the search and returns all trials in their order, those of earlier runs first."""
        for trial in _read(self._log):
            verdict = judge(trial.evaluation, self._profile) if trial.evaluation else trial.verdict
            self._trials.append(trial.model_copy(update={"verdict": verdict}))
            self._spent_before_s += trial.seconds
            self._progress.part_done()
        while len(self._trials) < self._spec.max_trials:
            recipe = propose(self._trials, self._start, self._profile, self._spec.prefer, self._usable)
            if recipe is None:
                break
            trial = attempt(recipe)
            self._trials.append(trial)
            _append(self._log, trial)
            self._progress.begin(self._summary())
        return tuple(self._trials)

    def _usable(self, recipe: Recipe) -> Recipe | None:
        with suppress(InvalidRecipe):  # the passes reject some combinations of parameters
            written_out = explicit(recipe)
            return written_out if self._affordable(written_out) else None
        return None

    def _affordable(self, recipe: Recipe) -> bool:
        """Returns whether the recipe fits into the remaining time. The first trial always does."""
        return not self._trials or self._expected_s(recipe) <= self._left_s()

    def _expected_s(self, recipe: Recipe) -> float:
        """Returns the longest time of a trial with the same passes.

        If there is none, returns the longest time of a trial that is not more expensive, plus the recipe's training.
        """
        timed = [trial for trial in self._trials if trial.evaluation]
        same = [trial.seconds for trial in timed if _kind(trial.definition) == _kind(recipe)]
        cheaper = [trial.seconds for trial in timed if cost(trial.definition) <= cost(recipe)]
        return max(same or cheaper, default=0.0) + (0 if same else least_seconds(recipe))

    def _left_s(self) -> float:
        spent = self._spent_before_s + self._clock_s() - self._began_s
        return self._spec.budget.total_seconds() - spent

    def _summary(self) -> str:
        """Returns the state of the search as text."""
        best = choose(self._trials, self._profile, self._spec.prefer).recipe
        measured = next((trial.evaluation for trial in self._trials if trial.recipe == best), None)
        so_far = f"best so far: {best}, {figures(measured)}" if measured else "nothing passes so far"
        count = len(front(self._trials).recipes)
        left = timedelta(seconds=max(0, round(self._left_s())))
        return f"{so_far}; {count} of {len(self._trials)} on the front, {left} left"


def explicit(recipe: Recipe) -> Recipe:
    """Returns the recipe with every parameter written out, so that equivalent recipes have the same digest.

    Raises `InvalidRecipe`.
    """
    return recipe.model_copy(update={"passes": tuple(map(PassSpec.model_validate, shown(check(recipe))))})


def _kind(recipe: Recipe) -> tuple[int, tuple[str, ...]]:
    return cost(recipe), tuple(step.pass_ for step in recipe.passes)


def _read(log: Path) -> list[Variant]:
    """Reads the trials. Removes an incomplete last line, left by a killed process; that trial is made again."""
    if not log.exists():
        return []
    whole, _, torn = log.read_bytes().rpartition(b"\n")
    if torn:
        with log.open("r+b") as file:
            file.truncate(len(whole) + 1 if whole else 0)
    return [Variant.model_validate_json(line) for line in whole.split(b"\n") if line]


def _append(log: Path, trial: Variant) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file:
        file.write(trial.model_dump_json(by_alias=True) + "\n")
        file.flush()
        os.fsync(file.fileno())
