"""The request and response bodies of OpenAI's older completions, which continue a text without a chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from slmops.gateway.api.body import RequestBody
from slmops.gateway.api.replies import Reply
from slmops.gateway.serving.inference import Done, InferenceRequest, Release, Token, TokenLimits, TokenLogprob

_DEFAULT_TOKENS = 16  # OpenAI's


def _one(prompt: Any) -> Any:
    return prompt[0] if isinstance(prompt, list) and len(prompt) == 1 else prompt


class CompletionRequest(RequestBody):
    """A completion request for one text. Token ids are refused, because they could be control tokens."""

    operation: ClassVar[str] = "text_completion"

    prompt: Annotated[str, BeforeValidator(_one), Field(min_length=1)]
    echo: Literal[False] = False
    suffix: Literal[""] = ""

    @property
    def limit(self) -> tuple[str, int] | None:
        return super().limit or ("max_tokens", _DEFAULT_TOKENS)

    def beyond(self, limits: TokenLimits) -> tuple[str, int] | None:
        return super().beyond(limits) if self.max_tokens is not None else None

    def inference(self, limits: TokenLimits | None) -> InferenceRequest:
        return InferenceRequest(prompt=self.prompt, **self.options(limits))

    def reply(self, release: Release) -> Reply:
        return CompletionReply(release)


class CompletionReply(Reply):
    prefix, chunk_object = "cmpl", "text_completion"

    def whole(self, done: Done, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
        return self._whole(self.chunk_object, {"text": done.text, "logprobs": None}, done)

    def token(self, token: Token) -> dict[str, Any]:
        return self._chunk({"text": token.text})

    def end(self, done: Done) -> dict[str, Any]:
        return self._chunk({"text": ""}, done.finish_reason)
