"""Runs the golden prompts against a variant before it is offered to gateways."""

from __future__ import annotations

from collections.abc import Sequence

from slmops.contracts.golden import GoldenPrompt
from slmops.optimizer.measure.genai import GenaiModel


def golden_passed(model: GenaiModel, prompts: Sequence[GoldenPrompt]) -> int:
    """How many of `prompts` get the answer that is expected: greedily, in the chat template if there is one."""
    return sum(_passes(model, prompt) for prompt in prompts)


def _passes(model: GenaiModel, prompt: GoldenPrompt) -> bool:
    """An answer that contains what is expected still does so when it is finished, so it is heard no further."""
    return any(prompt.passes(so_far) for so_far in model.answer(model.chat(prompt.prompt), prompt.max_tokens))
