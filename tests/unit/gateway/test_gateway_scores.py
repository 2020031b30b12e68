"""Penalties, biases and log-probabilities on the logits of one token after another."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from slmops.contracts.errors import PromptRefused
from slmops.gateway.serving.inference import InferenceRequest, TokenLogprob
from slmops.gateway.serving.scores import Scores, ShownScores


class Row:
    """The logits of one token among four, as the runtime holds them."""

    def __init__(self, *values: float) -> None:
        self.values = np.array([[values]], np.float32)
        self.replaced = False

    def get_logits(self) -> NDArray[np.float32]:
        return self.values.copy()

    def set_logits(self, logits: NDArray[np.float32], /) -> None:
        self.values, self.replaced = logits, True


def scores(**fields: Any) -> Scores:
    return Scores(InferenceRequest(prompt="x", **fields), lambda tokens: "abcd"[tokens[0]])


def after(tokens: list[int], **fields: Any) -> Row:
    """Zero logits as they are changed after these tokens."""
    answer, row = scores(**fields), Row(0, 0, 0, 0)
    for token in tokens:
        answer.record(token)
    answer.prepare(row)
    return row


def test_penalties_are_those_of_openais_documentation() -> None:
    """mu[j] -> mu[j] - c[j] * alpha_frequency - float(c[j] > 0) * alpha_presence"""
    row = after([1, 1, 2], frequency_penalty=0.5, presence_penalty=0.25)
    assert row.values.tolist() == [[[0, -1.25, -0.75, 0]]]
    assert after([1, 1], presence_penalty=-1).values.tolist() == [[[0, 1, 0, 0]]]


def test_a_bias_is_added_to_the_logit_of_its_token() -> None:
    assert after([], logit_bias={3: 100, 0: -1.5}).values.tolist() == [[[-1.5, 0, 0, 100]]]
    for token in (4, -1):
        with pytest.raises(PromptRefused, match="4 tokens"):
            after([], logit_bias={token: 1})


def test_without_any_of_them_the_logits_are_not_touched() -> None:
    assert not after([1]).replaced
    assert not after([1], logprobs=2).replaced


def test_log_probabilities_are_the_models_own_whatever_the_bias() -> None:
    answer, row = scores(logprobs=2, logit_bias={0: 100}), Row(*np.log([0.1, 0.2, 0.3, 0.4]))
    answer.prepare(row)
    score = answer.record(0)
    assert score is not None
    assert (score.text, [text for text, _ in score.top]) == ("a", ["d", "c"])
    assert np.exp([score.logprob, *(logprob for _, logprob in score.top)]) == pytest.approx([0.1, 0.4, 0.3])


def test_an_impossible_token_has_a_finite_log_probability() -> None:
    answer = scores(logprobs=0)
    answer.prepare(Row(0, -np.inf, 0, 0))
    assert answer.record(1) == TokenLogprob("b", -9999.0, ())


def test_a_score_is_shown_with_the_text_of_its_token_and_dropped_with_it() -> None:
    shown, one, two, three = ShownScores(), *(TokenLogprob(text, 0.0, ()) for text in "abc")
    shown.add(one, "ab")
    assert shown.take("a", everything=False) == (one,), "its text has begun"
    shown.add(two, "")  # the first byte of a character
    assert shown.take("b", everything=False) == ()
    shown.add(three, "é")
    assert shown.take("é", everything=False) == (two, three)
    shown.add(one, "STOP")
    assert shown.take("", everything=False) == (), "a stop string is not shown"
    assert shown.take("", everything=True) == (one,)
