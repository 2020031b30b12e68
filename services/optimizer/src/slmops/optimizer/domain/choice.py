"""Chooses one of the variants that passed, by the requested preference."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from pydantic import BaseModel, ConfigDict

from slmops.contracts.evaluation import Evaluation
from slmops.contracts.profile import DeviceProfile
from slmops.contracts.search import Prefer
from slmops.optimizer.domain.candidate import Candidate
from slmops.optimizer.domain.gate import shown

ANCHORED_BYTES = 1.02
"""An anchored variant is chosen if it has at most this many times the bytes of the smallest variant that passes."""
_NAMED_REFUSALS = 3  # a search may refuse dozens; each variant has its own reasons


class Choice(BaseModel):
    """The choice: `recipe` is None if nothing passed, `reason` is one sentence for people."""

    model_config = ConfigDict(frozen=True)

    recipe: str | None
    reason: str


def choose(
    candidates: Sequence[Candidate],
    profile: DeviceProfile,
    prefer: Prefer = "smallest",
    anchored: Collection[str] = (),
) -> Choice:
    """Returns the best candidate that passed, by `prefer`; of equal ones the first.

    The update to a variant that is `anchored` on its predecessor is a fraction of the package. If `prefer` is
    "smallest", an anchored variant that passes is therefore chosen unless it exceeds the smallest one by more than the
    factor `ANCHORED_BYTES`.
    """
    rank = ranking(prefer)
    passed = [(c.recipe, c.evaluation) for c in candidates if c.verdict.passed and c.evaluation]
    if not passed:
        return Choice(recipe=None, reason="; ".join([f"nothing passes {profile.name}", *_refusals(candidates)]))
    (best, measured), *others = sorted(passed, key=lambda pair: rank(pair[1]))
    for name, found in [(best, measured), *others] if prefer == "smallest" else []:
        if name in anchored and found.bytes <= ANCHORED_BYTES * measured.bytes:
            return Choice(recipe=name, reason=_anchored(name, found, best, measured, profile))
    reason = f"{best}: {_RULES[prefer]} of {len(passed)} that pass {profile.name}, {figures(measured)}"
    if others:
        name, runner_up = others[0]
        reason += f"; the runner-up {name} would be {_difference(measured, runner_up)}"
    return Choice(recipe=best, reason=reason)


def ranking(prefer: Prefer) -> Callable[[Evaluation], tuple[float, ...]]:
    """Returns a sort key that is lowest for the best; a missing figure counts as the worst."""

    def key(e: Evaluation) -> tuple[float, ...]:
        worst = float("inf")
        size, kl = float(e.bytes), worst if e.kl is None else e.kl
        slowness = worst if e.tokens_per_s is None else -e.tokens_per_s
        return {
            "smallest": (size, kl, slowness),
            "best_quality": (kl, size, slowness),
            "fastest": (slowness, size, kl),
        }[prefer]

    return key


def _anchored(name: str, found: Evaluation, best: str, measured: Evaluation, profile: DeviceProfile) -> str:
    reason = f"{name}: on its predecessor's grids, for a small update; passes {profile.name}, {figures(found)}"
    return reason if name == best else f"{reason}; {best} on new grids would be {_difference(found, measured)}"


_RULES: dict[Prefer, str] = {"smallest": "smallest", "best_quality": "closest to the reference", "fastest": "fastest"}


def figures(e: Evaluation) -> str:
    """Returns size, fidelity and speed of a variant as text."""
    return f"{shown('bytes', e.bytes)}, KL {e.kl:.2g}, {e.tokens_per_s:.0f} tokens/s"


def _difference(best: Evaluation, other: Evaluation) -> str:
    """Returns how `other` differs from `best` as text."""
    size, change = other.bytes - best.bytes, f"{shown('bytes', abs(other.bytes - best.bytes))}"
    weight = "of the same size" if not size else f"{change} {'larger' if size > 0 else 'smaller'}"
    return f"{weight}, at KL {other.kl:.2g} and {other.tokens_per_s:.0f} tokens/s"


def _refusals(candidates: Sequence[Candidate]) -> list[str]:
    refused = [c for c in candidates if not c.verdict.passed]
    texts = [f"{c.recipe} refused: {', '.join(c.verdict.reasons)}" for c in refused[:_NAMED_REFUSALS]]
    return texts + ([f"and {len(refused) - _NAMED_REFUSALS} more"] if len(refused) > _NAMED_REFUSALS else [])
