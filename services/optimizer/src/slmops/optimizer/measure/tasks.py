"""Measures task accuracy: questions with one right answer, from JSON lines.

Multiple choice, `{"question", "choices", "answer": index}`: the model's answer is the choice with the highest
log-likelihood per byte, as in `acc_norm` of EleutherAI's lm-evaluation-harness; chance level is 1 / choices. Exact
match, `{"prompt", "answer"}`: the model's answer is the first line of the greedy continuation. As in SQuAD, case and
spacing are ignored, and also punctuation, but only around the answer.
"""

from __future__ import annotations

import math
import string
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from slmops.contracts.descriptor import Digest, digest_of
from slmops.contracts.errors import InvalidMessage, NotFound
from slmops.contracts.json_lines import loads, numbered_lines
from slmops.optimizer.measure.genai import GenaiModel

_BUNDLED = files("slmops.optimizer") / "data" / "everyday.jsonl"
_SPARE_TOKENS = 4  # an answer that is longer than the expected one by more than this is wrong
_EXAMPLE = 'Write {"question": "…", "choices": ["…", "…"], "answer": 0} or {"prompt": "…", "answer": "…"}.'

Shown = Annotated[str, StringConstraints(min_length=1, pattern=r"\S")]


class MultipleChoice(BaseModel):
    model_config = ConfigDict(frozen=True)

    question: Shown
    choices: tuple[Shown, ...] = Field(min_length=2)
    answer: int = Field(ge=0, strict=True, description="Index of the right choice, from 0")

    @model_validator(mode="after")
    def _answer_is_a_choice(self) -> Self:
        if self.answer >= len(self.choices):
            raise ValueError(f"answer {self.answer} is not the index of one of {len(self.choices)} choices")
        return self


class ExactMatch(BaseModel):
    model_config = ConfigDict(frozen=True)

    prompt: Shown
    answer: Shown


class Task(BaseModel):
    """A file of questions; `digest` is of its bytes."""

    model_config = ConfigDict(frozen=True)

    name: str
    digest: Digest
    questions: tuple[MultipleChoice | ExactMatch, ...] = Field(min_length=1)


def bundled_tasks() -> tuple[Task, ...]:
    """Returns the task `everyday`: multiple choice questions that a child can answer.

    It shows that a model is broken, not how good it is.
    """
    return (parse_task("everyday", _BUNDLED.read_text(encoding="utf-8")),)


def read_tasks(paths: Sequence[Path]) -> tuple[Task, ...]:
    """Reads one task per file, named after it. Raises `NotFound`, and `InvalidMessage` with the bad line's number."""
    names = [path.stem for path in paths]
    if doubled := sorted({name for name in names if names.count(name) > 1}):
        raise InvalidMessage(f"several task files have the name {doubled[0]!r}", fix="Rename one of them.")
    try:
        return tuple(parse_task(path.stem, path.read_text(encoding="utf-8")) for path in paths)
    except UnicodeDecodeError as error:
        raise InvalidMessage(f"a task file is not UTF-8: {error}", fix=_EXAMPLE) from error
    except OSError as error:
        raise NotFound(f"a task file cannot be read: {error.strerror}", where=str(error.filename)) from error


def parse_task(name: str, text: str) -> Task:
    """Parses a task; skips blank lines. Raises `InvalidMessage` with the number of a bad line."""
    questions = [_question(name, number, line) for number, line in numbered_lines(text)]
    if not questions:
        raise InvalidMessage("the task has no questions", where=name, fix=_EXAMPLE)
    return Task(name=name, digest=digest_of(text.encode()), questions=tuple(questions))


def _question(name: str, number: int, line: str) -> MultipleChoice | ExactMatch:
    try:
        data = loads(line)
        kind = MultipleChoice if isinstance(data, dict) and "choices" in data else ExactMatch
        return kind.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        what = f"{'.'.join(map(str, first['loc'])) or 'question'}: {first['msg']}"
    except ValueError as error:
        what = str(error)
    raise InvalidMessage(f"a question is not valid: {what}", where=f"{name} line {number}", fix=_EXAMPLE) from None


def accuracy(model: GenaiModel, task: Task) -> float:
    """Returns the share of questions that `model` answers correctly, 0 to 1; NaN if a choice has no likelihood."""
    return sum(_right(model, question) for question in task.questions) / len(task.questions)


def _right(model: GenaiModel, question: MultipleChoice | ExactMatch) -> float:
    if isinstance(question, ExactMatch):
        return float(_plain(_first_line(model, question)) == _plain(question.answer))
    choices = [f" {choice.strip()}" for choice in question.choices]
    scores = model.log_likelihoods(f"Question: {question.question.strip()}\nAnswer:", choices)
    per_byte = [score / len(choice.encode()) for score, choice in zip(scores, choices, strict=True)]
    if any(map(math.isnan, per_byte)):
        return math.nan
    return float(per_byte.index(max(per_byte)) == question.answer)


def _first_line(model: GenaiModel, question: ExactMatch) -> str:
    text = ""
    for text in model.answer(model.encode(question.prompt), len(model.encode(question.answer)) + _SPARE_TOKENS):
        if "\n" in text.strip():
            break
    return text.strip().partition("\n")[0]


def _plain(text: str) -> str:
    words = " ".join(text.casefold().split())
    return words.strip(string.punctuation + " ") or words  # an answer may consist of punctuation only
