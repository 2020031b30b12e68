"""Golden prompts: the questions a release must answer on the gateway itself before it may serve anybody."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from slmops.contracts.errors import InvalidMessage

GOLDEN_FILE = "golden.jsonl"
"""Its path inside a package."""

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
    """Parses JSON lines and skips blank ones. Raises `InvalidMessage` with the number of the invalid line."""
    return tuple(_line(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip())


def _line(number: int, line: str) -> GoldenPrompt:
    try:
        return GoldenPrompt.model_validate_json(line)
    except ValidationError as error:
        raise InvalidMessage(
            f"a golden prompt is not valid: {error.errors(include_input=False)[0]['msg']}",
            where=f"{GOLDEN_FILE} line {number}",
            fix='Write {"prompt": "…", "expect": ["…"], "max_tokens": 32}.',
        ) from None


def dump_golden(prompts: tuple[GoldenPrompt, ...]) -> str:
    """Returns the prompts as JSON lines, which `parse_golden` reads back."""
    return "".join(prompt.model_dump_json() + "\n" for prompt in prompts)
