"""The measurements of a variant and the gate's verdict on them."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Evaluation(BaseModel):
    """A variant measured against the full-precision reference on the same tokens, on the machine that evaluated it.

    `None` means "not measured"; NaN means "measured, and broken". NaN is written as the string "NaN" because JSON has
    no NaN, and pydantic's default, `null`, would turn it into "not measured". `x_low` and `x_high` are the ends of a
    95% bootstrap interval of `x`: the figure's variation on other texts of the same kind.
    """

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")

    bytes: int
    """Size of all files of the variant, including tokenizer and configuration."""
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
    """Number of golden prompts, of `golden_total`, whose greedy answer is as expected."""
    golden_total: int | None = None
    repetition: float | None = None
    """Share of the generated 4-grams of tokens that repeat an earlier one of the same continuation, 0 to 1."""
    joules_per_token: float | None = None
    """Energy of the whole processor per token of greedy generation."""
    joules_source: Literal["measured", "modelled"] | None = None
    """Measured by the processor's energy counter, or modelled from the processor time."""


class Verdict(BaseModel):
    """The gate's answer. `reasons` is empty if and only if it passed."""

    model_config = ConfigDict(frozen=True)

    passed: bool
    reasons: tuple[str, ...] = ()


class Figure(BaseModel):
    """One figure of a report and the result of measuring it again."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")

    name: str
    reported: float | None
    found: float
    agrees: bool


class Verification(BaseModel):
    """The comparison of a report with a second measurement. It `agrees` if every figure and every digest agrees."""

    model_config = ConfigDict(frozen=True)

    agrees: bool
    figures: tuple[Figure, ...]
    differing: tuple[str, ...]
    """Files and texts whose digest differs from the report's."""
    tools: tuple[str, ...]
    """Tools whose version differs from the report's. This is allowed and may explain differing figures."""
