"""Drops attention heads: whole groups of query heads together with the key and value head that they share."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from pydantic import Field

from slmops.contracts.errors import OptimizationFailed, UnsupportedArchitecture
from slmops.optimizer.passes import Context, Params, decoder


class PruneHeads(Params):
    groups: int = Field(ge=1, description="how many key-value heads to drop in every layer, each with its query heads")
    tokens: int = Field(default=16384, ge=256, description="calibration tokens for the choice and the refit")


def run(given: Path, out: Path, params: PruneHeads, context: Context) -> None:
    """Runs the pass. Raises `UnsupportedArchitecture`, and `OptimizationFailed` if no group would be left."""
    original, model = decoder.load(given), decoder.load(given)
    config: Any = model.config
    if params.groups >= config.num_key_value_heads:
        raise OptimizationFailed(
            f"cannot drop {params.groups} of {config.num_key_value_heads} key-value heads: one must stay",
            fix="Drop fewer groups.",
        )
    model.config = narrowed = _narrowed(config, params.groups)
    tokens = decoder.calibration(given, context, params.tokens)
    teacher, student = decoder.Walk(original, tokens), decoder.Walk(model, tokens)
    layers = list(zip(decoder.decoder_layers(original), decoder.decoder_layers(model), strict=True))
    for number, (whole, layer) in enumerate(layers):
        context.tell("dropping heads", number / len(layers))
        _prune(layer.self_attn, narrowed, student.normal(layer, number, layer.self_attn.o_proj))
        teacher.hidden = teacher.through(whole, number)
        decoder.refit(layer.mlp.down_proj, student.normal(layer, number, layer.mlp.down_proj, teacher.hidden))
        student.hidden = student.through(layer, number)
    decoder.save(model, given, out)


def _narrowed(config: Any, drop: int) -> Any:
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    narrowed = copy.deepcopy(config)
    # Always explicit: after pruning it is no longer the hidden size divided by the number of heads.
    narrowed.head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    narrowed.num_key_value_heads = groups - drop
    narrowed.num_attention_heads = heads // groups * (groups - drop)
    return narrowed


def _prune(attention: Any, narrowed: Any, normal: decoder.NormalEquations) -> None:
    """Prunes `q_proj`, `k_proj` and `v_proj`, or one matrix that has all three in this order, and refits `o_proj`."""
    import torch

    groups, size = attention.config.num_key_value_heads, narrowed.head_dim
    queries, width = attention.o_proj.in_features, attention.o_proj.in_features // groups
    kept = decoder.least_needed(attention.o_proj, normal, width, groups - narrowed.num_key_value_heads)
    keys = (kept[::width, None] // width * size + torch.arange(size)).flatten()
    if hasattr(attention, "qkv_proj"):
        decoder.keep_outputs(attention.qkv_proj, torch.cat([kept, queries + keys, queries + groups * size + keys]))
        attention.num_key_value_heads = narrowed.num_key_value_heads
    elif all(hasattr(attention, name) for name in ("q_proj", "k_proj", "v_proj")):
        for projection, rows in ((attention.q_proj, kept), (attention.k_proj, keys), (attention.v_proj, keys)):
            decoder.keep_outputs(projection, rows)
    else:
        raise UnsupportedArchitecture(
            f"{type(attention).__name__} has no query, key and value projections",
            fix="Leave prune-heads out of the recipe.",
        )
    attention.config = narrowed
    decoder.refit(attention.o_proj, normal, kept)
