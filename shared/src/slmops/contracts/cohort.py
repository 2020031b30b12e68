"""Which gateways a stage of a rollout selects: those with its labels, up to its percentage by hash.

The cohort of a gateway is drawn anew for each rollout, so the same gateways are not always first.
"""

from __future__ import annotations

import hashlib

from slmops.contracts.blueprint import Stage
from slmops.contracts.identity import Identity


def cohort_percent(salt: str, gateway_id: str) -> float:
    """Where a gateway lies in [0, 100): uniform over gateways, independent between salts."""
    return _percent(hashlib.sha256(f"{salt}\x1f{gateway_id}".encode()).digest())


def _percent(digest: bytes) -> float:
    """The first 53 bits as a share of 100. A double holds no more: of 64 bits the largest would round up to 100, and a
    gateway at 100 would be in no stage at all."""
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53 * 100


def in_stage(stage: Stage, salt: str, identity: Identity) -> bool:
    labels = identity.labels
    if any(labels.get(key) != value for key, value in stage.selector.items()):
        return False
    return cohort_percent(salt, identity.gateway_id) < stage.percent
