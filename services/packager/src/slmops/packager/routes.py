"""Decides which deltas to make and which chain of deltas a gateway should use. Pure."""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable, Mapping

from slmops.contracts.descriptor import Digest
from slmops.contracts.events import PackageDeltaPublished
from slmops.contracts.manifest import Manifest

MAX_STEPS = 4
"""Longest chain of deltas: each step writes a whole package to the gateway's disk before the next can begin."""


def bases_of(running: Mapping[Digest, int], target: Digest, known: Collection[Digest], most: int) -> list[Digest]:
    """Returns the packages from which deltas to `target` are made: what the fleet runs now, most common first.

    `running`: number of gateways by manifest; `known`: packages of the same model that are published here; `most`:
    length of the result at most.
    """
    found = [digest for digest in running if digest in known and digest != target]
    return sorted(found, key=lambda digest: (-running[digest], digest))[:most]


def new_bytes(base: Manifest, target: Manifest) -> int:
    """Returns the size of the layers that a gateway with `base` would have to fetch whole."""
    present = {layer.digest for layer in base.layers}
    return sum({layer.digest: layer.size for layer in target.layers if layer.digest not in present}.values())


def cheapest_route(
    deltas: Iterable[PackageDeltaPublished], have: Collection[Digest], target: Digest
) -> list[PackageDeltaPublished]:
    """Returns the chain of deltas with the fewest bytes from any of `have` to `target`; empty when there is no chain.

    Dijkstra's algorithm, at most `MAX_STEPS` steps.
    """
    leaving: dict[Digest, list[PackageDeltaPublished]] = {}
    for delta in deltas:
        leaving.setdefault(delta.base, []).append(delta)
    # The number breaks ties, so that the heap never compares events.
    waiting: list[tuple[int, int, Digest, list[PackageDeltaPublished]]] = [
        (0, number, digest, []) for number, digest in enumerate(sorted(have))
    ]
    done: set[Digest] = set()
    number = len(waiting)
    while waiting:
        cost, _, at, route = heapq.heappop(waiting)
        if at == target:
            return route
        if at in done or len(route) == MAX_STEPS:
            continue
        done.add(at)
        for delta in leaving.get(at, ()):
            number += 1
            heapq.heappush(waiting, (cost + delta.delta.size, number, delta.target, [*route, delta]))
    return []
