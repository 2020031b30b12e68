"""Selects the gateways of a rollout's stage: those with its labels, up to its percentage by hash.

A gateway's cohort depends on the rollout, so the same gateways are not always first.
"""

from __future__ import annotations

import hashlib

from slmops.contracts.blueprint import Stage
from slmops.contracts.identity import Identity


def cohort_percent(salt: str, gateway_id: str) -> float:
    """Returns a gateway's position in [0, 100): uniform over gateways, independent between salts."""
    return _percent(hashlib.sha256(f"{salt}\x1f{gateway_id}".encode()).digest())


def _percent(digest: bytes) -> float:
    """Returns the first 53 bits, scaled to [0, 100). A double holds no more bits: the largest 64-bit values would round
    up to 100, and a gateway at 100 would be in no stage."""
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53 * 100


def in_stage(stage: Stage, salt: str, identity: Identity) -> bool:
    """Returns whether a stage selects a gateway."""
    labels = identity.labels
    if any(labels.get(key) != value for key, value in stage.selector.items()):
        return False
    # Every position is below 100, so most stages need no hash.
    return stage.percent >= 100 or cohort_percent(salt, identity.gateway_id) < stage.percent
