"""Runs the golden prompts against a variant before it is packaged."""

from __future__ import annotations

from collections.abc import Sequence

from slmops.contracts.golden import GoldenPrompt
from slmops.optimizer.measure.genai import GenaiModel


def golden_passed(model: GenaiModel, prompts: Sequence[GoldenPrompt]) -> int:
    """Returns how many of `prompts` get the expected answer, with greedy decoding and the chat template, if any."""
    return sum(_passes(model, prompt) for prompt in prompts)


def _passes(model: GenaiModel, prompt: GoldenPrompt) -> bool:
    """Returns whether the answer passes. Stops as soon as it does, because more text cannot make it fail."""
    return any(prompt.passes(so_far) for so_far in model.answer(model.chat(prompt.prompt), prompt.max_tokens))
