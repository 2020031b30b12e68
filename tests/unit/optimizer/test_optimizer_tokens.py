"""The packaged tokenizer returns the tokens of transformers, in the optimizer and in the gateway; a chat template that
cannot work is refused when the model is read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_model import make_tiny
from tiny_tokenizers import BOS, EOS, FAMILIES, PAD, llama2, llama3, qwen, save_tokenizer
from tokenizers import normalizers

from slmops.contracts.errors import InvalidModel, OptimizationFailed
from slmops.contracts.prompts.prompt_format import PromptFormat
from slmops.gateway.serving.generation import LoadedModel
from slmops.gateway.serving.inference import ChatMessage, InferenceRequest
from slmops.optimizer.intake.export import build, export
from slmops.optimizer.intake.tokens import adapt_tokenizer
from slmops.optimizer.measure.genai import GenaiModel
from slmops.optimizer.recipes.library import recipe_named
from slmops.optimizer.recipes.pipeline import Pipeline
from slmops.optimizer.recipes.spec import JobSpec

TEXTS = (
    "What is the capital of France?",
    "a",
    " the fox",
    "the  fox,   the dog\n\n  end ",
    "Größe 42 – 日本 😀",
    "\tx\r\n",
)
CONVERSATIONS = (
    [{"role": "user", "content": "What is the capital of France?"}],
    [
        {"role": "user", "content": "  hm\n"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "and?"},
    ],
)


def make_family(folder: Path, family: str) -> Path:
    architecture, tokenizer, kind = FAMILIES[family]
    make_tiny(folder, architecture, bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD)
    save_tokenizer(folder, tokenizer(), kind)
    return folder


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("family")
    model = make_family(folder / "hf", request.param)
    return model, export(model, folder / "exported")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("llama")
    model = make_family(folder / "hf", "llama 3")
    return model, export(model, folder / "exported")


def test_optimizer_and_gateway_make_the_tokens_of_transformers(family: tuple[Path, Path]) -> None:
    from transformers import AutoTokenizer

    expected = AutoTokenizer.from_pretrained(family[0])
    optimizer, gateway = GenaiModel(family[1]), LoadedModel(family[1], context_tokens=512)
    for text in TEXTS:
        tokens = list(expected(text)["input_ids"])
        assert optimizer.encode(text) == tokens, text
        assert gateway.encode(InferenceRequest(prompt=text)) == tokens, text
    for messages in CONVERSATIONS:
        tokens = list(expected.apply_chat_template(messages, add_generation_prompt=True)["input_ids"])
        request = InferenceRequest(messages=tuple(ChatMessage(**message) for message in messages))
        assert gateway.encode(request) == tokens, messages
    [question] = CONVERSATIONS[0]
    tokens = list(expected.apply_chat_template([question], add_generation_prompt=True)["input_ids"])
    assert optimizer.chat(question["content"]) == tokens


def test_a_template_writes_its_own_bos_and_gets_no_second(llama: tuple[Path, Path]) -> None:
    model = GenaiModel(llama[1])
    assert model.encode("the fox").count(BOS) == 1
    assert model.chat("the fox").count(BOS) == 1


def test_a_build_by_the_runtimes_builder_is_adapted_too(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    model = make_family(tmp_path / "hf", "llama 2")
    found = GenaiModel(build(model, tmp_path / "int8", "int8", {"block_size": "32"}))
    assert found.encode(TEXTS[0]) == list(AutoTokenizer.from_pretrained(model)(TEXTS[0])["input_ids"])


def test_a_tokenizer_that_the_runtime_cannot_run_is_refused_with_the_text(
    llama: tuple[Path, Path], tmp_path: Path
) -> None:
    model, exported = (Path(shutil.copytree(folder, tmp_path / folder.name)) for folder in llama)
    tokenizer = llama2()
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Prepend("▁")])
    for folder in (model, exported):
        save_tokenizer(folder, tokenizer)
    with pytest.raises(OptimizationFailed, match="other tokens of the text 'The capital of France"):
        adapt_tokenizer(model, exported)


@pytest.mark.parametrize(
    ("template", "match"),
    [
        ("{{ raise_exception('no user role') }}", "rejects a question: TemplateError: no user role"),
        ("{% for m in messages %}{{ m['content'] }}", "rejects a question: TemplateSyntaxError"),
        ("{{ messages[7]['content'] }}", "rejects a question: UndefinedError"),
    ],
)
def test_a_chat_template_that_fails_is_refused(
    llama: tuple[Path, Path], tmp_path: Path, template: str, match: str
) -> None:
    model, exported = (Path(shutil.copytree(folder, tmp_path / folder.name)) for folder in llama)
    for folder in (model, exported):
        save_tokenizer(folder, llama3(), template=template)
    with pytest.raises(InvalidModel, match=match) as caught:
        adapt_tokenizer(model, exported)
    assert "remove it" in (caught.value.fix or "")


def _with_template(folder: Path) -> None:
    save_tokenizer(folder, qwen())


def _without_template(folder: Path) -> None:
    save_tokenizer(folder, qwen(), template=None)


def _with_an_empty_list(folder: Path) -> None:
    _without_template(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": None}))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (_with_template, PromptFormat.CHAT),
        (_without_template, PromptFormat.TEXT),
        (_with_an_empty_list, PromptFormat.TEXT),
    ],
)
def test_the_format_of_prompts_is_chosen_when_the_version_is_read(
    tmp_path: Path, change: Callable[[Path], None], expected: PromptFormat
) -> None:
    change(make_tiny(tmp_path / "hf", "qwen2"))
    spec = JobSpec(recipes=(recipe_named("int8"),))
    assert Pipeline(tmp_path / "hf", tmp_path / "work", spec, lambda what, share: None).prompt_format is expected
