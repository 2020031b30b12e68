"""Exports a float32 Hugging Face directory as an onnxruntime-genai folder, and checks that both compute the same."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from slmops.contracts.errors import OptimizationFailed
from slmops.optimizer.intake.graph import Graph
from slmops.optimizer.intake.tokens import adapt_tokenizer

CONFIG = "config.json"
MAX_PARITY_KL = 1e-4
"""Limit in nats per token. Float32 with another order of operations gives 1e-9, int8 weights give 5e-3, and a wrong
rotary angle gives more. A correct export is far below the limit, a wrong one far above."""
_POSITIONS, _COMPARED = 256, 64
_EVERY_ANGLE = {"rope_type": "llama3", "low_freq_factor": 1e12, "high_freq_factor": 2e12}
_LONGEST_WINDOW = 1024  # a longer sliding window is not filled, because its logits would take gigabytes


def export(hf_dir: Path, out: Path) -> Path:
    """Writes the float32 genai folder `out`: graph, genai_config.json, config.json and the tokenizer.

    The complete folder is renamed to `out`; its tokenizer makes the same tokens as that of `hf_dir`. The builder
    prints, changes `sys.path`, and takes several times the model's memory. Raises `OptimizationFailed`, and
    `InvalidModel` for a chat template that fails.
    """
    return build(hf_dir, out, "fp32", {})


def build(hf_dir: Path, out: Path, precision: str, options: Mapping[str, str]) -> Path:
    """Like `export`, but with a `--precision` and `--extra_options` for the onnxruntime-genai builder."""
    from onnxruntime_genai.models.builder import create_model, parse_extra_options

    scratch, cache = out.with_name(out.name + ".part"), out.with_name(out.name + ".cache")
    shutil.rmtree(scratch, ignore_errors=True)
    place = ("", str(hf_dir), str(scratch), precision, "cpu", str(cache))
    try:
        parsed = parse_extra_options(*place, [f"{key}={value}" for key, value in options.items()])
        _adapt_config(parsed["hf_details"]["hf_config"])
        create_model(*place, **parsed)
        shutil.copyfile(hf_dir / CONFIG, scratch / CONFIG)  # with it, transformers' tools read the package
    except Exception as error:
        if isinstance(error, MemoryError) or getattr(error, "errno", None):
            raise  # a problem of the machine, not of the model
        raise OptimizationFailed(
            f"the {precision} build failed: {type(error).__name__}: {str(error)[:300]}",
            where=str(hf_dir),
            fix="Report this error with the model's config.json.",
        ) from error
    finally:
        shutil.rmtree(cache, ignore_errors=True)
    adapt_tokenizer(hf_dir, scratch)
    os.replace(scratch, out)
    return out


def _adapt_config(config: Any) -> None:
    """Adapts configurations to builder 0.18, which expects the format of transformers before version 5."""
    if config.model_type == "llama" and config.rope_parameters["rope_type"] == "linear":
        # Otherwise the builder ignores the factor. Llama 3's scaling with these limits divides every angle by it.
        config.rope_parameters = dict(config.rope_parameters) | _EVERY_ANGLE
    if config.model_type == "gemma3_text":  # one table of rotary parameters per kind of layer
        full, sliding = (config.rope_parameters[kind] for kind in ("full_attention", "sliding_attention"))
        config.rope_parameters, config.rope_local_base_freq = dict(full), sliding["rope_theta"]
    if config.model_type == "phi3":
        if config.sliding_window:  # otherwise the builder uses full attention in every layer
            config.layer_types = ["sliding_attention"] * config.num_hidden_layers
        if config.rope_parameters["rope_type"] == "default":  # otherwise the builder expects long-context factors
            config.original_max_position_embeddings = config.max_position_embeddings


class Parity(NamedTuple):
    """The difference between transformers in float32 and a graph: mean divergence in nats per token, and the largest
    absolute difference of a log-probability."""

    kl: float
    difference: float


def parity(hf_dir: Path, exported: Path) -> Parity:
    """Runs both on the same tokens, drawn with a fixed seed, and compares the last 64 positions.

    If the model has sliding attention of at most 1,024 positions, there are more tokens than its window holds. Raises
    `OptimizationFailed`.
    """
    expected, tokens = _expected(hf_dir)
    found = _log_softmax(Graph(exported)(tokens)[-_COMPARED:])
    if found.shape != expected.shape:
        raise OptimizationFailed(
            f"the graph has {found.shape[1]} tokens, the model {expected.shape[1]}", where=str(exported)
        )
    kl = np.mean(np.sum(np.exp(expected) * (expected - found), axis=-1, dtype=np.float64))
    return Parity(float(kl), float(np.abs(expected - found).max()))


def check_parity(hf_dir: Path, exported: Path) -> float:
    """Compares a model with its float32 export; returns the largest absolute difference of a log-probability.

    Raises `OptimizationFailed` with the divergence if it exceeds `MAX_PARITY_KL` or is not a number.
    """
    kl, difference = parity(hf_dir, exported)
    if not kl <= MAX_PARITY_KL:
        raise OptimizationFailed(
            f"the exported graph computes other results than the model: KL {kl:.2g} > {MAX_PARITY_KL:g}",
            where=str(hf_dir),
            fix="The onnxruntime-genai builder does not support this model; report its config.json.",
        )
    return difference


def _expected(hf_dir: Path) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Returns log-probabilities [64, vocabulary] by transformers, and the tokens [positions]."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(hf_dir, dtype=torch.float32, local_files_only=True)
    window = getattr(model.config, "sliding_window", None) or 0
    positions = max(_POSITIONS, window + _COMPARED if window <= _LONGEST_WINDOW else 0)
    positions = min(positions, model.config.max_position_embeddings)
    tokens = np.random.default_rng(0).integers(model.config.vocab_size, size=positions, dtype=np.int64)
    with torch.inference_mode():
        logits = model(torch.from_numpy(tokens[None]), logits_to_keep=_COMPARED, use_cache=False).logits[0]
    return _log_softmax(logits.numpy()), tokens


def _log_softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    import torch

    found: npt.NDArray[np.float32] = torch.log_softmax(torch.from_numpy(logits), dim=-1).numpy()
    return found
