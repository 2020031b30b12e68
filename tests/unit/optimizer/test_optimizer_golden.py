"""Golden prompts are run on a real, untrained model in onnxruntime-genai."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tiny_model import make_tiny_llama

from slmops.contracts.golden import GoldenPrompt
from slmops.optimizer.intake.export import export
from slmops.optimizer.measure.genai import GenaiModel
from slmops.optimizer.measure.golden import golden_passed

QUESTION = "What is the capital of France?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    return export(make_tiny_llama(folder / "hf"), folder / "fp32")


def answered(model: GenaiModel, prompt: str, tokens: int = 12) -> str:
    return list(model.answer(prompt, tokens))[-1]


def expecting(text: str, max_tokens: int = 12) -> GoldenPrompt:
    return GoldenPrompt(prompt=QUESTION, expect=("never said", text), max_tokens=max_tokens)


def test_a_prompt_passes_if_the_answer_contains_the_expected_text_within_max_tokens(folder: Path) -> None:
    model = GenaiModel(folder)
    answer = answered(model, model.chat(QUESTION))
    assert golden_passed(model, [expecting(answer.swapcase()), expecting(answer[:2]), expecting("never heard")]) == 2
    assert golden_passed(model, [expecting(answer, max_tokens=3)]) == 0
    assert golden_passed(model, []) == 0


def test_the_chat_template_is_used_if_there_is_one(folder: Path, tmp_path: Path) -> None:
    model = GenaiModel(folder)
    assert model.chat(QUESTION) == f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    plain = Path(shutil.copytree(folder, tmp_path / "plain"))
    (plain / "chat_template.jinja").unlink()
    settings = json.loads((plain / "tokenizer_config.json").read_text())
    (plain / "tokenizer_config.json").write_text(
        json.dumps({k: v for k, v in settings.items() if k != "chat_template"})
    )
    without = GenaiModel(plain)
    assert without.chat(QUESTION) == QUESTION
    assert answered(model, model.chat(QUESTION)) != answered(model, QUESTION)
    assert golden_passed(without, [expecting(answered(model, QUESTION))]) == 1
