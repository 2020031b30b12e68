"""Who answers a client's questions: the bus, or a bundle where there is none."""

from __future__ import annotations

from typing import Protocol, TypeVar

from pydantic import BaseModel

from slmops.contracts.commands import Command

R = TypeVar("R", bound=BaseModel)


class Answers(Protocol):
    async def request(self, command: Command[R], /) -> R:
        """Raises the answerer's typed error."""
