"""What the runtime has no option for: OpenAI's penalties and biases, applied to the logits, and log-probabilities."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from slmops.contracts.errors import PromptRefused
from slmops.gateway.serving.inference import InferenceRequest, TokenLogprob

_LEAST = -9999.0
"""What OpenAI writes for a probability of zero: JSON has no infinity."""


class Logits(Protocol):
    """The part of the runtime's generator that reads and replaces the logits of the next token."""

    def get_logits(self) -> NDArray[np.float32]: ...

    def set_logits(self, logits: NDArray[np.float32], /) -> None: ...


class Scores:
    """The logits of one answer's tokens. Call `prepare` before each token and `record` after it.

    Costs nothing for a request without penalties, biases and log-probabilities.
    """

    def __init__(self, request: InferenceRequest, decode: Callable[[list[int]], str]) -> None:
        self._decode, self._top = decode, request.logprobs
        self._bias = request.logit_bias
        self._frequency, self._presence = request.frequency_penalty, request.presence_penalty
        self._counts: Counter[int] = Counter()
        self._log_probabilities: NDArray[np.float32] | None = None

    def prepare(self, generator: Logits) -> None:
        """Penalizes and biases the logits of the next token. Raises `PromptRefused` if a bias names no token."""
        penalized = bool(self._frequency or self._presence)
        if not penalized and not self._bias and self._top is None:
            return
        logits = generator.get_logits()
        row = logits[0, -1]
        if self._top is not None:  # the model's own: before penalties and biases
            self._log_probabilities = _log_softmax(row)
        if penalized:
            self._penalize(row)
        if self._bias:
            self._add_bias(row)
        if penalized or self._bias:
            generator.set_logits(logits)

    def record(self, token: int) -> TokenLogprob | None:
        """Counts the token. Returns its log-probability, if the request asks for it."""
        self._counts[token] += 1
        if self._log_probabilities is None:
            return None
        best = np.argsort(self._log_probabilities)[::-1][: self._top or 0]
        top = tuple(self._scored(int(other)) for other in best)
        text, logprob = self._scored(token)
        return TokenLogprob(text, logprob, top)

    def _scored(self, token: int) -> tuple[str, float]:
        assert self._log_probabilities is not None
        return self._decode([token]), max(float(self._log_probabilities[token]), _LEAST)

    def _penalize(self, row: NDArray[np.float32]) -> None:
        """As OpenAI defines it: tokens of the answer so far, once for their presence and by their frequency."""
        for token, count in self._counts.items():
            row[token] -= self._presence + count * self._frequency

    def _add_bias(self, row: NDArray[np.float32]) -> None:
        for token, bias in self._bias.items():
            if not 0 <= token < len(row):
                raise PromptRefused(f"logit_bias names the token {token}, but the model has {len(row)} tokens")
            row[token] += bias


class ShownScores:
    """Holds back the log-probabilities of tokens whose text is held back, and drops those of a stop string."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[int, TokenLogprob]] = deque()
        self._decoded = self._shown = 0  # characters

    def add(self, score: TokenLogprob | None, text: str) -> None:
        """`text`: what the token adds to the answer, before stop strings are looked for."""
        if score:
            self._waiting.append((self._decoded, score))
        self._decoded += len(text)

    def take(self, shown: str, *, everything: bool) -> tuple[TokenLogprob, ...]:
        """Returns the scores of the tokens whose text begins within what has been shown."""
        self._shown += len(shown)
        taken = []
        while self._waiting and (everything or self._waiting[0][0] < self._shown):
            taken.append(self._waiting.popleft()[1])
        return tuple(taken)


def _log_softmax(row: NDArray[np.float32]) -> NDArray[Any]:
    shifted = row - row.max()
    return np.asarray(shifted - np.log(np.exp(shifted).sum()))
