"""Requests to a runner and its responses. These types cross the pipe to the runner's process."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from slmops.contracts.descriptor import Digest

FinishReason = Literal["stop", "length", "tool_calls"]


class ToolFormat(StrEnum):
    """How a model writes a call of a tool. The names are those of vLLM's parsers."""

    HERMES = "hermes"
    """`<tool_call>{"name": …, "arguments": {…}}</tool_call>`: Hermes, Qwen."""
    LLAMA = "llama3_json"
    """`{"name": …, "parameters": {…}}` at the beginning of the answer or after `<|python_tag|>`: Llama 3."""
    MISTRAL = "mistral"
    """`[TOOL_CALLS][{"name": …, "arguments": {…}}, …]`."""
    MISTRAL_V11 = "mistral_v11"
    """`[TOOL_CALLS]name[ARGS]{…}` for each call: Mistral since the eleventh version of its tokenizer."""


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


class Tool(BaseModel):
    """A function that the model may ask the client to call. `parameters` is a JSON Schema."""

    model_config = ConfigDict(frozen=True)

    name: str
    description: str | None = None
    parameters: dict[str, Any]


class Tools(BaseModel):
    """The tools of a request. The chat template shows all of them to the model."""

    model_config = ConfigDict(frozen=True)

    offered: tuple[Tool, ...]
    callable: tuple[str, ...] = Field(description="Names of those that the answer may call")
    required: bool = Field(default=False, description="The answer is a call")
    parallel: bool = Field(default=True, description="The answer may have several calls")
    strict: bool = Field(default=False, description="The arguments fit the schemas of their tools")


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
    tools: Tools | None = None
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
class ToolCall:
    """A call that the model asks for."""

    name: str
    arguments: str
    """A JSON object."""


@dataclass(frozen=True, slots=True)
class Token:
    """A piece of the answer that is final. It may hold several tokens, because incomplete characters are held back."""

    text: str
    logprobs: tuple[TokenLogprob, ...] = ()
    """Of the tokens in `text` and in calls, if the request asks for them."""
    calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True, slots=True)
class Done:
    """The end of an answer. `text` is the whole answer without its calls.

    Times and rates include the waits for this request's turns.
    """

    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    ttft_s: float
    tokens_per_s: float | None
    """Decoding rate after the first token; None if there was only one token."""
    calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True, slots=True)
class Ready:
    """Sent when a runner has loaded its model."""

    load_s: float
    rss_bytes: int
    model: str
    """The architecture that the runtime names, for example `llama`."""
    context_tokens: int
    """Limit of prompt and answer together: the configured one, or what the model was trained for if that is less."""
    tool_format: ToolFormat | None = None
    """How the model writes calls of tools; None if its chat template does not know tools."""


@dataclass(frozen=True, slots=True)
class TokenLimits:
    """The limits of one request, in tokens."""

    context: int
    """Prompt and answer together."""
    answer: int
    """At most `context`."""
