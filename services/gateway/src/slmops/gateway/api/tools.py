"""The tools of a chat request: functions that the model may ask the client to call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from slmops.gateway.api.body import Body, unsupported
from slmops.gateway.serving.inference import Tool, Tools

_Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]


class _Function(Body):
    """Absent `parameters` mean that the function has none."""

    name: _Name
    description: str | None = None
    parameters: dict[str, Any] = Field(default_factory=lambda: {"type": "object", "properties": {}})
    strict: bool = False


class FunctionTool(Body):
    type: Literal["function"]
    function: _Function

    def plain(self) -> Tool:
        function = self.function
        return Tool(name=function.name, description=function.description, parameters=function.parameters)


class _FunctionName(Body):
    name: str


class NamedFunction(Body):
    """A `tool_choice` that names the function which the model must call."""

    type: Literal["function"]
    function: _FunctionName


def _known(choice: Any) -> Any:
    kind = choice.get("type") if isinstance(choice, dict) else None
    if choice not in ("none", "auto", "required") and kind != "function":
        raise unsupported("tool_choice", "'tool_choice' must be none, auto, required or a function of 'tools'")
    return choice


Choice = Annotated[Literal["none", "auto", "required"] | NamedFunction, BeforeValidator(_known)]


def check_tools(tools: Sequence[FunctionTool], choice: Choice | None) -> None:
    """Raises `PydanticCustomError` for two tools of one name and for a choice that the tools do not offer."""
    names = [tool.function.name for tool in tools]
    if len(names) != len(set(names)):
        raise _invalid("tools", "two tools have the same name")
    if choice == "required" and not tools:
        raise _invalid("tool_choice", "a call is required, but there are no tools")
    if isinstance(choice, NamedFunction) and choice.function.name not in names:
        raise _invalid("tool_choice", "the function is not in tools")


def _invalid(name: str, reason: str) -> PydanticCustomError:
    return PydanticCustomError("invalid_tools", "{reason}", {"param": name, "reason": reason})


def tools_of(tools: Sequence[FunctionTool], choice: Choice | None, *, parallel: bool) -> Tools | None:
    """Returns the tools that the model is shown; None if it may call none."""
    if not tools or choice == "none":
        return None
    named = (choice.function.name,) if isinstance(choice, NamedFunction) else None
    return Tools(
        offered=tuple(tool.plain() for tool in tools),
        callable=named or tuple(tool.function.name for tool in tools),
        required=named is not None or choice == "required",
        parallel=parallel and named is None,
        strict=any(tool.function.strict for tool in tools),
    )
