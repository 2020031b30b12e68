"""Represents a recipe as a point of the search space: its quantization, and the passes before and after it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from slmops.contracts.recipe import PassSpec, Recipe

QUANTIZE, PACK, PRUNE, DISTILL = "quantize", "pack", "prune-width", "distill"
_COSTS = {PACK: 0, "build": 0, QUANTIZE: 1, DISTILL: 4}
_CALIBRATED, _OTHER = 2, 3
_LONGEST_NAME = 56  # of 63 characters, because the first characters of a digest may follow
_DISTILLATION_MINUTES = 15.0  # as in the bundled recipe `student`


@dataclass(frozen=True)
class Quantized:
    """A recipe with one quantize pass: `params` are all its parameters, `before` and `after` the other passes."""

    before: tuple[PassSpec, ...]
    params: Mapping[str, Any]
    after: tuple[PassSpec, ...]

    @classmethod
    def of(cls, recipe: Recipe) -> Self | None:
        """Returns None for a recipe that does not have exactly one `quantize` pass."""
        places = [number for number, step in enumerate(recipe.passes) if step.pass_ == QUANTIZE]
        if len(places) != 1:
            return None
        at = places[0]
        return cls(recipe.passes[:at], recipe.passes[at].params, recipe.passes[at + 1 :])

    @property
    def share(self) -> float:
        return float(self.params["upgraded_share"])

    def same_except_share(self, other: Recipe) -> bool:
        """Returns whether the recipes differ at most in the share of weights that get more bits."""
        point = Quantized.of(other)
        return point is not None and point.changed(upgraded_share=0).digest == self.changed(upgraded_share=0).digest

    def changed(self, **changes: Any) -> Recipe:
        """Returns the recipe with other parameters of its quantize pass."""
        return _recipe((*self.before, PassSpec(pass_=QUANTIZE, params={**self.params, **changes}), *self.after))

    def pruned(self, share: float, *, distilled: bool) -> Recipe:
        """Returns the recipe with this pruning in place of all its passes before quantization."""
        before = [PassSpec(pass_=PRUNE, params={"share": share})]
        before += [PassSpec(pass_=DISTILL, params={"minutes": _DISTILLATION_MINUTES})] * distilled
        return _recipe((*before, PassSpec(pass_=QUANTIZE, params=dict(self.params)), *self.after))

    @property
    def pruned_share(self) -> float:
        return max((float(step.params.get("share", 0)) for step in self.before if step.pass_ == PRUNE), default=0.0)  # type: ignore[arg-type]


def least_bytes(recipe: Recipe, parameters: int) -> int:
    """Returns a lower bound of the bytes of the recipe's variant; 0 if it is not known without making the variant.

    Every weight takes at least the fewest bits that the recipe gives to any. Pruning leaves fewer weights.
    """
    point = Quantized.of(recipe)
    if point is None or any(step.pass_.startswith("prune-") for step in point.before):
        return 0
    bits = min(int(point.params.get("bits", 4)), int(point.params.get("embedding_bits", 8) or 32))
    return parameters * bits // 8


def cost(recipe: Recipe) -> int:
    """Returns a rank by expected time: rounding takes seconds, GPTQ minutes, pruning and training longer."""
    return max(_cost(step) for step in recipe.passes)


def least_seconds(recipe: Recipe) -> float:
    """Returns the training time that the recipe's own parameters set, in seconds."""
    minutes = (step.params.get("minutes") for step in recipe.passes if step.pass_ == DISTILL)
    return sum(60 * float(limit) for limit in minutes if isinstance(limit, int | float))


def _cost(step: PassSpec) -> int:
    if step.pass_ == QUANTIZE and step.params.get("method") == "gptq":
        return _CALIBRATED
    return _COSTS.get(step.pass_, _OTHER)


def _recipe(passes: tuple[PassSpec, ...]) -> Recipe:
    """Returns a recipe whose name lists its passes and parameters, such as `w20-distill-int4-g32-s8-gptq-u11`."""
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
