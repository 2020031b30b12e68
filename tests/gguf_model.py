"""Writes GGUF files as llama.cpp's converter (convert_hf_to_gguf.py) does, from a tiny Hugging Face directory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from safetensors.numpy import load_file

from slmops.kit.modelfile.gguf import hf_names

Array = np.ndarray


def write_gguf(
    path: Path, hf_dir: Path, kind: Kind = Kind.F32, scaled: Mapping[str, object] | None = None
) -> dict[str, Array]:
    """Writes `hf_dir` with its matrices as `kind`. Returns the tensors that gguf reads from it, by GGUF's names.

    Kinds that gguf-py cannot write get random blocks with scales of ordinary size. `scaled` is additional metadata.
    """
    config = json.loads((hf_dir / "config.json").read_bytes())
    architecture = config["model_type"].removesuffix("_text")
    writer = gguf.GGUFWriter(path, architecture)
    _metadata(writer, config)
    _vocabulary(writer, hf_dir)
    for key, value in (scaled or {}).items():
        writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    weights, held = load_file(hf_dir / "model.safetensors"), {}
    for name, long in hf_names(architecture, config["num_hidden_layers"]).items():
        if long in weights:
            values = converted(architecture, name, weights[long], config)
            own = Kind.F32 if values.ndim == 1 else kind
            data = quantized(values, own)
            held[name] = gguf.quants.dequantize(data, own)
            writer.add_tensor(name, data, raw_dtype=own)
    _rope_freqs(writer, config)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


def converted(architecture: str, name: str, values: Array, config: Mapping[str, int]) -> Array:
    """Converts a tensor as llama.cpp does: interleaves rows of Llama's queries and keys, adds 1 to Gemma's norms."""
    if architecture == "gemma3" and name.endswith("norm.weight"):
        return values + 1
    if architecture == "llama" and ("attn_q" in name or "attn_k" in name):
        heads = config["num_attention_heads" if "attn_q" in name else "num_key_value_heads"]
        return values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
    return values


def quantized(values: Array, kind: Kind) -> Array:
    """Quantizes with the library. For the two kinds that it can only read, returns random codes with small scales."""
    if kind not in (Kind.Q4_K, Kind.Q6_K):
        return gguf.quants.quantize(values, kind)
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    data = np.random.default_rng(0).integers(0, 256, (len(values), values.shape[1] // block, block_bytes), np.uint8)
    scale = np.frombuffer(np.float16(0.001).tobytes(), np.uint8)
    if kind == Kind.Q4_K:
        data[..., :4] = np.tile(scale, 2)
    else:
        data[..., -2:] = scale
    return data.reshape(len(values), -1)


def _metadata(writer: gguf.GGUFWriter, config: Mapping[str, object]) -> None:
    rope = config["rope_parameters"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    if config.get("head_dim"):
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    if config.get("sliding_window"):
        writer.add_sliding_window(config["sliding_window"])


def _vocabulary(writer: gguf.GGUFWriter, hf_dir: Path) -> None:
    tokenizer = json.loads((hf_dir / "tokenizer.json").read_bytes())
    words = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    words += [f"<unused{number}>" for number in range(320 - len(words))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(words)
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(words) - 3))
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)


def _rope_freqs(writer: gguf.GGUFWriter, config: Mapping[str, object]) -> None:
    """Returns the divisors of Llama 3's angles, as the converter computes them."""
    rope = config["rope_parameters"]
    if rope.get("rope_type") != "llama3":
        return
    size = config["head_dim"]
    wavelengths = 2 * np.pi * rope["rope_theta"] ** (np.arange(0, size, 2) / size)
    low, high = (rope["original_max_position_embeddings"] / rope[f"{x}_freq_factor"] for x in ("low", "high"))
    share = (rope["original_max_position_embeddings"] / wavelengths - rope["low_freq_factor"]) / (
        rope["high_freq_factor"] - rope["low_freq_factor"]
    )
    mixed = 1 / ((1 - share) / rope["factor"] + share)
    factors = np.where(wavelengths < high, 1, np.where(wavelengths > low, rope["factor"], mixed))
    writer.add_tensor("rope_freqs.weight", factors.astype(np.float32))
