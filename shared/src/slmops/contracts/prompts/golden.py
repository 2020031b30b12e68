"""Golden prompts: the questions a release must answer on the gateway itself before it may serve anybody."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from slmops.contracts.errors import InvalidMessage
from slmops.contracts.json_lines import loads, numbered_lines

GOLDEN_FILE = "golden.jsonl"
"""Its path inside a package."""
_EXAMPLE = 'Write {"prompt": "…", "expect": ["…"], "max_tokens": 32}.'

# An empty expectation is contained in every answer, and a blank one in most, so it would prove nothing.
Expectation = Annotated[str, StringConstraints(min_length=1, pattern=r"\S")]


class GoldenPrompt(BaseModel):
    """One question. It passes if the answer contains at least one of `expect`, ignoring case."""

    model_config = ConfigDict(frozen=True)

    prompt: str = Field(min_length=1)
    expect: tuple[Expectation, ...] = Field(min_length=1)
    max_tokens: int = Field(default=32, ge=1, le=512)

    def passes(self, answer: str) -> bool:
        return any(expected.casefold() in answer.casefold() for expected in self.expect)


def parse_golden(text: str) -> tuple[GoldenPrompt, ...]:
    """Parses JSON lines and skips blank ones. Raises `InvalidMessage` with the number of the invalid line.

    Ignores unknown fields, because a gateway may be older than the registry that accepted them.
    """
    return tuple(_line(number, line, "ignore") for number, line in numbered_lines(text))


def check_golden(text: str) -> tuple[GoldenPrompt, ...]:
    """Parses JSON lines as their author wrote them.

    Raises `InvalidMessage` also for an unknown field, which is usually a misspelt one, for a field that occurs twice,
    and for two lines that expect different answers to the same prompt: a release must satisfy both.
    """
    first: dict[str, tuple[int, GoldenPrompt]] = {}
    for number, line in numbered_lines(text):
        _check_unique(number, line)
        found = _line(number, line, "forbid")
        earlier, known = first.setdefault(found.prompt, (number, found))
        if set(known.expect) != set(found.expect):
            raise _invalid(
                number,
                f"expects other answers to the prompt of line {earlier}",
                'Write each prompt once, with every right answer in "expect".',
            )
    return parse_golden(text)


def _check_unique(number: int, line: str) -> None:
    try:
        loads(line)
    except ValueError as error:
        raise _invalid(number, f"is not valid: {error}") from None


def _line(number: int, line: str, unknown: Literal["ignore", "forbid"]) -> GoldenPrompt:
    try:
        return GoldenPrompt.model_validate_json(line, extra=unknown)
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        field = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            raise _invalid(number, f"has an unknown field {field!r}") from None
        raise _invalid(number, f"is not valid: {field + ': ' if field else ''}{first['msg']}") from None


def _invalid(number: int, what: str, fix: str = _EXAMPLE) -> InvalidMessage:
    return InvalidMessage(f"a golden prompt {what}", where=f"{GOLDEN_FILE} line {number}", fix=fix)


def dump_golden(prompts: tuple[GoldenPrompt, ...]) -> str:
    """Returns the prompts as JSON lines, which `parse_golden` reads back."""
    return "".join(prompt.model_dump_json() + "\n" for prompt in prompts)
