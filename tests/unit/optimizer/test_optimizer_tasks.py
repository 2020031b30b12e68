"""Questions are read from JSON lines and answered by a real, untrained model in onnxruntime-genai."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
from tiny_model import make_tiny

from slmops.contracts.errors import InvalidMessage, NotFound
from slmops.optimizer.intake.export import export
from slmops.optimizer.measure.genai import GenaiModel
from slmops.optimizer.measure.tasks import MultipleChoice, accuracy, bundled_tasks, parse_task, read_tasks

CONTEXT = "Question: What is the capital of France, and of Germany, and of Italy?\nAnswer:"
CHOICES = [" Paris", " Berlin and Rome", " the fox"]
CHOICE = {"question": "q", "choices": ["a", "b"], "answer": 1}
EXACT = {"prompt": "p", "answer": "a"}


@pytest.fixture(scope="module", params=["llama", "gemma3_text"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, GenaiModel]:
    """The second model has a sliding window of 16 positions, so its cache cannot be rewound."""
    folder = tmp_path_factory.mktemp(request.param)
    full = make_tiny(folder / "hf", request.param)
    return full, GenaiModel(export(full, folder / "fp32"))


def test_the_likelihood_of_a_continuation_equals_that_of_transformers(model: tuple[Path, GenaiModel]) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(model[0])
    expected = []
    start = len(model[1].encode(CONTEXT))
    for choice in CHOICES:
        tokens = torch.tensor(model[1].encode(CONTEXT + choice))
        log_probs = reference(tokens[None]).logits[0].log_softmax(-1)
        expected.append(sum(log_probs[i - 1, tokens[i]].item() for i in range(start, len(tokens))))
    assert model[1].log_likelihoods(CONTEXT, CHOICES) == pytest.approx(expected, abs=1e-3)


def task(*questions: object):  # type: ignore[no-untyped-def]
    return parse_task("t", "\n".join(map(json.dumps, questions)))


def test_the_choice_with_the_highest_likelihood_per_byte_is_the_answer(model: tuple[Path, GenaiModel]) -> None:
    question = "What is the capital of France, and of Germany, and of Italy?"
    choices = [*CHOICES, " x"]
    scores = model[1].log_likelihoods(CONTEXT, choices)
    per_byte = [score / len(choice) for score, choice in zip(scores, choices, strict=True)]
    best = per_byte.index(max(per_byte))
    assert best != scores.index(max(scores)), "a short choice has the advantage only if its length is not counted"
    asked = [{"question": question, "choices": [c.strip() for c in choices], "answer": n} for n in range(4)]
    assert [accuracy(model[1], task(each)) for each in asked] == [float(n == best) for n in range(4)]
    assert accuracy(model[1], task(*asked)) == 1 / 4


def ending(folder: Path, copy: Path) -> tuple[GenaiModel, str]:
    """Changes the model to end its greedy answer instead of continuing with letters; returns it and the prompt."""
    model = GenaiModel(folder)
    for prompt in ("Hello", "lazy dog", "fox"):
        tokens, texts = list(model.tokens(model.encode(prompt), 16)), list(model.answer(model.encode(prompt), 16))
        for place in range(2, 12):
            goes_on = texts[place + 3][len(texts[place - 1]) :]
            if tokens[place] not in tokens[:place] and any(map(str.isalnum, goes_on)):
                shutil.copytree(folder, copy)
                configuration = json.loads((folder / "genai_config.json").read_text())
                configuration["model"]["eos_token_id"] = [2, tokens[place]]
                (copy / "genai_config.json").write_text(json.dumps(configuration))
                return GenaiModel(copy), prompt
    pytest.fail("it says the same to everything")


def test_an_exact_match_ignores_case_spacing_and_outer_punctuation(
    model: tuple[Path, GenaiModel], tmp_path: Path
) -> None:
    short, prompt = ending(model[0].parent / "fp32", tmp_path / "short")
    *_, answer = short.answer(short.encode(prompt), 16)
    assert answer.strip() == answer.strip().partition("\n")[0]
    right = {"prompt": prompt, "answer": f"  {answer.strip().upper()}."}
    assert accuracy(short, task(right)) == 1
    assert accuracy(short, task({"prompt": prompt, "answer": answer + "fox"})) == 0
    assert accuracy(model[1], task(right)) == 0, "the answer continues after the expected text"


def test_a_question_longer_than_the_context_gives_nan(model: tuple[Path, GenaiModel]) -> None:
    assert math.isnan(accuracy(model[1], task({**CHOICE, "question": "fox " * 2000})))
    assert list(model[1].answer(model[1].encode("fox " * 2000), 4)) == []


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        "7",
        "{}",
        '{"question": "q", "choices": ["a"], "answer": 0}',
        '{"question": "q", "choices": ["a", "b"], "answer": 2}',
        '{"question": "q", "choices": ["a", "b"], "answer": -1}',
        '{"question": "q", "choices": ["a", "b"], "answer": true}',
        '{"question": "q", "choices": ["a", " "], "answer": 0}',
        '{"question": "", "choices": ["a", "b"], "answer": 0}',
        '{"prompt": "p"}',
        '{"prompt": "p", "answer": ""}',
        '{"prompt": "p", "answer": "a", "answer": "b"}',
        "[" * 100_000,
    ],
)
def test_a_bad_line_is_named(line: str) -> None:
    with pytest.raises(InvalidMessage) as caught:
        parse_task("mine", f"{json.dumps(CHOICE)}\n\n{line}\n{json.dumps(EXACT)}")
    assert caught.value.where == "mine line 3"


def test_only_a_line_feed_ends_a_line() -> None:
    """`str.splitlines` also splits at these characters, which a JSON string may contain."""
    text = "one\u2028two\u2029three\x85four"
    found = parse_task("mine", json.dumps({"prompt": text, "answer": "a"}, ensure_ascii=False) + "\r\n")
    assert [question.prompt for question in found.questions] == [text]  # type: ignore[union-attr]


def test_a_task_is_named_after_its_file(tmp_path: Path) -> None:
    path = tmp_path / "weather.jsonl"
    path.write_text(f"{json.dumps({**CHOICE, 'category': 'ignored'})}\n\n{json.dumps(EXACT)}\n")
    (found,) = read_tasks([path])
    assert (found.name, len(found.questions)) == ("weather", 2)
    assert isinstance(found.questions[0], MultipleChoice)
    with pytest.raises(InvalidMessage, match="several task files have the name 'weather'"):
        read_tasks([path, path])
    with pytest.raises(NotFound):
        read_tasks([tmp_path / "absent.jsonl"])
    path.write_text("\n")
    with pytest.raises(InvalidMessage, match="has no questions"):
        read_tasks([path])


def test_the_right_choices_of_the_bundled_questions_are_evenly_spread() -> None:
    (found,) = bundled_tasks()
    answers = [question.answer for question in found.questions]
    assert len(answers) == 20
    assert {answers.count(place) for place in range(3)} <= {6, 7}
