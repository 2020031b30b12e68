"""Reads a Hugging Face directory: config.json, a tokenizer, and safetensors in one file or in several with an index."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slmops.contracts.errors import UnsupportedArchitecture
from slmops.kit.modelfile import facts
from slmops.kit.modelfile.facts import Facts, ModelFacts, Shape, damaged, json_object, value
from slmops.kit.modelfile.safetensors import read_shapes

ARCHITECTURES = frozenset({"llama", "qwen2", "qwen3", "gemma3_text", "phi3"})
"""Values of `model_type` in config.json that the optimizer can read and build."""
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"


def hf_facts(folder: Path) -> Facts:
    """Returns the facts of a directory. Raises `NotAModel`, `TruncatedModel`, `UnsupportedArchitecture`,
    `InvalidModel`."""
    config = json_object(folder / "config.json")
    architecture = facts.supported(config.get("model_type"), ARCHITECTURES, folder)
    if config.get("quantization_config"):
        raise UnsupportedArchitecture(
            "the weights are already quantized", where=str(folder), fix="Give the original, unquantized model."
        )
    facts.check_tokenizer(folder)
    shapes = _shapes(folder)
    _check_shapes(shapes, config, folder / "config.json")
    parameters = sum(math.prod(shape) for shape in shapes.values())
    return Facts(ModelFacts(architecture, parameters, facts.folder_bytes(folder), "hf"), shapes)


def _shapes(folder: Path) -> dict[str, Shape]:
    if not (folder / _INDEX).is_file():
        return read_shapes(_weights(folder, _WEIGHTS))
    places = value(json_object(folder / _INDEX), "weight_map", dict, folder / _INDEX)
    files = {name: read_shapes(_weights(folder, name)) for name in sorted(set(map(str, places.values())))}
    for tensor, name in places.items():
        if tensor not in files[name]:
            raise damaged(f"{name} does not contain {tensor!r}, although the index says so", folder / _INDEX)
    return {tensor: files[name][tensor] for tensor, name in places.items()}


def _weights(folder: Path, name: str) -> Path:
    if Path(name).suffix != ".safetensors" or not (folder / Path(name).name).is_file():
        raise damaged(
            f"the directory has no {name}", folder, "Convert the weights to safetensors, or add the missing file."
        )
    return facts.inside(folder, name)


def _check_shapes(shapes: Mapping[str, Shape], config: Mapping[str, Any], where: Path) -> None:
    """Checks that the configuration's sizes match the weights, so that no code allocates memory for false sizes."""
    layers, hidden, inner, vocabulary = (
        value(config, key, int, where)
        for key in ("num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size")
    )
    facts.check_positions(
        config.get("max_position_embeddings", 1), where
    )  # if absent, the architecture's default applies
    parts = _layers(shapes)
    if len(parts) != layers or parts.keys() != set(range(layers)) or len(set(map(frozenset, parts.values()))) > 1:
        raise damaged(f"config.json names {layers:,} layers, but the weights have {len(parts)}", where)
    expected = {"model.embed_tokens.weight": (vocabulary, hidden), "model.norm.weight": (hidden,)}
    expected |= {f"model.layers.{layer}.mlp.down_proj.weight": (hidden, inner) for layer in range(layers)}
    for name, shape in expected.items():
        if shapes.get(name) != shape:
            raise damaged(f"{name} has shape {shapes.get(name)}, but config.json requires {shape}", where)


def _layers(shapes: Mapping[str, Shape]) -> dict[int, set[str]]:
    """Returns the names of the tensors in each layer."""
    found: dict[int, set[str]] = {}
    for name in shapes:
        head, _, rest = name.removeprefix("model.layers.").partition(".")
        if name.startswith("model.layers.") and head.isdecimal():
            found.setdefault(int(head), set()).add(rest)
    return found
