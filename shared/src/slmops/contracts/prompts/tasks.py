"""Tasks: questions with one right answer, from JSON lines. Pure.

Multiple choice: `{"question": "…", "choices": ["…", "…"], "answer": 0}`. Exact match: `{"prompt": "…", "answer": "…"}`.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from slmops.contracts.descriptor import Digest, digest_of
from slmops.contracts.errors import InvalidMessage
from slmops.contracts.json_lines import loads, numbered_lines

EXAMPLE = 'Write {"question": "…", "choices": ["…", "…"], "answer": 0} or {"prompt": "…", "answer": "…"}.'

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

    @property
    def asked(self) -> str:
        return self.question


class ExactMatch(BaseModel):
    model_config = ConfigDict(frozen=True)

    prompt: Shown
    answer: Shown

    @property
    def asked(self) -> str:
        return self.prompt


class Task(BaseModel):
    """A file of questions; `digest` is of its bytes."""

    model_config = ConfigDict(frozen=True)

    name: str
    digest: Digest
    questions: tuple[MultipleChoice | ExactMatch, ...] = Field(min_length=1)


def parse_task(name: str, text: str, where: str | None = None) -> Task:
    """Parses a task; skips blank lines and ignores unknown fields. Raises `InvalidMessage` with the bad line's number.

    `where` names the file in errors; by default it is `name`.
    """
    return _task(name, text, where or name, "ignore")


def check_task(name: str, text: str, where: str) -> Task:
    """Parses a task as its author wrote it.

    Raises `InvalidMessage` also for an unknown field, which is usually a misspelt one, and for a question that is asked
    twice.
    """
    task = _task(name, text, where, "forbid")
    first: dict[str, int] = {}
    for (number, _), question in zip(numbered_lines(text), task.questions, strict=True):
        earlier = first.setdefault(question.asked, number)
        if earlier != number:
            raise InvalidMessage(
                f"the question of line {earlier} is asked again", where=f"{where} line {number}", fix="Ask it once."
            )
    return task


def _task(name: str, text: str, where: str, unknown: Literal["ignore", "forbid"]) -> Task:
    questions = [_question(where, number, line, unknown) for number, line in numbered_lines(text)]
    if not questions:
        raise InvalidMessage("the task has no questions", where=where, fix=EXAMPLE)
    return Task(name=name, digest=digest_of(text.encode()), questions=tuple(questions))


def _question(where: str, number: int, line: str, unknown: Literal["ignore", "forbid"]) -> MultipleChoice | ExactMatch:
    try:
        data = loads(line)
        kind = MultipleChoice if isinstance(data, dict) and "choices" in data else ExactMatch
        return kind.model_validate(data, extra=unknown)
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        what = f"{'.'.join(map(str, first['loc'])) or 'question'}: {first['msg']}"
    except ValueError as error:
        what = str(error)
    raise InvalidMessage(f"a question is not valid: {what}", where=f"{where} line {number}", fix=EXAMPLE) from None
