"""Reads a LoRA adapter by PEFT (adapter_config.json, adapter_model.safetensors) and checks that it fits its base."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slmops.contracts.errors import UnsupportedArchitecture
from slmops.kit.modelfile.facts import Facts, ModelFacts, Shape, damaged, hub_ids, json_object, value
from slmops.kit.modelfile.safetensors import read_shapes

BASE = "base"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
UNDERSTOOD = (
    "r",
    "lora_alpha",
    "target_modules",
    "exclude_modules",
    "rank_pattern",
    "alpha_pattern",
    "layers_to_transform",
    "layers_pattern",
    "use_rslora",
    "use_dora",
)
"""The fields of PEFT's configuration that determine the arithmetic of a plain LoRA (or DoRA)."""
_OTHERWISE = (
    "modules_to_save",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "lora_bias",
    "fan_in_fan_out",
)
"""Fields that would change the arithmetic and are not supported."""
_PREFIX = "base_model.model."
_MERGE = "Merge it with PEFT (model.merge_and_unload()), then use the directory that save_pretrained writes."


def is_adapter(path: Path) -> bool:
    return (path / CONFIG).is_file()


def adapter_base(folder: Path) -> Path:
    """Returns the base in `base/`: one .gguf file, or a Hugging Face directory. Raises `InvalidModel` without one."""
    if not (folder / BASE).is_dir():
        raise damaged("the adapter's base is missing", folder, "Name it: --base PATH.")
    files = sorted((folder / BASE).glob("*.gguf"))
    return files[0] if len(files) == 1 else folder / BASE


def adapter_facts(folder: Path, path: Path, base: Facts) -> Facts:
    """Returns the facts of adapter and base together. Raises `TruncatedModel`, `UnsupportedArchitecture`,
    `InvalidModel`."""
    if not base.shapes:
        raise UnsupportedArchitecture(
            "an adapter's base must be a Hugging Face directory or a GGUF file",
            where=str(path),
            fix="Give one of these as the base.",
        )
    config = json_object(folder / CONFIG)
    if config.get("peft_type") != "LORA":
        raise UnsupportedArchitecture(
            f"the adapter is a {config.get('peft_type')}, not a LORA", where=str(folder), fix=_MERGE
        )
    if not (folder / WEIGHTS).is_file():
        raise damaged(f"the directory has no {WEIGHTS}", folder, "Save the adapter again as safetensors.")
    _check_base(config, base, folder / CONFIG)
    _check_config(config, base.shapes, folder / CONFIG)
    _check_matrices(read_shapes(folder / WEIGHTS), config, base.shapes, folder)
    own = sum((folder / name).stat().st_size for name in (CONFIG, WEIGHTS))
    model = ModelFacts(base.model.architecture, base.model.parameters, own + base.model.size_bytes, "adapter")
    return Facts(model, base.shapes)


def _check_base(config: Mapping[str, Any], base: Facts, where: Path) -> None:
    """Checks that the adapter was trained on this base, as far as both say what they are.

    Matrices of another model may have the same shapes; the sum then computes nonsense. Owners are not compared, because
    the same weights are published under several.
    """
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        raise UnsupportedArchitecture(
            f"the adapter is for the task {config['task_type']}, not for CAUSAL_LM", where=str(where), fix=_MERGE
        )
    mapping = config.get("auto_mapping")
    wanted = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    if wanted and base.classes and wanted not in base.classes:
        raise damaged(
            f"the adapter was trained on a {wanted}, but its base is a {min(base.classes)}",
            where,
            "Give the right base.",
        )
    named = {_model_name(name) for name in hub_ids([config.get("base_model_name_or_path")])}
    if named and base.names and named.isdisjoint(map(_model_name, base.names)):
        raise damaged(
            f"the adapter was trained on {config['base_model_name_or_path']}, but its base is {min(base.names)}",
            where,
            "Give the right base. If both are the same weights, correct base_model_name_or_path.",
        )


def _model_name(hub_id: str) -> str:
    return hub_id.rpartition("/")[2].casefold()


def _check_config(config: Mapping[str, Any], shapes: Mapping[str, Shape], where: Path) -> None:
    rank = value(config, "r", int, where)
    if rank < 1:
        raise damaged(f"the adapter's rank is {rank}", where)
    for key in _OTHERWISE:
        if config.get(key):
            raise UnsupportedArchitecture(f"the adapter uses {key}", where=str(where), fix=_MERGE)
    targets = config.get("target_modules")
    modules = {name.removesuffix(".weight") for name in shapes}
    for target in targets if isinstance(targets, list) else []:
        if not any(module == target or module.endswith(f".{target}") for module in modules):
            raise damaged(f"the adapter is for {target!r}, which its base does not have", where, "Give the right base.")


def _check_matrices(
    matrices: Mapping[str, Shape], config: Mapping[str, Any], shapes: Mapping[str, Shape], folder: Path
) -> None:
    """Checks that every A [rank, columns] has a B [rows, rank] and that B·A has the shape of the weight that it
    changes."""
    pairs: dict[str, dict[str, Shape]] = {}
    for name, shape in matrices.items():
        module, _, part = name.removeprefix(_PREFIX).removesuffix(".weight").rpartition(".")
        if not name.startswith(_PREFIX) or part not in ("lora_A", "lora_B", "lora_magnitude_vector"):
            raise UnsupportedArchitecture(f"{name!r} is not a matrix of a LoRA", where=str(folder), fix=_MERGE)
        pairs.setdefault(module, {})[part] = shape
    if not pairs:
        raise damaged("the adapter has no matrices", folder, "Save it again: model.save_pretrained(DIRECTORY).")
    for module, parts in pairs.items():
        if problem := _misfit(
            parts, shapes.get(f"{module}.weight"), None if config.get("rank_pattern") else config["r"]
        ):
            raise damaged(f"{module}: {problem}", folder, "Give the base that the adapter was trained on.")


def _misfit(parts: Mapping[str, Shape], weight: Shape | None, rank: int | None) -> str | None:
    down, up = parts.get("lora_A"), parts.get("lora_B")
    if weight is None:
        return "the base does not have this weight"
    if down is None or up is None or len(down) != 2 or len(up) != 2 or down[0] != up[1]:
        return f"A is {down}, B is {up}"
    if rank is not None and down[0] != rank:
        return f"the rank is {down[0]}, but {CONFIG} says {rank}"
    if (up[0], down[1]) != weight:
        return f"the adapter's matrix has shape {(up[0], down[1])}, the base's has {weight}"
    return None
