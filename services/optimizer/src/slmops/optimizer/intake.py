"""A model file as the builder wants it: a Hugging Face directory in float32 safetensors, with tokenizer and config."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from slmops.contracts.errors import InvalidModel
from slmops.kit.modelfile import inspect


def materialize(source: Path, target: Path) -> Path:
    """Write `source` (GGUF file or Hugging Face directory) to `target`, which appears complete or not at all.

    Quantized GGUF tensors are dequantized exactly. Nothing is fetched, no code of the model is run and no pickle is
    opened. Raises what `inspect` raises, and `InvalidModel` if the weights do not make a model.
    """
    facts = inspect(source)
    scratch = target.with_name(target.name + ".part")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        if facts.format == "gguf":
            with _memoized_gguf():
                _convert(source.parent, scratch, gguf_file=source.name)
        else:
            _convert(source, scratch)
    except Exception as error:
        if isinstance(error, MemoryError) or getattr(error, "errno", None):
            raise  # the machine's fault, not the model's
        raise InvalidModel(
            f"the weights do not load: {type(error).__name__}: {str(error)[:300]}",
            where=str(source),
            fix="Check that this file works in transformers or llama.cpp, or download it again.",
        ) from error
    os.replace(scratch, target)
    return target


def _convert(folder: Path, target: Path, **gguf: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False, **gguf}
    tokenizer = AutoTokenizer.from_pretrained(folder, **where)
    if gguf:  # without it transformers keeps the blocks packed, and cannot save them
        where["quantization_config"] = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True, **where)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


@contextmanager
def _memoized_gguf() -> Iterator[None]:
    """Parse the header once. transformers 5.23 does it three times, and maps names per module: 12 s of 21 for 135M."""
    import gguf

    originals = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    try:
        for name, original in originals.items():
            setattr(gguf, name, functools.lru_cache(original))
        yield
    finally:
        for name, original in originals.items():
            setattr(gguf, name, original)
