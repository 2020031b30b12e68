"""The properties of `resolve` for every gateway, stage and salt."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slmops.contracts.blueprint import Stage
from slmops.contracts.cohort import _percent as percent_of
from slmops.contracts.cohort import cohort_percent
from slmops.contracts.descriptor import Descriptor
from slmops.contracts.plan import Candidate, Desired, Identity, Overlay, Plan, Release, Side, resolve

NAMES = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,20}[a-z0-9])?", fullmatch=True)
RINGS = st.sampled_from(["canary", "early", "fleet"])
STAGES = st.lists(
    st.builds(
        Stage,
        name=st.just("stage"),
        percent=st.floats(0, 100, exclude_min=True, allow_subnormal=False),
        selector=st.one_of(st.just({}), RINGS.map(lambda ring: {"ring": ring})),
    ),
    min_size=1,
    max_size=4,
).map(tuple)


def release(version: str, max_tokens: int = 256) -> Release:
    manifest, signature = (Descriptor.of(f"{kind} {version}".encode(), "application/json") for kind in ("m", "s"))
    return Release.model_validate(
        {
            "revision": 1,
            "model": "smollm2",
            "version": version,
            "manifest": manifest,
            "signature": signature,
            "size_bytes": 1,
            "runtime": {"max_tokens": max_tokens},
        }
    )


def plan(stages: tuple[Stage, ...], stage: int = 0, salt: str = "edge-chat-1", **changes: Any) -> Plan:
    candidate = Candidate(rollout=salt, release=release("1.0.1"), stages=stages, stage=stage)
    values = {"blueprint": "edge-chat", "generation": 1, "stable": release("1.0.0"), "candidate": candidate}
    return Plan(**(values | changes))


def gateway(gateway_id: str, ring: str = "fleet") -> Identity:
    return Identity(gateway_id=gateway_id, blueprint="edge-chat", labels={"ring": ring})


@given(STAGES, NAMES, RINGS, NAMES)
def test_resolving_again_or_after_the_wire_gives_the_same_result(
    stages: tuple[Stage, ...], gateway_id: str, ring: str, salt: str
) -> None:
    asked, identity = plan(stages, salt=salt), gateway(gateway_id, ring)
    answer = resolve(asked, (), identity)
    assert resolve(asked, (), identity) == answer
    travelled = Plan.model_validate_json(asked.model_dump_json())
    assert resolve(travelled, (), Identity.model_validate_json(identity.model_dump_json())) == answer
    assert Desired.model_validate_json(answer.model_dump_json()) == answer


def test_another_process_with_another_hash_seed_gives_the_same_cohorts() -> None:
    code = "from slmops.contracts.cohort import cohort_percent as c; print([c('r', f'gw-{n}') for n in range(20)])"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert answer.strip() == str([cohort_percent("r", f"gw-{n}") for n in range(20)])


def test_the_cohort_of_a_gateway_is_part_of_the_contract() -> None:
    """Gateways of different releases must agree on cohorts, so these figures never change. Computed with sha256sum."""
    assert cohort_percent("edge-chat-1", "gw-1") == pytest.approx(83.795194176877835, abs=1e-9)
    assert cohort_percent("edge-chat-2", "gw-1") == pytest.approx(33.467887502614595, abs=1e-9)


@given(STAGES, NAMES, RINGS)
def test_a_later_stage_never_takes_the_candidate_away(stages: tuple[Stage, ...], gateway_id: str, ring: str) -> None:
    sides = [resolve(plan(stages, number), (), gateway(gateway_id, ring)).side for number in range(len(stages))]
    had = [side is Side.CANDIDATE for side in sides]
    assert had == sorted(had)


@given(st.floats(0.01, 100), st.floats(0.01, 100), NAMES)
def test_a_higher_percentage_includes_the_gateways_of_a_lower_one(one: float, other: float, gateway_id: str) -> None:
    low, high = sorted((one, other))
    in_low, in_high = (
        resolve(plan((Stage(name="stage", percent=p),)), (), gateway(gateway_id)).side is Side.CANDIDATE
        for p in (low, high)
    )
    assert in_high or not in_low


@given(NAMES, NAMES)
def test_one_hundred_percent_is_everybody(gateway_id: str, salt: str) -> None:
    assert 0 <= cohort_percent(salt, gateway_id) < 100
    assert resolve(plan((Stage(name="all"),), salt=salt), (), gateway(gateway_id)).side is Side.CANDIDATE


@given(st.binary(min_size=8, max_size=32))
def test_every_digest_is_below_one_hundred(digest: bytes) -> None:
    assert 0 <= percent_of(digest) < 100


def test_the_largest_digest_still_lies_below_one_hundred() -> None:
    assert percent_of(b"\xff" * 32) < 100


@pytest.mark.parametrize("salt", ["edge-chat-1", "edge-chat-2", "kiosk-7"])
def test_cohorts_are_uniform(salt: str) -> None:
    """Chi-square over 20 cells of 20,000 gateways: below 43.82 with probability 0.999 (19 degrees of freedom)."""
    count, cells = 20_000, [0] * 20
    for number in range(count):
        cells[int(cohort_percent(salt, f"gw-{number}") // 5)] += 1
    expected = count / len(cells)
    assert sum((found - expected) ** 2 / expected for found in cells) < 43.82


def test_each_rollout_has_other_cohorts() -> None:
    """Of 10,000 gateways about 1% are in the first tenth of two rollouts; with the same cohorts it would be 10%."""
    both = sum(cohort_percent("r-1", f"gw-{n}") < 10 and cohort_percent("r-2", f"gw-{n}") < 10 for n in range(10_000))
    assert 60 < both < 140


@given(STAGES, NAMES, RINGS, st.integers(0, 3))
def test_a_pinned_gateway_stays_on_stable(stages: tuple[Stage, ...], gateway_id: str, ring: str, stage: int) -> None:
    pinned = Overlay(gateway_id=gateway_id, pinned_to_stable=True)
    answer = resolve(plan(stages, stage), [pinned], gateway(gateway_id, ring))
    assert (answer.side, answer.release) == (Side.STABLE, release("1.0.0"))
    assert answer.explain["release"] == "overlay: pinned to stable"


def test_a_pinned_gateway_without_a_stable_release_gets_nothing() -> None:
    pinned = Overlay(gateway_id="gw-1", pinned_to_stable=True)
    answer = resolve(plan((Stage(name="all"),), stable=None), [pinned], gateway("gw-1"))
    assert (answer.side, answer.release) == (Side.NONE, None)


@given(STAGES, NAMES)
def test_another_gateways_overlay_changes_nothing(stages: tuple[Stage, ...], gateway_id: str) -> None:
    foreign = Overlay(gateway_id=f"x{gateway_id}", pinned_to_stable=True, max_tokens=1)
    asked, identity = plan(stages), gateway(gateway_id)
    assert resolve(asked, [foreign], identity) == resolve(asked, (), identity)


@given(RINGS, RINGS)
def test_a_selector_requires_every_label(wanted: str, ring: str) -> None:
    identity = Identity(gateway_id="gw-1", blueprint="edge-chat", labels={"ring": ring, "site": "a"})
    for selector, expected in (({"ring": wanted}, ring == wanted), ({"ring": wanted, "site": "b"}, False), ({}, True)):
        side = resolve(plan((Stage(name="stage", selector=selector),)), (), identity).side
        assert (side is Side.CANDIDATE) == expected


@given(STAGES, NAMES)
def test_without_a_candidate_everybody_is_on_stable(stages: tuple[Stage, ...], gateway_id: str) -> None:
    assert resolve(plan(stages, candidate=None), (), gateway(gateway_id)).side is Side.STABLE
    assert resolve(plan(stages, candidate=None, stable=None), (), gateway(gateway_id)).side is Side.NONE


@given(st.integers(1, 4096))
def test_an_overlay_changes_allowed_settings_and_is_named_as_the_source(max_tokens: int) -> None:
    overlay = Overlay(gateway_id="gw-1", max_tokens=max_tokens, set_by="ops")
    answer = resolve(plan((Stage(name="all"),)), [overlay], gateway("gw-1"))
    assert answer.release is not None
    assert answer.release.runtime.max_tokens == max_tokens
    assert answer.release.manifest == release("1.0.1").manifest
    assert answer.explain["runtime.max_tokens"] == "overlay of gw-1, set by ops"
