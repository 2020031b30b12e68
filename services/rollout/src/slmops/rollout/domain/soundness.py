"""Whether a blueprint can be carried out. Its fields are valid by their types; here they are compared with one another.

The checks are not part of the contract's types, because journals and plans of earlier releases must stay readable.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations
from math import isfinite
from typing import Final

from slmops.contracts.blueprint import Blueprint, Stage
from slmops.contracts.errors import InvalidBlueprint
from slmops.contracts.identity import label_problem

MOST_STAGES: Final = 32
"""The plan contains all stages, and every gateway of the blueprint reads it."""
LONGEST_S: Final = 366 * 86_400
"""The longest duration in seconds. A much longer one cannot be added to a date."""


def check_blueprint(spec: Blueprint) -> None:
    """Raises `InvalidBlueprint` for a blueprint that contradicts itself or has no end."""
    for name, seconds in _durations(spec):
        if not isfinite(seconds) or seconds > LONGEST_S:
            raise _invalid(spec.name, f"{name} is {seconds:g} s", "Use at most 366 days.")
    runtime = spec.runtime
    if runtime.max_tokens > runtime.context_tokens:
        what = f"an answer of {runtime.max_tokens} tokens does not fit into a context of {runtime.context_tokens}"
        raise _invalid(spec.name, what, "Lower runtime.max_tokens, or raise runtime.context_tokens.")
    check_stages(spec.name, spec.stages)


def check_stages(blueprint: str, stages: Sequence[Stage]) -> None:
    """Raises `InvalidBlueprint` for stages of which one cannot be told from, or adds nothing to, an earlier one."""
    if len(stages) > MOST_STAGES:
        raise _invalid(blueprint, f"it has {len(stages)} stages", f"Use at most {MOST_STAGES}.")
    for stage in stages:
        if problem := label_problem(stage.selector):
            raise _invalid(blueprint, f"the selector of stage {stage.name}: {problem}", "Use shorter or fewer labels.")
    for earlier, later in combinations(stages, 2):
        if earlier.name == later.name:
            raise _invalid(blueprint, f"two stages are named {later.name}", "Give each stage its own name.")
        if later.percent <= earlier.percent and earlier.selector.items() <= later.selector.items():
            what = f"stage {later.name} selects no gateway that is not in stage {earlier.name} already"
            raise _invalid(blueprint, what, "Raise its percent, change its selector, or remove it.")


def _durations(spec: Blueprint) -> Iterator[tuple[str, float]]:
    yield "gate.deadline_s", spec.gate.deadline_s
    yield "gate.min_decode_s", spec.gate.min_decode_s
    yield "probe.max_ttft_s", spec.probe.max_ttft_s
    yield "soak.seconds", spec.soak.seconds
    yield "soak.golden_every_s", spec.soak.golden_every_s
    yield "telemetry.every_s", spec.telemetry.every_s


def _invalid(blueprint: str, what: str, fix: str) -> InvalidBlueprint:
    return InvalidBlueprint(f"blueprint {blueprint} cannot be carried out: {what}", where=blueprint, fix=fix)
