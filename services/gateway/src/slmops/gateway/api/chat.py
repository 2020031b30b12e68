"""The request and response bodies of OpenAI's chat completions."""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from contextlib import suppress
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from slmops.gateway.api.body import Body, RequestBody, unsupported
from slmops.gateway.api.replies import Reply
from slmops.gateway.api.tools import Choice, FunctionTool, check_tools, tools_of
from slmops.gateway.serving.inference import (
    ChatMessage,
    Done,
    InferenceRequest,
    Release,
    Token,
    TokenLimits,
    TokenLogprob,
    ToolCall,
)
from slmops.gateway.serving.tool_guidance import ONE_LINE

_Role = Literal["system", "developer", "user", "assistant", "tool", "function"]
# "developer" and "function" are OpenAI's other names for "system" and "tool", the ones that chat templates know.
_TEMPLATE_ROLE: dict[str, str] = {"developer": "system", "function": "tool"}


def _text(content: Any) -> Any:
    """Joins content that came in parts. Other parts than texts raise `ValueError`, because a model cannot see them."""
    if not isinstance(content, list):
        return content
    return "".join(_part_text(part) for part in content)


def _part_text(part: Any) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    text = part.get(kind) if kind in ("text", "refusal") else None
    if not isinstance(text, str):
        raise ValueError("a part of the content must have the type 'text' and a text")
    return text


class _Function(Body):
    name: str
    arguments: str = "{}"


class _ToolCall(Body):
    """A call that an earlier answer asked for."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: _Function

    def plain(self) -> dict[str, Any]:
        arguments: Any = self.function.arguments
        with suppress(ValueError):  # chat templates expect an object, which OpenAI's clients send as a text
            arguments = json.loads(arguments)
        return {"id": self.id, "type": self.type, "function": {"name": self.function.name, "arguments": arguments}}


class _Message(Body):
    """A message of the conversation. Fields that no chat template uses, such as `audio`, are ignored."""

    role: _Role
    content: Annotated[str | None, BeforeValidator(_text)] = None
    name: str | None = None
    tool_calls: tuple[_ToolCall, ...] = ()
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _check_content(self) -> _Message:
        if self.content is None and self.role != "assistant":
            raise ValueError("content is missing; only an assistant's message may have none")
        return self

    def plain(self) -> ChatMessage:
        return ChatMessage(
            role=_TEMPLATE_ROLE.get(self.role, self.role),
            content=self.content or "",
            name=self.name,
            tool_calls=tuple(call.plain() for call in self.tool_calls) or None,
            tool_call_id=self.tool_call_id,
        )


class _JsonSchema(Body):
    """`strict` changes nothing: the answer always fits the schema."""

    json_schema: dict[str, Any] = Field(default_factory=lambda: {"type": "object"}, alias="schema")


class _ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: _JsonSchema | None = None

    @model_validator(mode="after")
    def _check_schema(self) -> _ResponseFormat:
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("json_schema is missing")
        return self

    def schema_text(self) -> str | None:
        """Returns the JSON Schema that the answer must fit; None: any text."""
        if self.type == "text":
            return None
        if self.json_schema is None or self.type == "json_object":
            return json.dumps({"type": "object"})  # any layout: one line misled SmolLM2 here
        return json.dumps({**self.json_schema.json_schema, "x-guidance": ONE_LINE})


class ChatRequest(RequestBody):
    """A chat completion request."""

    operation: ClassVar[str] = "chat"
    messages: list[_Message] = Field(min_length=1, max_length=1000)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    response_format: _ResponseFormat = _ResponseFormat(type="text")
    logprobs: bool = False
    top_logprobs: int = Field(default=0, ge=0, le=20)
    tools: list[FunctionTool] = Field(default_factory=list, max_length=128)
    tool_choice: Choice | None = None
    parallel_tool_calls: bool = True

    @model_validator(mode="after")
    def _check_logprobs(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs")
        return self

    @model_validator(mode="after")
    def _check_tools(self) -> ChatRequest:
        check_tools(self.tools, self.tool_choice)
        if self.needs_tools and self.response_format.type != "text":
            raise unsupported("response_format", "this gateway does not support 'response_format' together with tools")
        return self

    @property
    def needs_tools(self) -> bool:
        return bool(self.tools) and self.tool_choice != "none"

    @property
    def limit(self) -> tuple[str, int] | None:
        if self.max_completion_tokens is not None:
            return "max_completion_tokens", self.max_completion_tokens
        return super().limit

    def inference(self, limits: TokenLimits | None) -> InferenceRequest:
        tools = tools_of(self.tools, self.tool_choice, parallel=self.parallel_tool_calls)
        options = self.options(limits) | {"json_schema": self.response_format.schema_text(), "tools": tools}
        if self.logprobs:  # the runner sends them with the tokens of a stream
            options |= {"logprobs": self.top_logprobs, "stream": True}
        return InferenceRequest(messages=tuple(message.plain() for message in self.messages), **options)

    def reply(self, release: Release) -> Reply:
        return ChatReply(release, logprobs=self.logprobs)


class ChatReply(Reply):
    prefix, chunk_object = "chatcmpl", "chat.completion.chunk"

    def __init__(self, release: Release, *, logprobs: bool = False) -> None:
        super().__init__(release)
        self._with_logprobs = logprobs
        self._sent_calls = 0

    def whole(self, done: Done, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": done.text, "refusal": None}
        if done.calls:
            message |= {"content": done.text or None, "tool_calls": [_call(call) for call in done.calls]}
        return self._whole("chat.completion", {"message": message, "logprobs": self._logprobs(logprobs)}, done)

    def opening(self) -> list[dict[str, Any]]:
        return [self._chunk({"delta": {"role": "assistant", "content": ""}})]

    def token(self, token: Token) -> dict[str, Any]:
        delta: dict[str, Any] = {"content": token.text} if token.text or not token.calls else {}
        if token.calls:
            delta["tool_calls"] = [{"index": self._next_call(), **_call(call)} for call in token.calls]
        return self._chunk({"delta": delta, "logprobs": self._logprobs(token.logprobs)})

    def end(self, done: Done) -> dict[str, Any]:
        return self._chunk({"delta": {}}, done.finish_reason)

    def _next_call(self) -> int:
        self._sent_calls += 1
        return self._sent_calls - 1

    def _logprobs(self, scores: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if not self._with_logprobs:
            return None
        content = [
            {**_logprob(one.text, one.logprob), "top_logprobs": [_logprob(*other) for other in one.top]}
            for one in scores
        ]
        return {"content": content, "refusal": None}


def _call(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}


def _logprob(text: str, logprob: float) -> dict[str, Any]:
    # A part of a character has no text of its own; which bytes it stands for, the runtime does not tell.
    known = None if "\ufffd" in text else list(text.encode())
    return {"token": text, "logprob": logprob, "bytes": known}
