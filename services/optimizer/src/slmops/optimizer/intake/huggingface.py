"""Reads a Hugging Face directory, and writes one from a model or from tensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from slmops.contracts.errors import InvalidModel

Matrix = npt.NDArray[np.float32]


def load(folder: Path) -> Any:
    """Loads a model in float32.

    Raises `InvalidModel` if a parameter has no weights; transformers would use random ones.
    """
    import torch
    from transformers import AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    model, report = auto.from_pretrained(
        folder,
        dtype=torch.float32,
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=False,
        output_loading_info=True,
    )
    if missing := sorted(report["missing_keys"]):
        raise InvalidModel(
            f"there are no weights for {missing[0]} and {len(missing) - 1} other parameters",
            where=str(folder),
            fix="Download the model again.",
        )
    return model


def write(folder: Path, target: Path) -> None:
    """Converts a directory to float32. Raises `InvalidModel`, and whatever transformers raises."""
    save(load(folder), folder, target)


def save(model: Any, tokenizer_from: Path, target: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_from, local_files_only=True, trust_remote_code=False)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def write_tensors(config: Any, tensors: Mapping[str, Matrix], tokenizer: Any, target: Path) -> None:
    """Writes a directory from its parts.

    Raises `InvalidModel` if `tensors` are not exactly the parameters that `config` needs.
    """
    import torch
    from safetensors.numpy import save_file
    from transformers import AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(config, trust_remote_code=False)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    needed = {name: tuple(t.shape) for name, t in model.state_dict().items() if name not in tied}
    for name in sorted(needed.keys() | tensors.keys()):
        found = tensors[name].shape if name in tensors else None
        if found != needed.get(name):
            raise InvalidModel(
                f"{name} has shape {found}, but the configuration needs {needed.get(name)}",
                where=str(target),
                fix="Convert the model again, or push its Hugging Face directory.",
            )
    config.architectures, config.dtype = [type(model).__name__], "float32"
    target.mkdir()
    config.save_pretrained(target)
    tokenizer.save_pretrained(target)
    save_file(
        {name: np.ascontiguousarray(t) for name, t in tensors.items()}, target / "model.safetensors", {"format": "pt"}
    )
