"""Rotary angles back to the parameters that they were made from.

`inverse frequencies` are radians per position, [head size / 2], the fastest first.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from slmops.contracts.errors import UnsupportedArchitecture

Angles = npt.NDArray[np.floating[Any]]
# Llama 3.1, 3.2 and 3.3 differ in `factor` alone: https://huggingface.co/docs/transformers/internal/rope_utils
_LOW, _HIGH, _ORIGINAL_POSITIONS = 1.0, 4.0, 8192


def default(theta: float, head_size: int) -> Angles:
    return theta ** (-np.arange(0, head_size, 2, dtype=np.float64) / head_size)


def of_table(cosines: Angles, sines: Angles) -> dict[str, Any]:
    """`parameters` of tables [positions, head size / 2] in float32 or float16.

    An angle is read where it is about one radian: near zero a float16 holds too few digits of it.
    """
    columns = np.arange(cosines.shape[1])
    rough = np.arctan2(sines[1].astype(np.float64), cosines[1].astype(np.float64))
    places = np.clip(1 / np.maximum(rough, 1e-9), 1, len(cosines) - 1).astype(int)
    found = np.arctan2(sines[places, columns].astype(np.float64), cosines[places, columns].astype(np.float64)) / places
    short = cosines.dtype == np.float16
    pace = len(found) // 4  # fast enough for no scaling to touch it, and slow enough to tell thetas apart
    theta = found[pace] ** (-len(found) / pace)
    return parameters(found, float(f"{theta:.{2 if short else 5}g}"), 1e-2 if short else 1e-4)


def parameters(found: Angles, theta: float, tolerance: float = 1e-4) -> dict[str, Any]:
    """`rope_parameters` of a configuration that gives `found` within a relative `tolerance`.

    Raises `UnsupportedArchitecture` if they are neither plain nor scaled as Llama 3's are.
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
        "its positions are scaled in an unknown way", fix="Give the model's Hugging Face directory."
    )


def _llama3(plain: Angles, factor: float) -> Angles:
    """Slow angles are divided by `factor`, fast ones stay, and between them it is a mixture."""
    turns = plain * _ORIGINAL_POSITIONS / (2 * np.pi)
    share = np.clip((turns - _LOW) / (_HIGH - _LOW), 0, 1)
    scaled: Angles = plain * (share + (1 - share) / factor)
    return scaled
