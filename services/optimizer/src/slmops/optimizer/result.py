"""What a job hands back."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from slmops.optimizer.domain import Candidate, Choice

RESULT_FILE = "result.json"


class ReferenceFigures(BaseModel):
    """What the variants were compared with."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")

    architecture: str
    parameters: int
    ppl: float
    windows: int
    window_tokens: int


class Variant(Candidate):
    """`path` is the genai folder, relative to the job's work folder."""

    path: str


class JobResult(BaseModel):
    """`variants` in the order in which they were asked for; `timings_s` of the steps that this run did itself."""

    model_config = ConfigDict(frozen=True)

    reference: ReferenceFigures
    variants: tuple[Variant, ...]
    choice: Choice
    timings_s: dict[str, float]
