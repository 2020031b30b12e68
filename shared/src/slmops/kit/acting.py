"""Who sent the command that this task carries out. The journal writes it into every event that follows from it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from slmops.contracts.identity import Actor

_actor: ContextVar[Actor | None] = ContextVar("actor", default=None)


def current_actor() -> Actor | None:
    """Returns the sender; None outside a command, as for what a service decides by itself."""
    return _actor.get()


@contextmanager
def acting(actor: Actor | None) -> Iterator[None]:
    """Carries out the block in the name of `actor`."""
    token = _actor.set(actor)
    try:
        yield
    finally:
        _actor.reset(token)
