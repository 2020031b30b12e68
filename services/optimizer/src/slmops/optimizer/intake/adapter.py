"""A LoRA adapter merged into its base by PEFT: W + B·A·alpha/r, or as the adapter's configuration says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from slmops.contracts.errors import InvalidModel
from slmops.kit.modelfile.adapter import CONFIG, UNDERSTOOD, WEIGHTS
from slmops.kit.modelfile.facts import json_object
from slmops.optimizer.intake.huggingface import load, save


def merge(adapter: Path, base: Path, target: Path) -> None:
    """Write the merged model. The tokenizer is the adapter's if it brings one. Raises `InvalidModel`."""
    wrapped = attached(adapter, base)
    save(wrapped.merge_and_unload(), adapter if (adapter / "tokenizer.json").is_file() else base, target)


def attached(adapter: Path, base: Path) -> Any:
    """PEFT's model of both. Raises `InvalidModel`.

    Only what decides the arithmetic is taken from the adapter's configuration: PEFT would also import modules that it
    names, or fetch what it points to.
    """
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
    from safetensors.torch import load_file

    said = json_object(adapter / CONFIG)
    wrapped = get_peft_model(load(base), LoraConfig(**{key: said[key] for key in UNDERSTOOD if key in said}))
    report: Any = set_peft_model_state_dict(wrapped, load_file(adapter / WEIGHTS))
    if strange := sorted(report.unexpected_keys) + sorted(key for key in report.missing_keys if "lora_" in key):
        raise InvalidModel(
            f"adapter_config.json and {WEIGHTS} do not agree about {strange[0]} and {len(strange) - 1} others",
            where=str(adapter),
            fix="Save the adapter again: model.save_pretrained(DIRECTORY).",
        )
    return wrapped
