"""Runs the golden prompts against a variant before it is packaged."""

from __future__ import annotations

from collections.abc import Sequence

from slmops.contracts.prompts.golden import GoldenPrompt
from slmops.contracts.prompts.prompt_format import PromptFormat
from slmops.optimizer.measure.genai import GenaiModel


def golden_passed(model: GenaiModel, prompts: Sequence[GoldenPrompt], how: PromptFormat = PromptFormat.CHAT) -> int:
    """Returns how many of `prompts` get the expected answer, with greedy decoding, asked as on the gateway."""
    return sum(_passes(model, prompt, how) for prompt in prompts)


def _passes(model: GenaiModel, prompt: GoldenPrompt, how: PromptFormat) -> bool:
    """Returns whether the answer passes. Stops as soon as it does, because more text cannot make it fail."""
    tokens = model.chat(prompt.prompt) if how is PromptFormat.CHAT else model.encode(prompt.prompt)
    return any(prompt.passes(so_far) for so_far in model.answer(tokens, prompt.max_tokens))
