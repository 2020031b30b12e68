"""The interface for sending requests. The bus implements it, and a bundle where there is no bus."""

from __future__ import annotations

from typing import Protocol, TypeVar

from pydantic import BaseModel

from slmops.contracts.commands import Command

R = TypeVar("R", bound=BaseModel)


class Answers(Protocol):
    async def request(self, command: Command[R], /) -> R:
        """Returns the result of a command. Raises a typed error."""
