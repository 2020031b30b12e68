"""A search over recipes: one trial after the other until the budget is spent or nothing promises anything.

Trials are lines of a file, written through to the disk as soon as each ends. A search that is started again reads them
and goes on, and the time that they took is spent.
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
"""Make a recipe's variant, measure and judge it. A recipe that fails is a refused variant."""


class Search:
    """`book` is the file of trials: of this version, measured as now. The budget is of all time since this was made."""

    def __init__(
        self,
        spec: SearchSpec,
        profile: DeviceProfile,
        start: Sequence[Recipe],
        book: Path,
        progress: Progress,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._spec, self._profile, self._start, self._book = spec, profile, start, book
        self._progress, self._clock_s, self._began_s = progress, clock_s, clock_s()
        self._trials: list[Variant] = []
        self._spent_before_s = 0.0

    def run(self, attempt: Attempt) -> tuple[Variant, ...]:
        """Every trial in the order in which it was made, those of earlier runs first."""
        for trial in _read(self._book):
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
            _append(self._book, trial)
            self._progress.begin(self._known())
        return tuple(self._trials)

    def _usable(self, recipe: Recipe) -> Recipe | None:
        with suppress(InvalidRecipe):  # a change that this installation's passes do not know, or that means nothing
            written_out = explicit(recipe)
            return written_out if self._affordable(written_out) else None
        return None

    def _affordable(self, recipe: Recipe) -> bool:
        """By what like trials took; at least one is made, however long it may take."""
        return not self._trials or self._expected_s(recipe) <= self._left_s()

    def _expected_s(self, recipe: Recipe) -> float:
        """The longest of those with the same passes; if there is none, that of cheaper ones and its own training."""
        timed = [trial for trial in self._trials if trial.evaluation]
        alike = [trial.seconds for trial in timed if _kind(trial.definition) == _kind(recipe)]
        cheaper = [trial.seconds for trial in timed if cost(trial.definition) <= cost(recipe)]
        return max(alike or cheaper, default=0.0) + (0 if alike else least_seconds(recipe))

    def _left_s(self) -> float:
        spent = self._spent_before_s + self._clock_s() - self._began_s
        return self._spec.budget.total_seconds() - spent

    def _known(self) -> str:
        """What is known so far, for a person who waits."""
        best = choose(self._trials, self._profile, self._spec.prefer).recipe
        measured = next((trial.evaluation for trial in self._trials if trial.recipe == best), None)
        so_far = f"best so far: {best}, {figures(measured)}" if measured else "nothing passes so far"
        count = len(front(self._trials).recipes)
        left = timedelta(seconds=max(0, round(self._left_s())))
        return f"{so_far}; {count} of {len(self._trials)} on the front, {left} left"


def explicit(recipe: Recipe) -> Recipe:
    """With every parameter written out: what means the same has the same digest. Raises `InvalidRecipe`."""
    return recipe.model_copy(update={"passes": tuple(map(PassSpec.model_validate, shown(check(recipe))))})


def _kind(recipe: Recipe) -> tuple[int, tuple[str, ...]]:
    return cost(recipe), tuple(step.pass_ for step in recipe.passes)


def _read(book: Path) -> list[Variant]:
    """Without a last line that the process was killed in: that trial is made again."""
    if not book.exists():
        return []
    whole, _, torn = book.read_bytes().rpartition(b"\n")
    if torn:
        with book.open("r+b") as file:
            file.truncate(len(whole) + 1 if whole else 0)
    return [Variant.model_validate_json(line) for line in whole.splitlines()]


def _append(book: Path, trial: Variant) -> None:
    book.parent.mkdir(parents=True, exist_ok=True)
    with book.open("a", encoding="utf-8") as file:
        file.write(trial.model_dump_json(by_alias=True) + "\n")
        file.flush()
        os.fsync(file.fileno())
