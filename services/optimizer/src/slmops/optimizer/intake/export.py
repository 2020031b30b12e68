"""A float32 Hugging Face directory as an onnxruntime-genai folder, and the proof that both compute the same."""

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

MAX_PARITY_KL = 1e-4
"""In nats per token. Float32 in another order of operations gives 1e-9, int8 weights 5e-3, a wrong angle more still:
in between lies nothing that a correct export can be."""
_POSITIONS, _COMPARED = 256, 64
_LONGEST_WINDOW = 1024  # of sliding attention; a longer one is not filled: logits for it would take gigabytes


def export(hf_dir: Path, out: Path) -> Path:
    """Write the float32 genai folder `out`: model.onnx, model.onnx.data, genai_config.json and the tokenizer.

    It appears complete or not at all. The builder prints, adds to `sys.path`, and takes several times the model's
    memory. Raises `OptimizationFailed`.
    """
    return build(hf_dir, out, "fp32", {})


def build(hf_dir: Path, out: Path, precision: str, options: Mapping[str, str]) -> Path:
    """As `export`, by the onnxruntime-genai builder's `--precision` and `--extra_options`."""
    from onnxruntime_genai.models.builder import create_model, parse_extra_options

    scratch, cache = out.with_name(out.name + ".part"), out.with_name(out.name + ".cache")
    shutil.rmtree(scratch, ignore_errors=True)
    place = ("", str(hf_dir), str(scratch), precision, "cpu", str(cache))
    try:
        parsed = parse_extra_options(*place, [f"{key}={value}" for key, value in options.items()])
        _as_the_builder_reads(parsed["hf_details"]["hf_config"])
        create_model(*place, **parsed)
    except Exception as error:
        if isinstance(error, MemoryError) or getattr(error, "errno", None):
            raise  # the machine's fault, not the model's
        raise OptimizationFailed(
            f"the {precision} build failed: {type(error).__name__}: {str(error)[:300]}",
            where=str(hf_dir),
            fix="Report the model's config.json.",
        ) from error
    finally:
        shutil.rmtree(cache, ignore_errors=True)
    os.replace(scratch, out)
    return out


def _as_the_builder_reads(config: Any) -> None:
    """The builder 0.18 knows two configurations as transformers wrote them before version 5."""
    if config.model_type == "gemma3_text":  # one table of rotary parameters per kind of layer
        full, sliding = (config.rope_parameters[kind] for kind in ("full_attention", "sliding_attention"))
        config.rope_parameters, config.rope_local_base_freq = dict(full), sliding["rope_theta"]
    if config.model_type == "phi3":
        if config.sliding_window:  # else every layer attends to everything
            config.layer_types = ["sliding_attention"] * config.num_hidden_layers
        if config.rope_parameters["rope_type"] == "default":  # else it looks for factors of longer contexts
            config.original_max_position_embeddings = config.max_position_embeddings


class Parity(NamedTuple):
    """Between transformers in float32 and a graph: mean divergence in nats per token, and the largest absolute
    difference of a log-probability."""

    kl: float
    difference: float


def parity(hf_dir: Path, exported: Path) -> Parity:
    """Both read the same tokens, drawn with a fixed seed, and the last 64 positions are compared.

    With sliding attention of at most 1,024 positions they are more than a window holds. Raises `OptimizationFailed`.
    """
    expected, tokens = _expected(hf_dir)
    found = _log_softmax(Graph(exported)(tokens)[-_COMPARED:])
    if found.shape != expected.shape:
        raise OptimizationFailed(
            f"the graph knows {found.shape[1]} tokens, the model {expected.shape[1]}", where=str(exported)
        )
    kl = np.mean(np.sum(np.exp(expected) * (expected - found), axis=-1, dtype=np.float64))
    return Parity(float(kl), float(np.abs(expected - found).max()))


def check_parity(hf_dir: Path, exported: Path) -> float:
    """The largest absolute difference of a log-probability between a model and its float32 export, as `parity` has it.

    Raises `OptimizationFailed` naming the divergence if it is above `MAX_PARITY_KL` or not a number.
    """
    kl, difference = parity(hf_dir, exported)
    if not kl <= MAX_PARITY_KL:
        raise OptimizationFailed(
            f"the exported graph does not compute what the model does: KL {kl:.2g} > {MAX_PARITY_KL:g}",
            where=str(hf_dir),
            fix="The onnxruntime-genai builder cannot express this model; report its config.json.",
        )
    return difference


def _expected(hf_dir: Path) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Log-probabilities [64, vocabulary] by transformers, and the tokens [positions] that were read."""
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
