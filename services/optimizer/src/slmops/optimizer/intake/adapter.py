"""Merges a LoRA adapter into its base with PEFT: W + B·A·alpha/r, or as the adapter's configuration specifies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from slmops.contracts.errors import InvalidModel
from slmops.kit.modelfile.adapter import CONFIG, UNDERSTOOD, WEIGHTS
from slmops.kit.modelfile.facts import json_object
from slmops.optimizer.intake.huggingface import load, save


def merge(adapter: Path, base: Path, target: Path) -> None:
    """Writes the merged model. Uses the adapter's tokenizer if it has one. Raises `InvalidModel`."""
    wrapped = attached(adapter, base)
    save(wrapped.merge_and_unload(), adapter if (adapter / "tokenizer.json").is_file() else base, target)


def attached(adapter: Path, base: Path) -> Any:
    """Returns PEFT's model of base and adapter. Raises `InvalidModel`.

    It uses only the fields of the adapter's configuration that determine the arithmetic: with the others, PEFT would
    import modules and download files that the configuration names.
    """
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
    from safetensors.torch import load_file

    config = json_object(adapter / CONFIG)
    wrapped = get_peft_model(load(base), LoraConfig(**{key: config[key] for key in UNDERSTOOD if key in config}))
    report: Any = set_peft_model_state_dict(wrapped, load_file(adapter / WEIGHTS))
    if strange := sorted(report.unexpected_keys) + sorted(key for key in report.missing_keys if "lora_" in key):
        raise InvalidModel(
            f"adapter_config.json and {WEIGHTS} disagree about {strange[0]} and {len(strange) - 1} other tensors",
            where=str(adapter),
            fix="Save the adapter again: model.save_pretrained(DIRECTORY).",
        )
    return wrapped
