"""The base classes of commands and results."""

from __future__ import annotations

from typing import Any, ClassVar, Generic, TypeVar

from pydantic import BaseModel, ConfigDict

from slmops.contracts.identity import Actor

R = TypeVar("R", bound=BaseModel)
COMMANDS: dict[str, type[Command[Any]]] = {}
"""Subject → class of every command."""


class Result(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class Command(BaseModel, Generic[R]):
    """A request. `service` is the service that answers it; `name` is its name there.

    It is published on `cmd.<service>.<name>.<sender>` (`contracts.identity`): the sender is a person or a service, or a
    gateway for a command that is `per_gateway`. An `anonymous` one has no sender, because it asks to become somebody.
    `confidential`: the payload contains a secret. It is not stored anywhere, also not as a dead letter.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    service: ClassVar[str] = ""
    name: ClassVar[str] = ""
    per_gateway: ClassVar[bool] = False
    anonymous: ClassVar[bool] = False
    confidential: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.name:
            COMMANDS[cls.subject_template()] = cls

    @classmethod
    def subject_template(cls) -> str:
        base = f"cmd.{cls.service}.{cls.name}"
        return f"{base}.{{gateway_id}}" if cls.per_gateway else base

    @classmethod
    def pattern(cls) -> str:
        """Returns the NATS pattern of its subjects, of all senders."""
        if cls.anonymous:
            return cls.subject_template()
        return f"cmd.{cls.service}.{cls.name}." + ("*" if cls.per_gateway else "*.*")

    def sent_by(self, sender: Actor) -> str:
        """Returns the subject on which `sender` publishes it."""
        base = f"cmd.{self.service}.{self.name}"
        if self.per_gateway:
            return f"{base}.{self.model_dump()['gateway_id']}"
        return base if self.anonymous else f"{base}.{sender.token}"

    @classmethod
    def result_type(cls) -> type[R]:
        for base in cls.__mro__:
            metadata = getattr(base, "__pydantic_generic_metadata__", None)
            if metadata and metadata["args"]:
                return metadata["args"][0]  # type: ignore[no-any-return]
        raise TypeError(f"{cls.__name__} declares no result")
