"""Proposes the next trial of a search: first the given recipes, then variations of the best trials so far.

Invariants
1. A recipe is tried once, even if it comes again under another name. Therefore a search ends.
2. Cheap given recipes are tried before expensive ones, so that a short budget still gives a result.
3. A variation goes in the direction that the trial needs: fewer bytes if it is too large or too slow, higher fidelity
   if it is too inaccurate, and the direction of the preference if it passes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import NamedTuple

from slmops.contracts.profile import DeviceProfile
from slmops.contracts.recipe import Recipe
from slmops.contracts.search import Prefer
from slmops.optimizer.domain.candidate import Variant
from slmops.optimizer.domain.choice import ranking
from slmops.optimizer.domain.gate import limits, max_bytes
from slmops.optimizer.domain.quantized import Quantized, cost
from slmops.optimizer.domain.shares import largest_fitting, smallest_sufficient

Usable = Callable[[Recipe], Recipe | None]
"""Returns the recipe with every parameter written out; None if it is invalid or would exceed the remaining time."""

_COSTS = ("bytes", "tokens_per_s", "peak_rss_bytes", "joules_per_token")  # limits on these are met with fewer bytes
_BLOCKS = (16, 32, 64, 128)
_PRUNED = (0.1, 0.2, 0.3, 0.4, 0.5)  # shares of every MLP, which is about half of a model's bytes


class _Base(NamedTuple):
    """A measured variant to vary. `costly`: it breaks a limit of `_COSTS`; `inaccurate`: it breaks another limit."""

    point: Quantized
    bytes: int
    costly: bool
    inaccurate: bool

    @property
    def passes(self) -> bool:
        return not (self.costly or self.inaccurate)


def propose(
    trials: Sequence[Variant], start: Sequence[Recipe], profile: DeviceProfile, prefer: Prefer, usable: Usable
) -> Recipe | None:
    """Returns the next recipe, with a name that no trial has; None if no promising recipe is left."""
    tried = {trial.definition.digest for trial in trials}
    taken = {trial.recipe for trial in trials}
    search = _Space(trials, profile, prefer)
    for idea in chain(sorted(start, key=cost), search.variations()):
        recipe = usable(idea)
        if recipe and recipe.digest not in tried:
            name = recipe.name if recipe.name not in taken else f"{recipe.name}-{recipe.digest[7:13]}"
            return recipe.model_copy(update={"name": name})
    return None


class _Space:
    def __init__(self, trials: Sequence[Variant], profile: DeviceProfile, prefer: Prefer) -> None:
        self._trials, self._profile, self._prefer = trials, profile, prefer
        self._limit = max_bytes(profile)

    def variations(self) -> Iterator[Recipe]:
        """Yields variations of the best trials, without block sizes with which every trial failed."""
        ideas = chain.from_iterable(map(self._around, self._bases()))
        worked, failed = (self._blocks(failed=failed) for failed in (False, True))
        yield from (idea for idea in ideas if not _blocks(idea) & failed - worked)

    def _bases(self) -> list[_Base]:
        """Returns the trials to vary: the best of each kind, then some worse ones.

        The best take turns, one per trial, so that the search does not exhaust one before it looks at the others. Once
        a trial passes, trials that are too costly are dropped.
        """
        rank = ranking(self._prefer)
        measured = [(trial, trial.evaluation) for trial in self._trials if trial.evaluation]
        measured.sort(key=lambda pair: (self._excess(pair[0]), *rank(pair[1])))
        bases = [base for trial, _ in measured if (base := self._base(trial))]
        passing, inaccurate, costly, both = (
            [base for base in bases if (base.costly, base.inaccurate) == kind]
            for kind in ((False, False), (False, True), (True, False), (True, True))
        )
        best = passing[:2] + inaccurate[:2] if passing else inaccurate[:1] + costly[:1] + both[:1]
        others = passing[2:4] + inaccurate[2:4] if passing else inaccurate[1:3] + costly[1:3]
        turn = len(self._trials) % max(1, len(best))
        return best[turn:] + best[:turn] + others

    def _blocks(self, *, failed: bool) -> set[object]:
        """Returns the block sizes of failed or of successful trials: not every size divides a model's matrices."""
        chosen = (trial.definition for trial in self._trials if (trial.evaluation is None) == failed)
        return set().union(*map(_blocks, chosen))

    def _excess(self, trial: Variant) -> float:
        """Returns how far a trial is from passing; 0 if it passes. Uses ratios, so that bytes and nats can be added."""
        assert trial.evaluation
        return sum(math.log1p(limit.excess) for limit in limits(trial.evaluation, self._profile))

    def _base(self, trial: Variant) -> _Base | None:
        point = Quantized.of(trial.definition)
        if point is None or trial.evaluation is None:
            return None
        broken = [limit.metric in _COSTS for limit in limits(trial.evaluation, self._profile) if limit.excess]
        return _Base(point, trial.evaluation.bytes, costly=any(broken), inaccurate=not all(broken))

    def _around(self, base: _Base) -> Iterator[Recipe]:
        """Yields variations of a trial, the most promising first."""
        small = self._prefer != "best_quality"
        if base.costly:
            yield from self._largest_fitting(base.point)
        if base.passes and small:
            yield from self._smallest_sufficient(base.point)
            yield from _smaller(base.point)
        if base.passes or base.inaccurate:  # GPTQ does not change the bytes
            yield base.point.changed(method="gptq")
        if not base.costly and (base.inaccurate or not small):
            yield from self._largest_fitting(base.point)
            yield from _finer(base.point)
        if base.costly:
            yield from _smaller(base.point)
            yield from self._pruned(base)

    def _largest_fitting(self, point: Quantized) -> Iterator[Recipe]:
        """Yields the largest share that fits into the device, and if small is preferred, below what already passes."""
        passing = [t.evaluation.bytes - 1 for t in self._trials if t.evaluation and t.verdict.passed]
        limit = min([self._limit, *(passing if self._prefer == "smallest" else [])])
        sizes = [(base.point.share, base.bytes) for base in self._same_except_share(point)]
        yield from _at(point, largest_fitting(sizes, limit))

    def _smallest_sufficient(self, point: Quantized) -> Iterator[Recipe]:
        known = [(base.point.share, not base.inaccurate) for base in self._same_except_share(point)]
        yield from _at(point, smallest_sufficient(known))

    def _same_except_share(self, point: Quantized) -> list[_Base]:
        """Returns the trials that differ from `point` at most in their share."""
        trials = [trial for trial in self._trials if point.same_except_share(trial.definition)]
        return [base for trial in trials if (base := self._base(trial))]

    def _pruned(self, base: _Base) -> Iterator[Recipe]:
        """Yields pruned variations, but only while no trial fits into the device: pruning is the last resort."""
        if any(trial.evaluation and trial.evaluation.bytes <= self._limit for trial in self._trials):
            return
        wanted = base.point.pruned_share + 2 * (1 - self._limit / base.bytes)
        share = next((share for share in _PRUNED if share >= wanted), _PRUNED[-1])
        yield base.point.pruned(share, distilled=True)
        yield base.point.pruned(share, distilled=False)


def _blocks(recipe: Recipe) -> set[object]:
    point = Quantized.of(recipe)
    return {point.params.get("block")} if point else set()


def _at(point: Quantized, share: float | None) -> Iterator[Recipe]:
    if share is not None and point.params["bits"] == 4:
        yield point.changed(upgraded_share=share)


def _finer(point: Quantized) -> Iterator[Recipe]:
    """Yields variations with higher fidelity and more bytes."""
    block = point.params["block"]
    yield from (point.changed(block=smaller) for smaller in reversed(_BLOCKS) if smaller < block)
    if point.params["embedding_bits"] == 4:
        yield point.changed(embedding_bits=8)
    if point.params["symmetric"]:
        yield point.changed(symmetric=False)
    if point.params["scale_bits"] == 8:
        yield point.changed(scale_bits=16)


def _smaller(point: Quantized) -> Iterator[Recipe]:
    """Yields variations with fewer bytes, the ones that cost the least fidelity first."""
    p = point.params
    if p["bits"] == 8:
        yield point.changed(bits=4, upgraded_share=0.5)
        yield point.changed(bits=4)
    if p["scale_bits"] == 16:
        yield point.changed(scale_bits=8)
    yield point.changed(embedding_bits=4 if p["embedding_bits"] else 8)
    yield from (point.changed(block=larger) for larger in _BLOCKS if larger > p["block"])
    if p["bits"] == 4 and not p["symmetric"]:
        yield point.changed(symmetric=True)
