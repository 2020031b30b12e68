"""Reads a Hugging Face directory: config.json, a tokenizer, and safetensors in one file or in several with an index."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slmops.contracts.errors import NotAModel, UnsupportedArchitecture
from slmops.kit.modelfile import facts
from slmops.kit.modelfile.facts import Facts, ModelFacts, Shape, damaged, json_object, value
from slmops.kit.modelfile.gguf import hf_names
from slmops.kit.modelfile.rope import check_rope
from slmops.kit.modelfile.safetensors import read_shapes

ARCHITECTURES = frozenset({"llama", "qwen2", "qwen3", "gemma3_text", "phi3"})
"""Values of `model_type` in config.json that the optimizer can read and build."""
_HEAD = "lm_head.weight"
_BUFFER = ".rotary_emb.inv_freq"  # computed from the configuration; old checkpoints store it
_BIASED = {
    "attention_bias": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    "mlp_bias": ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
}
"""Setting of config.json → the modules that then have a bias."""
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"


def hf_facts(folder: Path) -> Facts:
    """Returns the facts of a directory. Raises `NotAModel`, `TruncatedModel`, `UnsupportedArchitecture`,
    `InvalidModel`."""
    config = _config(folder)
    architecture = facts.supported(
        config.get("model_type"), ARCHITECTURES, folder, encoder_decoder=config.get("is_encoder_decoder") is True
    )
    _check_class(config, folder)
    if config.get("quantization_config"):
        raise UnsupportedArchitecture(
            "the weights are already quantized", where=str(folder), fix="Give the original, unquantized model."
        )
    check_rope(architecture, config, folder / "config.json")
    shapes = _shapes(folder)
    _check_shapes(shapes, config, folder / "config.json")
    _check_heads(architecture, shapes, config, folder / "config.json")
    _check_names(architecture, shapes, config, folder)
    facts.check_tokenizer(folder, shapes["model.embed_tokens.weight"][0])
    counted = shapes.keys() - ({"lm_head.weight"} if _tied(architecture, config) else set())
    parameters = sum(math.prod(shapes[name]) for name in counted)
    return Facts(
        ModelFacts(architecture, parameters, facts.folder_bytes(folder), "hf"),
        shapes,
        classes=frozenset(map(str, config.get("architectures") or ())),
        names=frozenset(facts.hub_ids([config.get("_name_or_path")])),
    )


def _config(folder: Path) -> dict[str, Any]:
    """Returns config.json. Raises `NotAModel` with the reason for a folder that has none."""
    if not (folder / "config.json").is_file():
        if any(folder.glob("*encoder_model*.onnx")) or any(folder.glob("*decoder_with_past_model*.onnx")):
            raise UnsupportedArchitecture(
                "the folder is an ONNX export of an encoder-decoder, and only decoders can be served",
                where=str(folder),
                fix="Give a decoder's Hugging Face directory.",
            )
        if (folder / "snapshots").is_dir():
            raise NotAModel(
                "the folder is the cache of a download", where=str(folder), fix="Give one of its snapshots/ folders."
            )
    return json_object(folder / "config.json")


def _tied(architecture: str, config: Mapping[str, Any]) -> bool:
    """Returns whether the head is the embedding. A file may still contain both."""
    return config.get("tie_word_embeddings", architecture == "gemma3_text") is True


def _check_class(config: Mapping[str, Any], where: Path) -> None:
    """Checks that the model was saved with a head that predicts tokens, not with a classifier."""
    classes = config.get("architectures") or []
    names = [str(name) for name in classes] if isinstance(classes, list) else [str(classes)]
    if names and not any(name.endswith("ForCausalLM") for name in names):
        raise UnsupportedArchitecture(
            f"the model is a {names[0]}, which does not generate text",
            where=str(where),
            fix="Give the model with its language head: architectures in config.json ends with ForCausalLM.",
        )


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


def _check_heads(architecture: str, shapes: Mapping[str, Shape], config: Mapping[str, Any], where: Path) -> None:
    """Checks that heads of queries and keys fit together and make up the projections."""
    heads = value(config, "num_attention_heads", int, where)
    groups = config.get("num_key_value_heads") or heads
    if not isinstance(groups, int) or heads < 1 or groups < 1 or heads % groups:
        raise damaged(f"config.json has {heads} attention heads and {groups} key-value heads", where)
    size = config.get("head_dim") or config["hidden_size"] // heads
    for name, count in (("q_proj", heads), ("k_proj", groups), ("v_proj", groups)):
        shape = shapes.get(f"model.layers.0.self_attn.{name}.weight")
        if shape is not None and shape[0] != count * size:
            raise damaged(f"{name} has {shape[0]} rows, but config.json requires {count} heads of {size} values", where)


def _check_names(architecture: str, shapes: Mapping[str, Shape], config: Mapping[str, Any], folder: Path) -> None:
    """Checks that the weights are those of the configuration, because transformers drops others without an error and
    uses random numbers in place of missing ones."""
    layers = config["num_hidden_layers"]
    needed = set(hf_names(architecture.removesuffix("_text"), layers).values())
    if missing := sorted(needed - shapes.keys() - {_HEAD}):
        raise damaged(f"there are no weights for {missing[0]} and {len(missing) - 1} other parameters", folder)
    modules = [module for key, names in _BIASED.items() if config.get(key) is True for module in names]
    known = needed | {f"model.layers.{layer}.{module}.bias" for layer in range(layers) for module in modules}
    if strange := sorted(name for name in shapes.keys() - known if not name.endswith(_BUFFER)):
        raise UnsupportedArchitecture(
            f"{strange[0]} and {len(strange) - 1} other tensors are not part of the {architecture} model that "
            "config.json describes",
            where=str(folder),
            fix="Correct config.json (biases need attention_bias or mlp_bias), or give another model.",
        )


def _layers(shapes: Mapping[str, Shape]) -> dict[int, set[str]]:
    """Returns the names of the tensors in each layer."""
    found: dict[int, set[str]] = {}
    for name in shapes:
        head, _, rest = name.removeprefix("model.layers.").partition(".")
        if name.startswith("model.layers.") and head.isdecimal():
            found.setdefault(int(head), set()).add(rest)
    return found
