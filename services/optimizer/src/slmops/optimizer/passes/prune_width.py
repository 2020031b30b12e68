"""Drops the channels of every MLP that the other channels can replace best, and refits the others to replace them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field

from slmops.contracts.errors import OptimizationFailed, UnsupportedArchitecture
from slmops.optimizer.passes import Context, Params, decoder

_MULTIPLE = 32  # a quantization block must not cross the end of a row


class PruneWidth(Params):
    share: float = Field(gt=0, lt=1, description="share of every MLP's channels to drop; rounded to a multiple of 32")
    tokens: int = Field(default=16384, ge=256, description="calibration tokens for the choice and the refit")


def run(given: Path, out: Path, params: PruneWidth, context: Context) -> None:
    """Runs the pass.

    Raises `UnsupportedArchitecture`, and `OptimizationFailed` if no channel or every channel would be dropped.
    """
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
            f"dropping a share of {share:g} of {size} channels leaves {left}, rounded to a multiple of {_MULTIPLE}",
            fix="Choose another share.",
        )
    return size - left


def _prune(mlp: Any, drop: int, normal: decoder.NormalEquations) -> None:
    """Prunes `gate_proj` and `up_proj`, or one matrix that has all gates and then all ups, and refits `down_proj`."""
    import torch

    kept = decoder.least_needed(mlp.down_proj, normal, 1, drop)
    if hasattr(mlp, "gate_up_proj"):
        decoder.keep_outputs(mlp.gate_up_proj, torch.cat([kept, kept + mlp.down_proj.in_features]))
    elif hasattr(mlp, "gate_proj") and hasattr(mlp, "up_proj"):
        decoder.keep_outputs(mlp.gate_proj, kept)
        decoder.keep_outputs(mlp.up_proj, kept)
    else:
        raise UnsupportedArchitecture(
            f"{type(mlp).__name__} has no gate and up projection", fix="Leave prune-width out of the recipe."
        )
    decoder.refit(mlp.down_proj, normal, kept)
