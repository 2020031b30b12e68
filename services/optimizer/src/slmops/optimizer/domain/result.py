"""The result of a job."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from slmops.contracts.prompts.prompt_format import PromptFormat
from slmops.optimizer.domain.candidate import Variant
from slmops.optimizer.domain.choice import Choice
from slmops.optimizer.domain.front import Front

__all__ = ["PICTURES", "RESULT_FILE", "Choice", "Front", "JobResult", "ReferenceFigures", "Variant"]

RESULT_FILE = "result.json"
PICTURES = ("front.png", "front.svg")
"""The plots of a search's front, in the work folder beside the result."""


class ReferenceFigures(BaseModel):
    """The full-precision reference with which the variants were compared."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")

    architecture: str
    parameters: int
    ppl: float
    windows: int
    window_tokens: int
    text: str | None = None
    """The evaluation text's name."""
    texts: int | None = None
    """The number of texts that were joined."""
    text_tokens: int | None = None
    """Tokens of the whole text; `windows` times `window_tokens` of them were used."""
    prompt_format: PromptFormat = PromptFormat.CHAT


class JobResult(BaseModel):
    """The result of a job: `variants` in the order of the trials; `timings_s` of the steps that this run did itself."""

    model_config = ConfigDict(frozen=True)

    reference: ReferenceFigures
    variants: tuple[Variant, ...]
    front: Front
    choice: Choice
    timings_s: dict[str, float]
