"""What was measured of a variant, and what the gate said about it."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Evaluation(BaseModel):
    """A variant measured against the full-precision reference on the same tokens, on the machine that evaluated it.

    `None` is "not measured"; NaN is "measured, and broken". NaN is written as the string "NaN" because JSON has no NaN
    and pydantic's default, `null`, would turn the second into the first. `x_low` and `x_high` are the ends of a 95%
    bootstrap interval of `x`: how far another text of the same kind may move the figure.
    """

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")

    bytes: int
    """Of all files of the variant, tokenizer and configuration included."""
    kl: float | None = None
    """Mean over positions of KL(reference || variant), in nats per token."""
    kl_low: float | None = None
    kl_high: float | None = None
    top1: float | None = None
    """Share of positions where both rank the same token first, 0 to 1."""
    top1_low: float | None = None
    top1_high: float | None = None
    ppl: float | None = None
    """Perplexity of the variant."""
    ppl_low: float | None = None
    ppl_high: float | None = None
    reference_ppl: float | None = None
    """Perplexity of the reference on the same tokens."""
    tokens_per_s: float | None = None
    """Greedy generation of one sequence, prompt excluded; the median of several runs."""
    ttft_s: float | None = None
    """From a tokenized prompt to the first new token."""
    peak_rss_bytes: int | None = None
    """Peak resident memory of a fresh process that loads the variant and generates."""
    tasks: dict[str, float] = Field(default_factory=dict)
    """Accuracy by task, 0 to 1."""
    golden_passed: int | None = None
    """Golden prompts whose greedy answer is as expected, of `golden_total`."""
    golden_total: int | None = None
    repetition: float | None = None
    """Share of the generated 4-grams of tokens that repeat an earlier one of the same continuation, 0 to 1."""
    joules_per_token: float | None = None
    """Of greedy generation, for the whole processor."""
    joules_source: Literal["measured", "modelled"] | None = None
    """By the processor's own energy counter, or from the processor time that was used."""


class Verdict(BaseModel):
    """The gate's answer. `reasons` is empty if and only if it passed."""

    model_config = ConfigDict(frozen=True)

    passed: bool
    reasons: tuple[str, ...] = ()


class Figure(BaseModel):
    """One figure of a report and what measuring it again gave."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")

    name: str
    reported: float | None
    found: float
    agrees: bool


class Verification(BaseModel):
    """What is left of a report when somebody else measures. It `agrees` if every figure and every digest does."""

    model_config = ConfigDict(frozen=True)

    agrees: bool
    figures: tuple[Figure, ...]
    differing: tuple[str, ...]
    """Files and texts whose digest is not the report's."""
    tools: tuple[str, ...]
    """Tools of another version than the report's. Allowed: they are why figures may differ."""
