"""Converts a GGUF file to a Hugging Face directory: dequantizes every tensor with the gguf package and renames it.

We do not use transformers for this: it silently drops what it does not know (Llama 3's rope_freqs, biases, head sizes),
and takes three times as long. This module also reverts what llama.cpp's convert_hf_to_gguf.py does to the weights: it
reorders the rows of Llama's queries and keys, and adds one to Gemma's norms.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from slmops.contracts.errors import UnsupportedArchitecture
from slmops.kit.modelfile.gguf import ROPE_FREQS, GgufTensor, hf_architecture, hf_names, read_gguf, rope_scaling
from slmops.optimizer.intake import angles
from slmops.optimizer.intake.huggingface import Matrix, write_tensors

_GEMMA_LOCAL_THETA = 10_000.0  # llama.cpp's constant for Gemma 3's sliding layers; it is not in the file


def write(path: Path, target: Path) -> None:
    """Converts the file `path`.

    Raises `InvalidModel`, `UnsupportedArchitecture`, and whatever the gguf package and transformers raise.
    """
    from transformers import AutoTokenizer

    metadata, table = read_gguf(path)
    architecture: str = metadata["general.architecture"]
    content = np.memmap(path, dtype=np.uint8, mode="r")
    read = {tensor.name: _dequantized(content, tensor) for tensor in table}
    factors = read.pop(ROPE_FREQS, None)
    config = _config(architecture, metadata, read, factors)
    names = hf_names(architecture, config.num_hidden_layers)
    tensors = {names[name]: _reverted(architecture, name, found, config) for name, found in read.items()}
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    write_tensors(config, tensors, tokenizer, target)


def _dequantized(content: np.memmap[Any, np.dtype[np.uint8]], tensor: GgufTensor) -> Matrix:
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    data = np.asarray(content[tensor.offset : tensor.offset + tensor.size_bytes])
    kind = GGMLQuantizationType(tensor.kind)
    if kind == GGMLQuantizationType.F16:
        data = data.view(np.float16)
    try:
        found = dequantize(data.reshape(*reversed(tensor.shape[1:]), -1), kind)
    except NotImplementedError as error:
        raise UnsupportedArchitecture(
            f"tensor {tensor.name!r} has type {kind.name}, which the gguf package cannot dequantize"
        ) from error
    return np.asarray(found, dtype=np.float32)


def _config(architecture: str, metadata: Mapping[str, Any], read: Mapping[str, Matrix], factors: Matrix | None) -> Any:
    from transformers import CONFIG_MAPPING

    facts = {key.removeprefix(f"{architecture}."): value for key, value in metadata.items()}
    heads, hidden = facts["attention.head_count"], facts["embedding_length"]
    head_dim = facts.get("attention.key_length") or facts.get("rope.dimension_count") or hidden // heads
    theta = float(facts.get("rope.freq_base", 10_000.0))
    settings = {
        "hidden_size": hidden,
        "intermediate_size": facts["feed_forward_length"],
        "num_hidden_layers": facts["block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": facts.get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "vocab_size": len(read["token_embd.weight"]),
        "max_position_embeddings": facts["context_length"],
        "rms_norm_eps": float(f"{facts['attention.layer_norm_rms_epsilon']:.6g}"),
        "tie_word_embeddings": "output.weight" not in read,
        "rope_parameters": {"rope_theta": theta, **rope_scaling(architecture, metadata)},
        **{f"{x}_token_id": facts.get(f"tokenizer.ggml.{key}_token_id") for x, key in _TOKENS.items()},
    }
    if factors is not None:
        settings["rope_parameters"] = angles.parameters(angles.default(theta, head_dim) / factors, theta)
    settings |= _architecture_settings(architecture, facts, settings)
    return CONFIG_MAPPING[hf_architecture(architecture)](**settings)


_TOKENS = {"bos": "bos", "eos": "eos", "pad": "padding"}


def _architecture_settings(architecture: str, facts: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns additional settings of one architecture."""
    window = facts.get("attention.sliding_window") or None
    if architecture == "gemma3":
        sliding = {"rope_type": "default", "rope_theta": _GEMMA_LOCAL_THETA}
        return {
            "sliding_window": window,
            "query_pre_attn_scalar": settings["head_dim"],
            "rope_parameters": {"full_attention": settings["rope_parameters"], "sliding_attention": sliding},
        }
    if architecture == "phi3":
        share = facts.get("rope.dimension_count", settings["head_dim"]) / settings["head_dim"]
        return {
            "sliding_window": window,
            "original_max_position_embeddings": settings["max_position_embeddings"],
            "rope_parameters": settings["rope_parameters"] | {"partial_rotary_factor": share},
        }
    return {}


def _reverted(architecture: str, name: str, found: Matrix, config: Any) -> Matrix:
    """Reverts the changes that llama.cpp's converter made to a tensor."""
    if architecture == "gemma3" and name.endswith("norm.weight"):
        return found - 1
    if architecture == "llama" and (".attn_q." in name or ".attn_k." in name):
        heads = config.num_attention_heads if ".attn_q." in name else config.num_key_value_heads
        return found.reshape(heads, -1, 2, found.shape[1]).swapaxes(1, 2).reshape(found.shape)
    return found
