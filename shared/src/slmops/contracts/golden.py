"""Golden prompts: the questions a release must answer on the gateway itself before it may serve anybody."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from slmops.contracts.errors import InvalidMessage

GOLDEN_FILE = "golden.jsonl"
"""Its path inside a package."""

# An empty or blank expectation is contained in every answer, so it would prove nothing.
Expectation = Annotated[str, StringConstraints(min_length=1, pattern=r"\S")]


class GoldenPrompt(BaseModel):
    """One question. It passes when the answer contains at least one of `expect`, whatever the case of letters."""

    model_config = ConfigDict(frozen=True)

    prompt: str = Field(min_length=1)
    expect: tuple[Expectation, ...] = Field(min_length=1)
    max_tokens: int = Field(default=32, ge=1, le=512)

    def passes(self, answer: str) -> bool:
        return any(expected.casefold() in answer.casefold() for expected in self.expect)


def parse_golden(text: str) -> tuple[GoldenPrompt, ...]:
    """JSON lines to prompts; blank lines are skipped. Raises `InvalidMessage` with the number of the bad line."""
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
    """The file's text; `parse_golden` of it gives the same prompts."""
    return "".join(prompt.model_dump_json() + "\n" for prompt in prompts)
