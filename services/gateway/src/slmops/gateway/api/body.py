"""What the request bodies of OpenAI's API have in common."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from slmops.gateway.api.replies import Reply
from slmops.gateway.serving.inference import InferenceRequest, Release, TokenLimits

UNSUPPORTED = "unsupported_parameter"

_WITHOUT_EFFECT = frozenset(
    {
        "metadata",
        "parallel_tool_calls",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "user",
    }
)
"""Hints and bookkeeping: the answer is the right one without them."""

_ONLY: Mapping[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logprobs": (False,),
    "min_p": (0, 0.0),
    "modalities": (["text"],),
    "n": (1,),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "store": (False,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": ("medium",),
    "web_search_options": (),
}
"""Parameters that would change the answer and are not supported, with the values that change nothing."""


_PASSED_ON = (
    "temperature",
    "top_p",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
    "logit_bias",
    "seed",
    "stop",
    "stream",
)
"""Fields that an `InferenceRequest` has under the same name."""


class Body(BaseModel):
    """A JSON object in a request. A field that is `null` counts as absent: clients send every field that they know."""

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, body: Any) -> Any:
        return {name: value for name, value in body.items() if value is not None} if isinstance(body, dict) else body


class StreamOptions(Body):
    include_usage: bool = False


class RequestBody(Body, ABC):
    """The fields of every request. A parameter that would change the answer and is not supported is refused by name.

    An unknown parameter is refused, too, because it may be such a one. OpenAI's API does the same.
    """

    model_config = ConfigDict(extra="forbid")
    operation: ClassVar[str]
    """OpenTelemetry's `gen_ai.operation.name`."""

    model: str | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float = Field(default=1.0, ge=0, le=2, allow_inf_nan=False)
    top_p: float = Field(default=1.0, gt=0, le=1, allow_inf_nan=False)
    top_k: int | None = Field(default=None, ge=-1)
    """Not OpenAI's, but many clients send it; 0 and -1: all tokens."""
    repetition_penalty: float = Field(default=1.0, gt=0, le=2, allow_inf_nan=False)
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2, allow_inf_nan=False)
    presence_penalty: float = Field(default=0.0, ge=-2, le=2, allow_inf_nan=False)
    logit_bias: dict[int, Annotated[float, Field(ge=-100, le=100)]] = Field(default_factory=dict, max_length=1024)
    seed: int | None = None
    stop: list[str] = Field(default_factory=list, max_length=4)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        for name, neutral in _unsupported(cls).items():
            value = body.get(name)
            if value is not None and not any(value == one and type(value) is type(one) for one in neutral):
                raise unsupported(name, _reason(name, neutral))
        left_out = (_WITHOUT_EFFECT - cls.model_fields.keys()) | _unsupported(cls).keys()
        return {name: value for name, value in body.items() if name not in left_out}

    @field_validator("stop", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @property
    def include_usage(self) -> bool:
        return self.stream_options.include_usage

    @property
    def limit(self) -> tuple[str, int] | None:
        """The parameter that limits the answer and its value in tokens; None if the client set no limit."""
        return None if self.max_tokens is None else ("max_tokens", self.max_tokens)

    def beyond(self, limits: TokenLimits) -> tuple[str, int] | None:
        """Returns `limit` if it is larger than the model supports."""
        return self.limit if self.limit and self.limit[1] > limits.answer else None

    def options(self, limits: TokenLimits | None) -> dict[str, Any]:
        """Returns the fields of an `InferenceRequest` other than the prompt. Without a limit of the client, the answer
        may be as long as `limits` allows; without `limits`, no model is served that could answer."""
        wanted = self.limit[1] if self.limit else limits.answer if limits else 1
        return {
            **{name: getattr(self, name) for name in _PASSED_ON},
            "top_k": None if self.top_k is None else max(self.top_k, 0),
            "max_tokens": min(wanted, limits.answer) if limits else wanted,
        }

    @property
    def needs_tools(self) -> bool:
        """Whether only a model whose chat template knows tools can answer."""
        return False

    @abstractmethod
    def inference(self, limits: TokenLimits | None) -> InferenceRequest:
        """Returns the request to the runner. `limits` are None while no model is served."""

    @abstractmethod
    def reply(self, release: Release) -> Reply: ...


def _unsupported(kind: type[RequestBody]) -> dict[str, tuple[Any, ...]]:
    return {name: neutral for name, neutral in _ONLY.items() if name not in kind.model_fields}


def unsupported(name: str, reason: str) -> PydanticCustomError:
    """Returns an error for a validator to raise, which names the parameter."""
    return PydanticCustomError(UNSUPPORTED, "{reason}", {"param": name, "reason": reason})


def _reason(name: str, neutral: tuple[Any, ...]) -> str:
    only = json.dumps(neutral[0]) if neutral and neutral[0] else ""
    return f"this gateway does not support '{name}'" + (f" other than {only}" if only else "")
