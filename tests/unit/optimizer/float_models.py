"""Random models of every architecture that the float passes support, a few kilobytes each, and contexts for passes."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tiny_model import VOCABULARY, make_tiny_llama

from slmops.optimizer.passes import Context

LAYERS = 4
_SHAPE: Mapping[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "initializer_range": 0.1,
}
_SLIDING = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2)}
ARCHITECTURES: Mapping[str, Mapping[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "gemma3_text": {"head_dim": 32, **_SLIDING},
    "phi3": {"sliding_window": None},
}


def make_model(folder: Path, architecture: str = "llama") -> Any:
    """Returns a model and saves it as a Hugging Face directory with a byte-level BPE tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(architecture, **_SHAPE, **ARCHITECTURES[architecture])
    )
    shutil.rmtree(make_tiny_llama(folder) / "model.safetensors", ignore_errors=True)
    model.save_pretrained(folder)
    return model.eval().requires_grad_(False)


def context(
    reference: Path, tokens: Any = None, seed: int = 0, tell: Any = lambda what, share: None, **options: Any
) -> Context:
    """Returns a context. Without `tokens` it has random ones [1000, 64], too many for a model to memorize."""
    windows = np.random.default_rng(0).integers(3, VOCABULARY, (1000, 64)) if tokens is None else tokens
    return Context(reference, lambda folder: folder, lambda: windows, seed, tell, **options)


def logits(model: Any, tokens: Any) -> Any:
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(tokens)).logits


def divergence(expected: Any, found: Any) -> float:
    """Returns the KL in nats per token."""
    import torch

    p, q = torch.log_softmax(expected, -1), torch.log_softmax(found, -1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def unseen(count: int = 8) -> Any:
    """Returns random tokens [count, 64] that differ from those of `context`."""
    return np.random.default_rng(1).integers(3, VOCABULARY, (count, 64))
