"""Deltas by tensor: from the files that a device has to those that it shall have, bit-exact, in few bytes.

    make(base, target, file)     both are read as named tensors; every part gets the coding that fits it best
    apply(file, bases, place)    as a stream, in bounded memory; a file counts when it has the target's digest
    describe(file)               what is in it

A delta binds digests to digests and holds no path of a machine. It is trusted for nothing: what it makes is compared
with the digest that a signed manifest names, so that a hostile one costs at most the time to find that out.
"""

from __future__ import annotations

from slmops.kit.delta.apply import apply
from slmops.kit.delta.format import Coding, DeltaFile, Header
from slmops.kit.delta.make import by_digest, make
from slmops.kit.delta.stat import Stat, describe

__all__ = ["Coding", "DeltaFile", "Header", "Stat", "apply", "by_digest", "describe", "make"]
