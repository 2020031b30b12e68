"""A blueprint that cannot be carried out is refused with the reason, and nothing is recorded."""

from __future__ import annotations

from typing import Any

import pytest
from unit.rollout.rollout_examples import T0, blueprint

from slmops.contracts.blueprint import Blueprint, GatePolicy, RuntimeSettings, SoakPolicy, Stage, TelemetryPolicy
from slmops.contracts.commands import ApplyBlueprint, StartRollout
from slmops.contracts.errors import InvalidBlueprint
from slmops.rollout.domain.blueprint import BlueprintState, evolve
from slmops.rollout.domain.decide import apply_blueprint, start_rollout
from slmops.rollout.domain.soundness import MOST_STAGES, check_stages

CANARY, HALF, ALL = Stage(name="canary", selector={"ring": "canary"}), Stage(name="half", percent=50), Stage(name="all")
SITE = Stage(name="site", selector={"ring": "canary", "site": "a"})
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"stages": (CANARY, CANARY)}, "two stages are named canary"),
    ({"stages": (ALL, HALF)}, "half selects no gateway that is not in stage all"),
    ({"stages": (CANARY, SITE, ALL)}, "site selects no gateway that is not in stage canary"),
    ({"stages": (CANARY, HALF, Stage(name="again", percent=50))}, "again selects no gateway"),
    ({"stages": tuple(Stage(name=f"s{n}", percent=n + 1) for n in range(MOST_STAGES + 1))}, "33 stages"),
    ({"stages": (Stage(name="wide", selector={f"l{n}": "x" for n in range(65)}),)}, "65 labels"),
    ({"stages": (Stage(name="long", selector={"ring": "x" * 256}),)}, "4 [+] 256 characters"),
    ({"stages": (Stage(name="odd", selector={"ring": "a\0b"}),)}, "control character"),
    ({"gate": GatePolicy(deadline_s=1e300)}, "gate.deadline_s is 1e[+]300 s"),
    ({"gate": GatePolicy(min_decode_s=float("inf"))}, "gate.min_decode_s is inf s"),
    ({"soak": SoakPolicy(seconds=float("inf"))}, "soak.seconds is inf s"),
    ({"telemetry": TelemetryPolicy(every_s=1e9)}, "telemetry.every_s"),
    ({"runtime": RuntimeSettings(max_tokens=4096, context_tokens=2048)}, "4096 tokens does not fit .* 2048"),
]


@pytest.mark.parametrize(("changes", "reason"), REFUSED, ids=[reason for _, reason in REFUSED])
def test_a_blueprint_that_contradicts_itself_is_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidBlueprint, match=reason) as refusal:
        apply_blueprint(BlueprintState("edge-chat"), ApplyBlueprint(spec=blueprint(**changes)), T0)
    assert refusal.value.fix


@pytest.mark.parametrize("stages", [(CANARY, HALF, ALL), (SITE, CANARY, ALL), (HALF, CANARY, ALL), (ALL,)])
def test_stages_that_each_add_gateways_are_accepted(stages: tuple[Stage, ...]) -> None:
    check_stages("edge-chat", stages)


def test_the_stages_of_a_command_are_checked_too() -> None:
    state = BlueprintState("edge-chat")
    for event in apply_blueprint(state, ApplyBlueprint(spec=blueprint()), T0):
        state = evolve(state, event)
    with pytest.raises(InvalidBlueprint, match="two stages"):
        start_rollout(state, StartRollout(blueprint="edge-chat", stages=(ALL, ALL)), [], T0)


def test_the_default_blueprint_is_sound() -> None:
    assert apply_blueprint(BlueprintState("a"), ApplyBlueprint(spec=Blueprint(name="a", model="m")), T0)
