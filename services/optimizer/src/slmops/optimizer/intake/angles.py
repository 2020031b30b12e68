"""Recovers the rotary embedding's parameters from its angles.

Angles are inverse frequencies in radians per position, [head size / 2], the fastest first.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from slmops.contracts.errors import UnsupportedArchitecture

Angles = npt.NDArray[np.floating[Any]]
# Llama 3.1, 3.2 and 3.3 differ only in `factor`: https://huggingface.co/docs/transformers/internal/rope_utils
_LOW, _HIGH, _ORIGINAL_POSITIONS = 1.0, 4.0, 8192


def default(theta: float, head_size: int) -> Angles:
    return theta ** (-np.arange(0, head_size, 2, dtype=np.float64) / head_size)


def of_table(cosines: Angles, sines: Angles) -> dict[str, Any]:
    """Returns the `parameters` of tables [positions, head size / 2] in float32 or float16.

    Each angle is read at the position where it is about one radian, because a float16 near zero has too few digits.
    """
    columns = np.arange(cosines.shape[1])
    rough = np.arctan2(sines[1].astype(np.float64), cosines[1].astype(np.float64))
    places = np.clip(1 / np.maximum(rough, 1e-9), 1, len(cosines) - 1).astype(int)
    found = np.arctan2(sines[places, columns].astype(np.float64), cosines[places, columns].astype(np.float64)) / places
    short = cosines.dtype == np.float16
    index = len(found) // 4  # fast enough to be unaffected by scaling, and slow enough to distinguish thetas
    theta = found[index] ** (-len(found) / index)
    return parameters(found, float(f"{theta:.{2 if short else 5}g}"), 1e-2 if short else 1e-4)


def parameters(found: Angles, theta: float, tolerance: float = 1e-4) -> dict[str, Any]:
    """Returns the `rope_parameters` of a configuration that gives `found` within a relative `tolerance`.

    Raises `UnsupportedArchitecture` if the angles are neither plain nor scaled as in Llama 3.
    """
    plain = default(theta, 2 * len(found))
    if np.allclose(found, plain, rtol=tolerance):
        return {"rope_type": "default", "rope_theta": theta}
    factor = float(f"{plain[-1] / found[-1]:.3g}")
    if np.allclose(found, _llama3(plain, factor), rtol=tolerance):
        return {
            "rope_type": "llama3",
            "rope_theta": theta,
            "factor": factor,
            "low_freq_factor": _LOW,
            "high_freq_factor": _HIGH,
            "original_max_position_embeddings": _ORIGINAL_POSITIONS,
        }
    raise UnsupportedArchitecture(
        "the model's rotary embedding is scaled in an unknown way", fix="Push the model's Hugging Face directory."
    )


def _llama3(plain: Angles, factor: float) -> Angles:
    """Divides slow angles by `factor`, keeps fast ones, and interpolates between them."""
    turns = plain * _ORIGINAL_POSITIONS / (2 * np.pi)
    share = np.clip((turns - _LOW) / (_HIGH - _LOW), 0, 1)
    scaled: Angles = plain * (share + (1 - share) / factor)
    return scaled
