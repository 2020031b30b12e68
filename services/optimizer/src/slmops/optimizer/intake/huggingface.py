"""Reads a Hugging Face directory, and writes one from a model or from tensors."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from slmops.contracts.errors import InvalidModel, UnsupportedArchitecture
from slmops.kit.modelfile.facts import json_object

Matrix = npt.NDArray[np.float32]


def load(folder: Path) -> Any:
    """Loads a model in float32.

    Raises `InvalidModel` if a parameter has no weights, for which transformers would use random ones, or a weight is
    not finite, and `UnsupportedArchitecture` for a tensor that transformers would drop.
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
    if strange := sorted(report["unexpected_keys"]):
        raise UnsupportedArchitecture(
            f"{strange[0]} and {len(strange) - 1} other tensors are not part of a {type(model).__name__}",
            where=str(folder),
            fix="Correct config.json, or give another model.",
        )
    check_finite(((name, parameter.detach().numpy()) for name, parameter in model.named_parameters()), folder)
    return model


def check_finite(tensors: Iterable[tuple[str, Matrix]], where: Path) -> None:
    """Raises `InvalidModel` with the name of the first tensor that has a NaN or an infinity."""
    for name, values in tensors:
        # Cheaper than isfinite, which makes a copy: a sum is finite only if all its parts are, or it overflows.
        if not np.isfinite(values.sum(dtype=np.float64)) and not (whole := np.isfinite(values)).all():
            raise InvalidModel(
                f"{name} has {values.size - int(whole.sum()):,} values that are NaN or infinite",
                where=str(where),
                fix="Download the model again, or convert it from a checkpoint whose training did not diverge.",
            )


def write(folder: Path, target: Path) -> None:
    """Converts a directory to float32. Raises `InvalidModel`, and whatever transformers raises."""
    save(load(folder), folder, target)


def save(model: Any, tokenizer_from: Path, target: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_from, local_files_only=True, trust_remote_code=False)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    drop_tokens_beyond(target, model.get_input_embeddings().weight.shape[0])


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
    check_finite(tensors.items(), target)
    config.architectures, config.dtype = [type(model).__name__], "float32"
    target.mkdir()
    config.save_pretrained(target)
    tokenizer.save_pretrained(target)
    drop_tokens_beyond(target, config.vocab_size)
    save_file(
        {name: np.ascontiguousarray(t) for name, t in tensors.items()}, target / "model.safetensors", {"format": "pt"}
    )


def drop_tokens_beyond(folder: Path, rows: int) -> None:
    """Removes added tokens with ids beyond the `rows` of the embedding, such as the image token of Gemma's text models.

    Otherwise the runtime would fail on a text that contains one. Such a text is then made of ordinary tokens.
    """
    tokenizer = json_object(folder / "tokenizer.json")
    added = tokenizer.get("added_tokens") or []
    gone = frozenset(token["content"] for token in added if token["id"] >= rows)
    if not gone:
        return
    tokenizer["added_tokens"] = [token for token in added if token["content"] not in gone]
    _write_json(folder / "tokenizer.json", tokenizer)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).is_file():
            _write_json(folder / name, _without(json_object(folder / name), gone))


def _without(value: Any, gone: frozenset[str]) -> Any:
    """Returns JSON without the entries that name one of the tokens."""

    def names(entry: Any) -> bool:
        token = entry.get("content") if isinstance(entry, dict) else entry
        return isinstance(token, str) and token in gone

    if isinstance(value, dict):
        return {key: _without(entry, gone) for key, entry in value.items() if not names(entry)}
    return [_without(entry, gone) for entry in value if not names(entry)] if isinstance(value, list) else value


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2), encoding="utf-8")
