"""What was measured of a variant, and what the gate said about it."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Evaluation(BaseModel):
    """A variant measured against the full-precision reference on the same tokens, on the machine that evaluated it.

    `None` is "not measured"; NaN is "measured, and broken". NaN is written as the string "NaN" because JSON has no NaN
    and pydantic's default, `null`, would turn the second into the first.
    """

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")

    bytes: int
    """Of all files of the variant, tokenizer and configuration included."""
    kl: float | None = None
    """Mean over positions of KL(reference || variant), in nats per token."""
    top1: float | None = None
    """Share of positions where both rank the same token first, 0 to 1."""
    ppl: float | None = None
    """Perplexity of the variant."""
    reference_ppl: float | None = None
    """Perplexity of the reference on the same tokens."""
    tokens_per_s: float | None = None
    """Greedy generation of one sequence, prompt excluded."""
    ttft_s: float | None = None
    """From a tokenized prompt to the first new token."""
    peak_rss_bytes: int | None = None
    """Peak resident memory of a fresh process that loads the variant and generates."""


class Verdict(BaseModel):
    """The gate's answer. `reasons` is empty if and only if it passed."""

    model_config = ConfigDict(frozen=True)

    passed: bool
    reasons: tuple[str, ...] = ()
