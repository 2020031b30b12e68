"""Golden prompts are run on a real, untrained model in onnxruntime-genai."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_model import make_tiny_llama

from slmops.contracts.prompts.golden import GoldenPrompt
from slmops.contracts.prompts.prompt_format import PromptFormat
from slmops.optimizer.intake.export import export
from slmops.optimizer.measure.genai import GenaiModel
from slmops.optimizer.measure.golden import golden_passed

QUESTION = "What is the capital of France?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    return export(make_tiny_llama(folder / "hf"), folder / "fp32")


def answered(model: GenaiModel, prompt: list[int], tokens: int = 12) -> str:
    return list(model.answer(prompt, tokens))[-1]


def expecting(text: str, max_tokens: int = 12) -> GoldenPrompt:
    return GoldenPrompt(prompt=QUESTION, expect=("never said", text), max_tokens=max_tokens)


def test_a_prompt_passes_if_the_answer_contains_the_expected_text_within_max_tokens(folder: Path) -> None:
    model = GenaiModel(folder)
    answer = answered(model, model.chat(QUESTION))
    assert golden_passed(model, [expecting(answer.swapcase()), expecting(answer[:2]), expecting("never heard")]) == 2
    assert golden_passed(model, [expecting(answer, max_tokens=3)]) == 0
    assert golden_passed(model, []) == 0


def test_prompts_are_asked_in_the_format_of_the_version(folder: Path) -> None:
    model = GenaiModel(folder)
    template = f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    assert model.chat(QUESTION) == model.encode(template)
    in_chat, as_text = answered(model, model.chat(QUESTION)), answered(model, model.encode(QUESTION))
    assert in_chat != as_text
    assert golden_passed(model, [expecting(in_chat)], PromptFormat.CHAT) == 1
    assert golden_passed(model, [expecting(as_text)], PromptFormat.CHAT) == 0
    assert golden_passed(model, [expecting(as_text)], PromptFormat.TEXT) == 1
