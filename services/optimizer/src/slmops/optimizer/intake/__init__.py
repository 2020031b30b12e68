"""Converts a model of any supported format to a Hugging Face directory in float32, the input of the passes."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from slmops.contracts.errors import InvalidModel, SlmopsError
from slmops.kit.modelfile import ModelFacts, adapter_base, inspect

_FLOAT32_BYTES = 4
_LIBRARIES_BYTES = 900_000_000
_FACTOR, _CALIBRATED_FACTOR = 2.7, 13.4
"""Peak resident memory in float32 copies of the weights, in addition to that of the libraries (0.65 to 0.78 GB,
measured with a model of 0.1 million parameters). Measured on SmolLM2-135M (0.54 GB): 1.2 GB to read, 1.3 GB to export,
1.7 GB for the reference, 2.1 GB to evaluate, 7.9 GB to quantize with gradients of 64 windows, which grows with windows
and vocabulary."""


def needed_bytes(facts: ModelFacts, calibrated: bool = False) -> int:
    """Returns the approximate peak memory of a job; with `calibrated`, of a job that calibrates with gradients."""
    factor = _CALIBRATED_FACTOR if calibrated else _FACTOR
    return round(_LIBRARIES_BYTES + factor * _FLOAT32_BYTES * facts.parameters)


def materialize(source: Path, target: Path) -> Path:
    """Converts `source`, in any format that `inspect` knows, and renames the complete result to `target`.

    Quantized tensors are dequantized exactly. It downloads nothing, runs no code of the model and opens no pickle.
    Raises what `inspect` raises, and `InvalidModel` if the weights do not load.
    """
    kind = inspect(source).format
    scratch = target.with_name(target.name + ".part")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        _write(kind, source, scratch)
    except SlmopsError:
        raise
    except Exception as error:
        if isinstance(error, MemoryError) or getattr(error, "errno", None):
            raise  # a problem of the machine, not of the model
        raise InvalidModel(
            f"the weights do not load: {type(error).__name__}: {str(error)[:300]}",
            where=str(source),
            fix="Check that this model works in transformers or llama.cpp, or download it again.",
        ) from error
    os.replace(scratch, target)
    return target


def _write(kind: str, source: Path, target: Path) -> None:
    from slmops.optimizer.intake import adapter, gguf, huggingface, onnx

    if kind == "gguf":
        gguf.write(source, target)
    elif kind == "onnx":
        onnx.write(source, target)
    elif kind == "hf":
        huggingface.write(source, target)
    else:
        base = target.with_name(target.name + ".base")
        try:
            adapter.merge(source, materialize(adapter_base(source), base), target)
        finally:
            shutil.rmtree(base, ignore_errors=True)
