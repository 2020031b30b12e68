"""Task accuracy: questions with one right answer, from JSON lines.

Multiple choice, `{"question", "choices", "answer": index}`: the choice whose log-likelihood per byte is highest, as
`acc_norm` of EleutherAI's lm-evaluation-harness; chance is 1 / choices. Exact match, `{"prompt", "answer"}`: the first
line of the greedy continuation, as SQuAD's without regard to case, spacing and (only around it) punctuation.
"""

from __future__ import annotations

import json
import math
import string
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from slmops.contracts.descriptor import Digest, digest_of
from slmops.contracts.errors import InvalidMessage, NotFound
from slmops.optimizer.measure.genai import GenaiModel

_BUNDLED = files("slmops.optimizer") / "data" / "everyday.jsonl"
_SPARE_TOKENS = 4  # an answer that goes on this long after the expected one's length is another answer
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
            raise ValueError(f"answer {self.answer} of {len(self.choices)} choices, counted from 0")
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
    """`everyday`: what a child knows, in multiple choice. Enough to see that a model is broken, not how good it is."""
    return (parse_task("everyday", _BUNDLED.read_text(encoding="utf-8")),)


def read_tasks(paths: Sequence[Path]) -> tuple[Task, ...]:
    """One task per file, named after it. Raises `NotFound`, and `InvalidMessage` with the number of the bad line."""
    names = [path.stem for path in paths]
    if doubled := sorted({name for name in names if names.count(name) > 1}):
        raise InvalidMessage(f"there are several tasks {doubled[0]!r}", fix="Give each file another name.")
    try:
        return tuple(parse_task(path.stem, path.read_text(encoding="utf-8")) for path in paths)
    except UnicodeDecodeError as error:
        raise InvalidMessage(f"a task file is not UTF-8: {error}", fix=_EXAMPLE) from error
    except OSError as error:
        raise NotFound(f"a task file cannot be read: {error.strerror}", where=str(error.filename)) from error


def parse_task(name: str, text: str) -> Task:
    """Blank lines are skipped. Raises `InvalidMessage` with the number of the bad line."""
    questions = [_question(name, number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not questions:
        raise InvalidMessage("a task without questions", where=name, fix=_EXAMPLE)
    return Task(name=name, digest=digest_of(text.encode()), questions=tuple(questions))


def _question(name: str, number: int, line: str) -> MultipleChoice | ExactMatch:
    try:
        data = json.loads(line)
        kind = MultipleChoice if isinstance(data, dict) and "choices" in data else ExactMatch
        return kind.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        what = f"{'.'.join(map(str, first['loc'])) or 'it'}: {first['msg']}"
    except json.JSONDecodeError as error:
        what = str(error)
    raise InvalidMessage(f"a question is not valid: {what}", where=f"{name} line {number}", fix=_EXAMPLE) from None


def accuracy(model: GenaiModel, task: Task) -> float:
    """Share of the questions that `model` answers right, 0 to 1; NaN if it has no likelihood for a choice."""
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
    for text in model.answer(question.prompt, len(model.encode(question.answer)) + _SPARE_TOKENS):
        if "\n" in text.strip():
            break
    return text.strip().partition("\n")[0]


def _plain(text: str) -> str:
    words = " ".join(text.casefold().split())
    return words.strip(string.punctuation + " ") or words  # an answer may be nothing but punctuation
