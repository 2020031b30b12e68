"""Deltas are made from what most gateways run; the cheapest chain is compared with a search over all chains."""

from __future__ import annotations

from datetime import UTC, datetime
from itertools import pairwise, permutations

from hypothesis import given
from hypothesis import strategies as st

from slmops.contracts.descriptor import Descriptor, Digest, digest_of
from slmops.contracts.events import PackageDeltaPublished
from slmops.contracts.manifest import DELTA, FILE_PATH, MODEL_CONFIG, WEIGHT, Manifest
from slmops.packager.routes import MAX_STEPS, bases_of, cheapest_route, new_bytes


def named(name: str) -> Digest:
    return digest_of(name.encode())


def delta(base: str, target: str, size: int) -> PackageDeltaPublished:
    return PackageDeltaPublished(
        model="smollm2",
        version="1.0.0",
        base=named(base),
        target=named(target),
        delta=Descriptor(media_type=DELTA, digest=named(f"{base}{target}{size}"), size=size),
        full_bytes=1000,
        at=datetime(2030, 1, 1, tzinfo=UTC),
    )


def test_deltas_start_from_what_most_gateways_run():
    running = {named("a"): 3, named("b"): 70, named("c"): 20, named("other model"): 500, named("new"): 1}
    known = [named(name) for name in ("a", "b", "c", "new", "never run")]
    assert bases_of(running, named("new"), known, 2) == [named("b"), named("c")]
    assert bases_of(running, named("new"), known, 9) == [named("b"), named("c"), named("a")]
    assert bases_of(running, named("new"), known, 0) == []


def test_two_short_steps_are_cheaper_than_a_long_one():
    deltas = [delta("a", "c", 90), delta("a", "b", 10), delta("b", "c", 20), delta("x", "c", 1)]
    assert [step.delta.size for step in cheapest_route(deltas, [named("a")], named("c"))] == [10, 20]
    assert [step.delta.size for step in cheapest_route(deltas, [named("a"), named("x")], named("c"))] == [1]
    assert cheapest_route(deltas, [named("unknown")], named("c")) == []


def test_a_chain_has_at_most_max_steps():
    names = "abcdefgh"
    deltas = [delta(before, after, 1) for before, after in pairwise(names)]
    assert len(cheapest_route(deltas, [named("a")], named(names[MAX_STEPS]))) == MAX_STEPS
    assert cheapest_route(deltas, [named("a")], named(names[MAX_STEPS + 1])) == []


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from("abcd"), st.integers(1, 50)), max_size=12))
def test_no_other_chain_is_cheaper(edges):
    found = cheapest_route([delta(*edge) for edge in edges], [named("a")], named("d"))
    price = {(base, target): 10**6 for base in "abcd" for target in "abcd"}
    for base, target, size in edges:
        price[base, target] = min(price[base, target], size)
    chains = [("a", *between, "d") for count in range(3) for between in permutations("bc", count)]
    cheapest = min(sum(price[step] for step in pairwise(chain)) for chain in chains)
    assert sum(step.delta.size for step in found) == (cheapest if cheapest < 10**6 else 0)
    for before, after in pairwise(found):
        assert before.target == after.base


def test_layers_that_the_gateway_already_has_cost_nothing():
    def manifest(*layers: tuple[str, int]) -> Manifest:
        return Manifest(
            config=Descriptor(media_type=MODEL_CONFIG, digest=named("config"), size=2),
            layers=tuple(
                Descriptor(media_type=WEIGHT, digest=named(name), size=size, annotations={FILE_PATH: name})
                for name, size in layers
            ),
        )

    assert new_bytes(manifest(("a", 5), ("b", 7)), manifest(("b", 7), ("c", 11), ("d", 13))) == 24
