"""The request and response bodies of OpenAI's chat completions."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from slmops.gateway.serving.body import Body, RequestBody
from slmops.gateway.serving.inference import ChatMessage, Done, InferenceRequest, Release, TokenLimits

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


class ChatRequest(RequestBody):
    """A chat completion request."""

    messages: list[_Message] = Field(min_length=1, max_length=1000)
    max_completion_tokens: int | None = Field(default=None, ge=1)

    @property
    def limit(self) -> tuple[str, int] | None:
        if self.max_completion_tokens is not None:
            return "max_completion_tokens", self.max_completion_tokens
        return super().limit

    def inference(self, limits: TokenLimits | None) -> InferenceRequest:
        return InferenceRequest(messages=tuple(message.plain() for message in self.messages), **self.options(limits))


def usage(done: Done) -> dict[str, int]:
    return {
        "prompt_tokens": done.prompt_tokens,
        "completion_tokens": done.completion_tokens,
        "total_tokens": done.prompt_tokens + done.completion_tokens,
    }


class Reply:
    """Makes the bodies of one answer, which share an id, a time and a model."""

    def __init__(self, reply_id: str, created: int, release: Release) -> None:
        # The fingerprint lets a client see which release answered.
        self._head = {"id": reply_id, "created": created, "model": release.model, "system_fingerprint": release.digest}

    def whole(self, done: Done) -> dict[str, Any]:
        message = {"role": "assistant", "content": done.text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": done.finish_reason}
        return {**self._head, "object": "chat.completion", "choices": [choice], "usage": usage(done)}

    def chunk(self, delta: dict[str, str], finish_reason: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return {**self._head, "object": "chat.completion.chunk", "choices": [choice]}

    def usage_chunk(self, done: Done) -> dict[str, Any]:
        return {**self._head, "object": "chat.completion.chunk", "choices": [], "usage": usage(done)}
