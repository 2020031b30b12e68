"""Checks how a model scales its rotary embedding: what cannot be exported exactly is refused before the upload."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slmops.contracts.errors import UnsupportedArchitecture
from slmops.kit.modelfile.facts import damaged

_PLAIN = frozenset({"default"})
SCALINGS: Mapping[str, frozenset[str]] = {
    "llama": _PLAIN | {"linear", "llama3"},
    "qwen2": _PLAIN | {"linear"},
    "qwen3": _PLAIN | {"linear"},
    "gemma3_text": _PLAIN,
    "phi3": _PLAIN,
}
"""Architecture as in config.json → the kinds of scaling whose export computes the same as the model."""
_NUMBERS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
"""Kind → fields that must be positive numbers."""


def check_rope(architecture: str, config: Mapping[str, Any], where: Path) -> None:
    """Checks the scaling in a config.json. Raises `UnsupportedArchitecture`, `InvalidModel`.

    transformers 5 writes `rope_parameters`, for Gemma one object per kind of layer; earlier releases `rope_scaling`.
    """
    for name in ("rope_parameters", "rope_scaling"):
        found = config.get(name) or {}
        if not isinstance(found, dict):
            raise damaged(f"config.json has {name} = {str(found)[:50]!r}, not an object", where)
        inner = [part for part in found.values() if isinstance(part, dict)]
        for part in inner or [found]:
            check_scaling(architecture, part, where)


def check_scaling(architecture: str, scaling: Mapping[str, Any], where: Path) -> None:
    """Checks one kind of layer. Raises `UnsupportedArchitecture`, `InvalidModel`."""
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind not in SCALINGS[architecture]:
        raise UnsupportedArchitecture(
            f"a {architecture} model with rotary scaling {kind!r} is not supported",
            where=str(where),
            fix=f"Use a model with one of: {', '.join(sorted(SCALINGS[architecture]))}.",
        )
    for name in (*_NUMBERS[kind], *(["rope_theta"] if "rope_theta" in scaling else [])):
        number = scaling.get(name)
        if isinstance(number, bool) or not isinstance(number, int | float) or not 0 < number < math.inf:
            raise damaged(f"the rotary scaling {kind!r} has {name} = {number!r}, not a positive number", where)
