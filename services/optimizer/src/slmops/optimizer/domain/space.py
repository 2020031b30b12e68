"""What a search tries next: first the recipes that it was given, then changes of the best ones so far.

What always holds
1. A recipe that was tried, under whatever name, is not tried again: so a search ends.
2. Of those that were given, cheap ones come before dear ones: a short budget still knows something.
3. A change is tried only if it goes where it has to: to fewer bytes if a variant is too large or too slow, to higher
   fidelity if it is too coarse, and where the preference points if it passes.
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
"""The recipe with every parameter written out; None if it cannot be carried out, or not in the time that is left."""

_HEAVY = ("bytes", "tokens_per_s", "peak_rss_bytes", "joules_per_token")  # what fewer bytes are good for
_BLOCKS = (16, 32, 64, 128)
_PRUNED = (0.1, 0.2, 0.3, 0.4, 0.5)  # shares of every MLP, which is about half of a model's bytes


class _Anchor(NamedTuple):
    """A measured variant, and on which sides of the limits it is."""

    point: Quantized
    bytes: int
    heavy: bool
    coarse: bool

    @property
    def passes(self) -> bool:
        return not (self.heavy or self.coarse)


def propose(
    trials: Sequence[Variant], start: Sequence[Recipe], profile: DeviceProfile, prefer: Prefer, usable: Usable
) -> Recipe | None:
    """The next recipe, by a name that none of `trials` has; None if nothing is left that promises anything."""
    tried = {trial.definition.digest for trial in trials}
    taken = {trial.recipe for trial in trials}
    search = _Space(trials, profile, prefer)
    for idea in chain(sorted(start, key=cost), search.changes()):
        recipe = usable(idea)
        if recipe and recipe.digest not in tried:
            name = recipe.name if recipe.name not in taken else f"{recipe.name}-{recipe.digest[7:13]}"
            return recipe.model_copy(update={"name": name})
    return None


class _Space:
    def __init__(self, trials: Sequence[Variant], profile: DeviceProfile, prefer: Prefer) -> None:
        self._trials, self._profile, self._prefer = trials, profile, prefer
        self._limit = max_bytes(profile)

    def changes(self) -> Iterator[Recipe]:
        ideas = chain.from_iterable(map(self._around, self._anchors()))
        known, failed = (self._blocks(failed=failed) for failed in (False, True))
        yield from (idea for idea in ideas if not _blocks(idea) & failed - known)

    def _anchors(self) -> list[_Anchor]:
        """The best of each kind, of which another one's turn comes with every trial: none is followed to its end while
        others wait. Then some that are worse. Once something passes, what is too heavy is of no more interest."""
        rank = ranking(self._prefer)
        measured = [(trial, trial.evaluation) for trial in self._trials if trial.evaluation]
        measured.sort(key=lambda pair: (self._excess(pair[0]), *rank(pair[1])))
        anchors = [anchor for trial, _ in measured if (anchor := self._anchor(trial))]
        passing, coarse, heavy, both = (
            [anchor for anchor in anchors if (anchor.heavy, anchor.coarse) == kind]
            for kind in ((False, False), (False, True), (True, False), (True, True))
        )
        best = passing[:2] + coarse[:2] if passing else coarse[:1] + heavy[:1] + both[:1]
        others = passing[2:4] + coarse[2:4] if passing else coarse[1:3] + heavy[1:3]
        turn = len(self._trials) % max(1, len(best))
        return best[turn:] + best[:turn] + others

    def _blocks(self, *, failed: bool) -> set[object]:
        """Of the trials that failed, or of those that did not: not every block divides a model's matrices."""
        chosen = (trial.definition for trial in self._trials if (trial.evaluation is None) == failed)
        return set().union(*map(_blocks, chosen))

    def _excess(self, trial: Variant) -> float:
        """How far from passing: 0 if it does. As ratios, so that bytes and nats can be added."""
        assert trial.evaluation
        return sum(math.log1p(limit.excess) for limit in limits(trial.evaluation, self._profile))

    def _anchor(self, trial: Variant) -> _Anchor | None:
        point = Quantized.of(trial.definition)
        if point is None or trial.evaluation is None:
            return None
        broken = [limit.metric in _HEAVY for limit in limits(trial.evaluation, self._profile) if limit.excess]
        return _Anchor(point, trial.evaluation.bytes, heavy=any(broken), coarse=not all(broken))

    def _around(self, anchor: _Anchor) -> Iterator[Recipe]:
        """In the order in which they are worth their time."""
        small = self._prefer != "best_quality"
        if anchor.heavy:
            yield from self._largest_fitting(anchor.point)
        if anchor.passes and small:
            yield from self._smallest_sufficient(anchor.point)
            yield from _smaller(anchor.point)
        if anchor.passes or anchor.coarse:  # the same bytes
            yield anchor.point.but(method="gptq")
        if not anchor.heavy and (anchor.coarse or not small):
            yield from self._largest_fitting(anchor.point)
            yield from _finer(anchor.point)
        if anchor.heavy:
            yield from _smaller(anchor.point)
            yield from self._pruned(anchor)

    def _largest_fitting(self, point: Quantized) -> Iterator[Recipe]:
        """Into the device, and if small is better into fewer bytes than what passes already."""
        passing = [t.evaluation.bytes - 1 for t in self._trials if t.evaluation and t.verdict.passed]
        limit = min([self._limit, *(passing if self._prefer == "smallest" else [])])
        sizes = [(mine.share, size) for mine, size, _ in self._line(point)]
        yield from _at(point, largest_fitting(sizes, limit))

    def _smallest_sufficient(self, point: Quantized) -> Iterator[Recipe]:
        known = [(mine.share, not coarse) for mine, _, coarse in self._line(point)]
        yield from _at(point, smallest_sufficient(known))

    def _line(self, point: Quantized) -> list[tuple[Quantized, int, bool]]:
        """Every trial that differs from `point` at most in its share: itself, its bytes, whether it is too coarse."""
        alike = [trial for trial in self._trials if point.like(trial.definition)]
        return [(a.point, a.bytes, a.coarse) for trial in alike if (a := self._anchor(trial))]

    def _pruned(self, anchor: _Anchor) -> Iterator[Recipe]:
        """Only while nothing else fits: no bits are left to save."""
        if any(trial.evaluation and trial.evaluation.bytes <= self._limit for trial in self._trials):
            return
        wanted = anchor.point.pruned_share + 2 * (1 - self._limit / anchor.bytes)
        share = next((share for share in _PRUNED if share >= wanted), _PRUNED[-1])
        yield anchor.point.pruned(share, distilled=True)
        yield anchor.point.pruned(share, distilled=False)


def _blocks(recipe: Recipe) -> set[object]:
    point = Quantized.of(recipe)
    return {point.params.get("block")} if point else set()


def _at(point: Quantized, share: float | None) -> Iterator[Recipe]:
    if share is not None and point.params["bits"] == 4:
        yield point.but(upgraded_share=share)


def _finer(point: Quantized) -> Iterator[Recipe]:
    block = point.params["block"]
    yield from (point.but(block=smaller) for smaller in reversed(_BLOCKS) if smaller < block)
    if point.params["embedding_bits"] == 4:
        yield point.but(embedding_bits=8)
    if point.params["symmetric"]:
        yield point.but(symmetric=False)
    if point.params["scale_bits"] == 8:
        yield point.but(scale_bits=16)


def _smaller(point: Quantized) -> Iterator[Recipe]:
    """What costs least fidelity first."""
    p = point.params
    if p["bits"] == 8:
        yield point.but(bits=4, upgraded_share=0.5)
        yield point.but(bits=4)
    if p["scale_bits"] == 16:
        yield point.but(scale_bits=8)
    yield point.but(embedding_bits=4 if p["embedding_bits"] else 8)
    yield from (point.but(block=larger) for larger in _BLOCKS if larger > p["block"])
    if p["bits"] == 4 and not p["symmetric"]:
        yield point.but(symmetric=True)
