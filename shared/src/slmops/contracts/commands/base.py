"""The base classes of commands and results."""

from __future__ import annotations

from typing import Any, ClassVar, Generic, TypeVar

from pydantic import BaseModel, ConfigDict

R = TypeVar("R", bound=BaseModel)
COMMANDS: dict[str, type[Command[Any]]] = {}
"""Subject → class of every command."""


class Result(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class Command(BaseModel, Generic[R]):
    """A request. `service` is the service that answers it; `name` is the last part of its subject.

    `confidential`: the payload contains a secret. It is not stored anywhere, also not as a dead letter.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    service: ClassVar[str] = ""
    name: ClassVar[str] = ""
    per_gateway: ClassVar[bool] = False
    confidential: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.name:
            COMMANDS[cls.subject_template()] = cls

    @classmethod
    def subject_template(cls) -> str:
        base = f"cmd.{cls.service}.{cls.name}"
        return f"{base}.{{gateway_id}}" if cls.per_gateway else base

    @property
    def subject(self) -> str:
        base = f"cmd.{self.service}.{self.name}"
        return f"{base}.{self.model_dump()['gateway_id']}" if self.per_gateway else base

    @classmethod
    def result_type(cls) -> type[R]:
        for base in cls.__mro__:
            metadata = getattr(base, "__pydantic_generic_metadata__", None)
            if metadata and metadata["args"]:
                return metadata["args"][0]  # type: ignore[no-any-return]
        raise TypeError(f"{cls.__name__} declares no result")
