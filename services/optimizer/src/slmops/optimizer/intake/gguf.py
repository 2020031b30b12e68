"""A GGUF file as a Hugging Face directory: every tensor dequantized by the gguf package, renamed, and laid out anew.

Not by transformers, which drops what it does not know (Llama 3's rope_freqs, biases, head sizes) without a word, and
takes three times as long. What its converter of the other direction (llama.cpp's convert_hf_to_gguf.py) does to the
weights is undone here: rows of Llama's queries and keys in another order, one added to Gemma's norms.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from slmops.contracts.errors import UnsupportedArchitecture
from slmops.kit.modelfile.gguf import ROPE_FREQS, GgufTensor, hf_names, read_gguf
from slmops.optimizer.intake import angles
from slmops.optimizer.intake.huggingface import Matrix, write_tensors

_GEMMA_LOCAL_THETA = 10_000.0  # llama.cpp's constant for Gemma 3's sliding layers; the file does not say it


def write(path: Path, target: Path) -> None:
    """Raises `InvalidModel`, `UnsupportedArchitecture`, and whatever the gguf package and transformers raise."""
    from transformers import AutoTokenizer

    metadata, table = read_gguf(path)
    architecture: str = metadata["general.architecture"]
    place = np.memmap(path, dtype=np.uint8, mode="r")
    read = {tensor.name: _dequantized(place, tensor) for tensor in table}
    factors = read.pop(ROPE_FREQS, None)
    config = _config(architecture, metadata, read, factors)
    names = hf_names(architecture, config.num_hidden_layers)
    tensors = {names[name]: _restored(architecture, name, found, config) for name, found in read.items()}
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    write_tensors(config, tensors, tokenizer, target)


def _dequantized(place: np.memmap[Any, np.dtype[np.uint8]], tensor: GgufTensor) -> Matrix:
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    data = np.asarray(place[tensor.offset : tensor.offset + tensor.size_bytes])
    kind = GGMLQuantizationType(tensor.kind)
    if kind == GGMLQuantizationType.F16:
        data = data.view(np.float16)
    try:
        found = dequantize(data.reshape(*reversed(tensor.shape[1:]), -1), kind)
    except NotImplementedError as error:
        raise UnsupportedArchitecture(f"tensor {tensor.name!r} is of type {kind.name}, which nobody reads") from error
    return np.asarray(found, dtype=np.float32)


def _config(architecture: str, metadata: Mapping[str, Any], read: Mapping[str, Matrix], factors: Matrix | None) -> Any:
    from transformers import CONFIG_MAPPING

    said = {key.removeprefix(f"{architecture}."): value for key, value in metadata.items()}
    heads, hidden = said["attention.head_count"], said["embedding_length"]
    head_dim = said.get("attention.key_length") or said.get("rope.dimension_count") or hidden // heads
    theta = float(said.get("rope.freq_base", 10_000.0))
    settings = {
        "hidden_size": hidden,
        "intermediate_size": said["feed_forward_length"],
        "num_hidden_layers": said["block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": said.get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "vocab_size": len(read["token_embd.weight"]),
        "max_position_embeddings": said["context_length"],
        "rms_norm_eps": float(f"{said['attention.layer_norm_rms_epsilon']:.6g}"),
        "tie_word_embeddings": "output.weight" not in read,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        **{f"{x}_token_id": said.get(f"tokenizer.ggml.{key}_token_id") for x, key in _TOKENS.items()},
    }
    if factors is not None:
        settings["rope_parameters"] = angles.parameters(angles.default(theta, head_dim) / factors, theta)
    settings |= _particular(architecture, said, settings)
    return CONFIG_MAPPING["gemma3_text" if architecture == "gemma3" else architecture](**settings)


_TOKENS = {"bos": "bos", "eos": "eos", "pad": "padding"}


def _particular(architecture: str, said: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """What one architecture says besides."""
    window = said.get("attention.sliding_window") or None
    if architecture == "gemma3":
        sliding = {"rope_type": "default", "rope_theta": _GEMMA_LOCAL_THETA}
        return {
            "sliding_window": window,
            "query_pre_attn_scalar": settings["head_dim"],
            "rope_parameters": {"full_attention": settings["rope_parameters"], "sliding_attention": sliding},
        }
    if architecture == "phi3":
        share = said.get("rope.dimension_count", settings["head_dim"]) / settings["head_dim"]
        return {
            "sliding_window": window,
            "original_max_position_embeddings": settings["max_position_embeddings"],
            "rope_parameters": settings["rope_parameters"] | {"partial_rotary_factor": share},
        }
    return {}


def _restored(architecture: str, name: str, found: Matrix, config: Any) -> Matrix:
    if architecture == "gemma3" and name.endswith("norm.weight"):
        return found - 1
    if architecture == "llama" and (".attn_q." in name or ".attn_k." in name):
        heads = config.num_attention_heads if ".attn_q." in name else config.num_key_value_heads
        return found.reshape(heads, -1, 2, found.shape[1]).swapaxes(1, 2).reshape(found.shape)
    return found
