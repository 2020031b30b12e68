"""Fewer channels in every MLP: those that the others can best stand in for, and the others refitted to do so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field

from slmops.contracts.errors import OptimizationFailed, UnsupportedArchitecture
from slmops.optimizer.passes import Context, Params, decoder

_MULTIPLE = 32  # a block of quantization may not go over the end of a row


class PruneWidth(Params):
    share: float = Field(gt=0, lt=1, description="share of every MLP's channels to drop; rounded to a multiple of 32")
    tokens: int = Field(default=16384, ge=256, description="calibration tokens that the choice and the refit look at")


def run(given: Path, out: Path, params: PruneWidth, context: Context) -> None:
    """Raises `UnsupportedArchitecture`, and `OptimizationFailed` if nothing or everything would go."""
    original, model = decoder.load(given), decoder.load(given)
    config: Any = model.config
    drop = _dropped(config.intermediate_size, params.share)
    tokens = decoder.calibration(given, context, params.tokens)
    teacher, student = decoder.Walk(original, tokens), decoder.Walk(model, tokens)
    layers = list(zip(decoder.decoder_layers(original), decoder.decoder_layers(model), strict=True))
    for number, (whole, layer) in enumerate(layers):
        context.tell("dropping channels", number / len(layers))
        teacher.hidden = teacher.through(whole, number)
        _prune(layer.mlp, drop, student.normal(layer, number, layer.mlp.down_proj, teacher.hidden))
        student.hidden = student.through(layer, number)
    config.intermediate_size -= drop
    decoder.save(model, given, out)


def _dropped(size: int, share: float) -> int:
    left = round(size * (1 - share) / _MULTIPLE) * _MULTIPLE
    if not 0 < left < size:
        raise OptimizationFailed(
            f"a share of {share:g} of {size} channels leaves {left}, in multiples of {_MULTIPLE}",
            fix="Choose another share.",
        )
    return size - left


def _prune(mlp: Any, drop: int, normal: decoder.Normal) -> None:
    """`gate_proj` and `up_proj`, or both as one matrix, first all gates, then all ups."""
    import torch

    kept = decoder.least_needed(mlp.down_proj, normal, 1, drop)
    if hasattr(mlp, "gate_up_proj"):
        decoder.keep_outputs(mlp.gate_up_proj, torch.cat([kept, kept + mlp.down_proj.in_features]))
    elif hasattr(mlp, "gate_proj") and hasattr(mlp, "up_proj"):
        decoder.keep_outputs(mlp.gate_proj, kept)
        decoder.keep_outputs(mlp.up_proj, kept)
    else:
        raise UnsupportedArchitecture(
            f"{type(mlp).__name__} has no gate and up projection", fix="Leave prune_width out of the recipe."
        )
    decoder.refit(mlp.down_proj, normal, kept)
