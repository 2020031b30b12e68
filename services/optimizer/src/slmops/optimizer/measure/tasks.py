"""Measures task accuracy on the questions of `slmops.contracts.prompts.tasks`.

Multiple choice: the model's answer is the choice with the highest log-likelihood per byte, as in `acc_norm` of
EleutherAI's lm-evaluation-harness; chance level is 1 / choices. Exact match: the model's answer is the first line of
the greedy continuation. As in SQuAD, case and spacing are ignored, and also punctuation, but only around the answer.
"""

from __future__ import annotations

import math
import string
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from slmops.contracts.errors import InvalidMessage, NotFound
from slmops.contracts.prompts.tasks import ExactMatch, MultipleChoice, Task, parse_task
from slmops.contracts.prompts.texts import decoded
from slmops.optimizer.measure.genai import GenaiModel

_BUNDLED = files("slmops.optimizer") / "data" / "everyday.jsonl"
_SPARE_TOKENS = 4  # an answer that is longer than the expected one by more than this is wrong


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
        return tuple(parse_task(path.stem, decoded(str(path), path.read_bytes()), str(path)) for path in paths)
    except OSError as error:
        raise NotFound(f"a task file cannot be read: {error.strerror}", where=str(error.filename)) from error


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
