"""Deltas by tensor: small, bit-exact updates from the files that a device has to the files that it needs.

    make(base, target, file)     reads both as named tensors and gives every part its smallest coding
    apply(file, bases, place)    applies a delta as a stream in bounded memory and checks the target's digests
    describe(file)               returns the contents of a delta

A delta refers to its base and target by digest and contains no local path. It is not trusted: its result is compared
with the digest that a signed manifest names, so a hostile delta costs only the time to detect it.
"""

from __future__ import annotations

from slmops.kit.delta.apply import apply
from slmops.kit.delta.format import Coding, DeltaFile, Header
from slmops.kit.delta.make import by_digest, make
from slmops.kit.delta.stat import Stat, describe

__all__ = ["Coding", "DeltaFile", "Header", "Stat", "apply", "by_digest", "describe", "make"]
