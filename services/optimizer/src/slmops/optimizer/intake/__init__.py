"""A model as the passes want it: a Hugging Face directory in float32 safetensors, with tokenizer and config."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from slmops.contracts.errors import InvalidModel, SlmopsError
from slmops.kit.modelfile import ModelFacts, adapter_base, inspect

_FLOAT32_BYTES = 4
_FACTOR, _BASE_BYTES = 0, 0
"""TODO"""


def needed_bytes(facts: ModelFacts) -> int:
    return round(_BASE_BYTES + _FACTOR * _FLOAT32_BYTES * facts.parameters)


def materialize(source: Path, target: Path) -> Path:
    """Write `source`, in any format that `inspect` knows, to `target`, which appears complete or not at all.

    Quantized tensors are dequantized exactly. Nothing is fetched, no code of the model is run and no pickle is opened.
    Raises what `inspect` raises, and `InvalidModel` if the weights do not make a model.
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
            raise  # the machine's fault, not the model's
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
