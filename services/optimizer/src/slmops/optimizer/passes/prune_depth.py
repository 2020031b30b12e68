"""Drops the layers that change the hidden state least, and refits the layer before each gap to replace them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from slmops.contracts.errors import OptimizationFailed
from slmops.optimizer.passes import Context, Params, Tokens, decoder


class PruneDepth(Params):
    layers: int = Field(ge=1, description="how many layers to drop; the first and the last always stay")
    tokens: int = Field(default=16384, ge=256, description="calibration tokens for the choice and the refit")


def run(given: Path, out: Path, params: PruneDepth, context: Context) -> None:
    """Runs the pass. Raises `UnsupportedArchitecture`, and `OptimizationFailed` if there are too few layers to drop."""
    import torch

    original, model = decoder.load(given), decoder.load(given)
    layers = decoder.decoder_layers(model)
    if params.layers > len(layers) - 2:
        raise OptimizationFailed(
            f"cannot drop {params.layers} of {len(layers)} layers: the first and the last must stay",
            fix="Drop fewer layers.",
        )
    tokens = decoder.calibration(given, context, params.tokens)
    context.tell("measuring layers", 0.0)
    kept = _kept(influences(original, tokens), params.layers)
    _bridge(original, model, tokens, kept, context)
    config: Any = model.config
    model.get_decoder().layers = torch.nn.ModuleList(layers[number] for number in kept)
    config.num_hidden_layers = len(kept)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[number] for number in kept]
    decoder.save(model, given, out)


def influences(model: Any, tokens: Tokens) -> list[float]:
    """Returns for every layer 1 - mean cosine of the hidden states before and after (ShortGPT, Men et al. 2024)."""
    import torch

    walk, found = decoder.Walk(model, tokens), []
    for number, layer in enumerate(decoder.decoder_layers(model)):
        after = walk.through(layer, number)
        found.append(1 - float(torch.cosine_similarity(walk.hidden, after, dim=-1).mean()))
        walk.hidden = after
    return found


def _kept(influence: Sequence[float], drop: int) -> list[int]:
    inner = sorted(range(1, len(influence) - 1), key=influence.__getitem__)
    return sorted(set(range(len(influence))) - set(inner[:drop]))


def _bridge(original: Any, model: Any, tokens: Tokens, kept: Sequence[int], context: Context) -> None:
    """Refits each kept layer to the hidden states that the original has before the next kept layer."""
    teacher, student = decoder.Walk(original, tokens), decoder.Walk(model, tokens)
    whole, layers = decoder.decoder_layers(original), decoder.decoder_layers(model)
    for number, following in zip(kept, [*kept[1:], len(layers)], strict=True):
        context.tell("refitting layers", number / len(layers))
        for index in range(number, following):
            teacher.hidden = teacher.through(whole[index], index)
        layer = layers[number]
        decoder.refit(layer.mlp.down_proj, student.normal(layer, number, layer.mlp.down_proj, teacher.hidden))
        student.hidden = student.through(layer, number)
