"""The response bodies of one answer, whole or as a stream."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from slmops.gateway.serving.inference import Done, Release, Token, TokenLogprob


class Reply(ABC):
    """Makes the bodies of one answer, which share an id, a time and a model."""

    prefix: str
    """Of the answer's id."""
    chunk_object: str
    """The type of a stream's bodies."""

    def __init__(self, release: Release) -> None:
        # The fingerprint lets a client see which release answered.
        self._head = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": release.model,
            "system_fingerprint": release.digest,
        }

    @abstractmethod
    def whole(self, done: Done, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]: ...

    def opening(self) -> list[dict[str, Any]]:
        """Returns the bodies with which a stream begins."""
        return []

    @abstractmethod
    def token(self, token: Token) -> dict[str, Any]: ...

    @abstractmethod
    def end(self, done: Done) -> dict[str, Any]: ...

    def usage(self, done: Done) -> dict[str, Any]:
        return self._body(self.chunk_object, [], usage=_usage(done))

    def _body(self, kind: str, choices: list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
        return {**self._head, "object": kind, "choices": choices, **fields}

    def _whole(self, kind: str, choice: dict[str, Any], done: Done) -> dict[str, Any]:
        return self._body(kind, [{"index": 0, **choice, "finish_reason": done.finish_reason}], usage=_usage(done))

    def _chunk(self, choice: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "logprobs": None, **choice, "finish_reason": finish_reason}
        return self._body(self.chunk_object, [choice])


def _usage(done: Done) -> dict[str, int]:
    return {
        "prompt_tokens": done.prompt_tokens,
        "completion_tokens": done.completion_tokens,
        "total_tokens": done.prompt_tokens + done.completion_tokens,
    }
