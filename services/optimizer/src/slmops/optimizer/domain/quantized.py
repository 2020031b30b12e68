"""A recipe seen as a point of the space that is searched: what goes before its quantization, how, and what follows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from slmops.contracts.recipe import PassSpec, Recipe

QUANTIZE, PACK, PRUNE, DISTILL = "quantize", "pack", "prune-width", "distill"
_COSTS = {PACK: 0, "build": 0, QUANTIZE: 1, DISTILL: 4}
_CALIBRATED, _OTHER = 2, 3
_LONGEST_NAME = 56  # of 63: a digest's beginning may follow
_DISTILLATION_MINUTES = 15.0  # what the bundled student takes


@dataclass(frozen=True)
class Quantized:
    """`params` are the quantize pass's, all of them; `before` and `after` the other passes."""

    before: tuple[PassSpec, ...]
    params: Mapping[str, Any]
    after: tuple[PassSpec, ...]

    @classmethod
    def of(cls, recipe: Recipe) -> Self | None:
        """None for a recipe that does not quantize by our own pass, or more than once."""
        places = [number for number, step in enumerate(recipe.passes) if step.pass_ == QUANTIZE]
        if len(places) != 1:
            return None
        at = places[0]
        return cls(recipe.passes[:at], recipe.passes[at].params, recipe.passes[at + 1 :])

    @property
    def share(self) -> float:
        return float(self.params["upgraded_share"])

    def like(self, other: Recipe) -> bool:
        """The same but for the share that gets more bits."""
        theirs = Quantized.of(other)
        return theirs is not None and theirs.but(upgraded_share=0.0).digest == self.but(upgraded_share=0.0).digest

    def but(self, **changes: Any) -> Recipe:
        return _recipe((*self.before, PassSpec(pass_=QUANTIZE, params={**self.params, **changes}), *self.after))

    def pruned(self, share: float, *, distilled: bool) -> Recipe:
        """Of the version itself, whatever it was pruned by before."""
        before = [PassSpec(pass_=PRUNE, params={"share": share})]
        before += [PassSpec(pass_=DISTILL, params={"minutes": _DISTILLATION_MINUTES})] * distilled
        return _recipe((*before, PassSpec(pass_=QUANTIZE, params=dict(self.params)), *self.after))

    @property
    def pruned_share(self) -> float:
        return max((float(step.params.get("share", 0)) for step in self.before if step.pass_ == PRUNE), default=0.0)  # type: ignore[arg-type]


def cost(recipe: Recipe) -> int:
    """A rank: rounding takes seconds, GPTQ minutes, pruning and training more."""
    return max(_cost(step) for step in recipe.passes)


def least_seconds(recipe: Recipe) -> float:
    """What its training takes by its own word."""
    minutes = (step.params.get("minutes") for step in recipe.passes if step.pass_ == DISTILL)
    return sum(60 * float(limit) for limit in minutes if isinstance(limit, int | float))


def _cost(step: PassSpec) -> int:
    if step.pass_ == QUANTIZE and step.params.get("method") == "gptq":
        return _CALIBRATED
    return _COSTS.get(step.pass_, _OTHER)


def _recipe(passes: tuple[PassSpec, ...]) -> Recipe:
    """Named after what it does: `w20-distill-int4-g32-s8-gptq-u11`."""
    words = [word for step in passes for word in _words(step)]
    return Recipe(name="-".join(words)[:_LONGEST_NAME].strip("-"), passes=passes)


def _words(step: PassSpec) -> list[str]:
    p = step.params
    if step.pass_ == PRUNE:
        return [f"w{round(100 * float(p['share']))}"]  # type: ignore[arg-type]
    if step.pass_ != QUANTIZE:
        return [step.pass_] if step.pass_ != PACK else []
    words = [f"int{p['bits']}", f"g{p['block']}"]
    words += [f"s{p['scale_bits']}"] if p["scale_bits"] != 16 else []
    words += [str(p["method"])] if p["method"] != "searched" else []
    words += ["sym"] if p["symmetric"] else []
    words += [f"e{p['embedding_bits'] or 32}"] if p["embedding_bits"] != 8 else []
    words += [f"u{round(100 * p['upgraded_share'])}"] if p["upgraded_share"] else []  # type: ignore[operator,arg-type]
    return words
