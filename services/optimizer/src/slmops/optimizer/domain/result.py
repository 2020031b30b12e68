"""The result of a job."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from slmops.optimizer.domain.candidate import Variant
from slmops.optimizer.domain.choice import Choice
from slmops.optimizer.domain.front import Front

__all__ = ["PICTURES", "RESULT_FILE", "Choice", "Front", "JobResult", "ReferenceFigures", "Variant"]

RESULT_FILE = "result.json"
PICTURES = ("front.png", "front.svg")
"""Of a search's front, beside the result in the work folder."""


class ReferenceFigures(BaseModel):
    """What the variants were compared with."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")

    architecture: str
    parameters: int
    ppl: float
    windows: int
    window_tokens: int


class JobResult(BaseModel):
    """`variants` in the order in which they were tried; `timings_s` of the steps that this run did itself."""

    model_config = ConfigDict(frozen=True)

    reference: ReferenceFigures
    variants: tuple[Variant, ...]
    front: Front
    choice: Choice
    timings_s: dict[str, float]
