"""Writes the model card of a package: its origin, its recipe and its measurements. Pure."""

from __future__ import annotations

from slmops.contracts.evaluation import Evaluation
from slmops.contracts.events import VariantOptimized

_ROWS = (
    ("KL divergence from full precision, nats per token", "kl", "{:.4g}"),
    ("Same most likely token as full precision", "top1", "{:.1%}"),
    ("Perplexity", "ppl", "{:.4g}"),
    ("Perplexity at full precision", "reference_ppl", "{:.4g}"),
    ("Tokens per second, where it was measured", "tokens_per_s", "{:.4g}"),
    ("Time to first token, seconds", "ttft_s", "{:.3g}"),
    ("Peak resident memory, bytes", "peak_rss_bytes", "{:,}"),
    ("Files, bytes", "bytes", "{:,}"),
)


def model_card(variant: VariantOptimized) -> str:
    """Returns the model card as Markdown. Missing figures are shown as "not measured"."""
    rows = "\n".join(f"| {label} | {_shown(variant.evaluation, name, form)} |" for label, name, form in _ROWS)
    golden = "`golden.jsonl` holds the prompts that a gateway must answer before it serves.\n" if variant.golden else ""
    return (
        f"# {variant.model} {variant.version}\n\n"
        f"Recipe `{variant.recipe}` for device profile `{variant.profile}`, from variant `{variant.digest}`.\n"
        f"Chosen because: {' '.join(variant.reason.split())}\n\n"
        f"| measured | |\n| --- | --- |\n{rows}\n\n"
        f"`evaluation.json` is the full report. {golden}"
    )


def _shown(evaluation: Evaluation, name: str, form: str) -> str:
    value = getattr(evaluation, name)
    return "not measured" if value is None else form.format(value)
