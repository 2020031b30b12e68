"""Requests to a runner and its responses. These types cross the pipe to the runner's process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from slmops.contracts.descriptor import Digest

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Release:
    """The release that a runner serves: the digest of the package's manifest, and the model's name and version."""

    digest: Digest
    model: str
    version: str


class ChatMessage(BaseModel):
    """A message for the chat template. The fields after `content` are for templates that know tools."""

    model_config = ConfigDict(frozen=True)

    role: str
    content: str
    name: str | None = None
    tool_calls: tuple[dict[str, Any], ...] | None = None
    tool_call_id: str | None = None


class InferenceRequest(BaseModel):
    """Either `messages`, to which the model's own chat template is applied, or a raw `prompt`."""

    model_config = ConfigDict(frozen=True)

    messages: tuple[ChatMessage, ...] | None = None
    prompt: str | None = None
    max_tokens: int = Field(default=256, ge=1)
    temperature: float = Field(default=0.0, ge=0, allow_inf_nan=False, description="0 is greedy decoding")
    top_p: float = Field(default=1.0, gt=0, le=1, allow_inf_nan=False)
    seed: int | None = Field(default=None, description="None: a random seed, so answers differ unless temperature is 0")
    stop: tuple[str, ...] = ()
    stream: bool = True


@dataclass(frozen=True, slots=True)
class Token:
    """A piece of the answer that is final. It may hold several tokens, because incomplete characters are held back."""

    text: str


@dataclass(frozen=True, slots=True)
class Done:
    """The end of an answer. `text` is the whole answer. Times and rates include the waits for this request's turns."""

    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    ttft_s: float
    tokens_per_s: float | None
    """Decoding rate after the first token; None if there was only one token."""


@dataclass(frozen=True, slots=True)
class Ready:
    """Sent when a runner has loaded its model."""

    load_s: float
    rss_bytes: int
    model: str
    """The architecture that the runtime names, for example `llama`."""
    context_tokens: int
    """Limit of prompt and answer together: the configured one, or what the model was trained for if that is less."""


@dataclass(frozen=True, slots=True)
class TokenLimits:
    """The limits of one request, in tokens."""

    context: int
    """Prompt and answer together."""
    answer: int
    """At most `context`."""
