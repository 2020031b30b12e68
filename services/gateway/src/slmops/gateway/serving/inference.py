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
    top_k: int | None = Field(
        default=None, ge=0, description="Sample from this many best tokens; 0: all; None: what the model prescribes"
    )
    repetition_penalty: float = Field(default=1.0, gt=0, allow_inf_nan=False, description="1: none")
    frequency_penalty: float = Field(default=0.0, allow_inf_nan=False)
    presence_penalty: float = Field(default=0.0, allow_inf_nan=False)
    logit_bias: dict[int, float] = Field(default_factory=dict, description="Added to the logits, by token id")
    logprobs: int | None = Field(
        default=None,
        ge=0,
        description="Log-probabilities of each token and of this many others; None: none",
    )
    json_schema: str | None = Field(default=None, description="JSON Schema that the answer fits; None: any text")
    stop: tuple[str, ...] = ()
    stream: bool = True


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """The natural logarithm of the probability that the model gave a token, and of the best tokens in its place."""

    text: str
    logprob: float
    top: tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True)
class Token:
    """A piece of the answer that is final. It may hold several tokens, because incomplete characters are held back."""

    text: str
    logprobs: tuple[TokenLogprob, ...] = ()
    """Of the tokens in `text`, if the request asks for them."""


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
