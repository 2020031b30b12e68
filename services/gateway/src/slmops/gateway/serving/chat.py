"""The request and response bodies of OpenAI's chat completions."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field, field_validator

from slmops.gateway.serving.inference import ChatMessage, Done, InferenceRequest, Release


class _Part(BaseModel):
    type: Literal["text"]
    text: str


class _Message(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[_Part]

    def plain(self) -> ChatMessage:
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        # "developer" is OpenAI's newer name for "system". Chat templates only know "system".
        return ChatMessage(role="system" if self.role == "developer" else self.role, content=content)


class _StreamOptions(BaseModel):
    include_usage: bool = False


class ChatRequest(BaseModel):
    """A chat completion request. Ignores unknown fields, as OpenAI's clients expect.

    Rejects fields that would change the meaning of the answer and are not supported.
    """

    model: str | None = None
    messages: list[_Message] = Field(min_length=1, max_length=1000)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    temperature: float = Field(default=1.0, ge=0, le=2, allow_inf_nan=False)
    top_p: float = Field(default=1.0, gt=0, le=1, allow_inf_nan=False)
    seed: int | None = None
    stop: list[str] = Field(default_factory=list, max_length=4)
    stream: bool = False
    stream_options: _StreamOptions | None = None
    n: Literal[1] | None = None
    tools: list[Any] | None = Field(default=None, max_length=0)
    logprobs: Literal[False] | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return [] if value is None else [value] if isinstance(value, str) else value

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def inference(self, default_max_tokens: int) -> InferenceRequest:
        return InferenceRequest(
            messages=tuple(message.plain() for message in self.messages),
            max_tokens=self.max_completion_tokens or self.max_tokens or default_max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=self.seed,
            stop=tuple(self.stop),
            stream=self.stream,
        )


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
        message = {"role": "assistant", "content": done.text}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": done.finish_reason}
        return {**self._head, "object": "chat.completion", "choices": [choice], "usage": usage(done)}

    def chunk(self, delta: dict[str, str], finish_reason: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return {**self._head, "object": "chat.completion.chunk", "choices": [choice]}

    def usage_chunk(self, done: Done) -> dict[str, Any]:
        return {**self._head, "object": "chat.completion.chunk", "choices": [], "usage": usage(done)}
