"""Matrices as integer codes on grids: `weight = (code - zero) * scale`, one scale and zero per block of a row.

That is what ONNX Runtime's MatMulNBits and GatherBlockQuantized compute with, so a matrix in this form is packed
without another rounding. The kernels take float32 scales; on the disk they need half or a quarter of that.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

CODES_FILE = "codes.safetensors"
MODEL_FOLDER = "model"
PARTS = ("codes", "scale_codes", "steps", "zeros")


@dataclass(frozen=True)
class Coded:
    """`codes` and `zeros` are uint8 [rows, columns] and [rows, columns / block].

    A block's scale is `scale_codes` · `steps`: uint8 [rows, columns / block] and float16 [rows], or float16 and ones.
    """

    codes: npt.NDArray[np.uint8]
    scale_codes: npt.NDArray[np.uint8] | npt.NDArray[np.float16]
    steps: npt.NDArray[np.float16]
    zeros: npt.NDArray[np.uint8]
    bits: int

    @property
    def block(self) -> int:
        return int(self.codes.shape[1] // self.zeros.shape[1])

    @property
    def scales(self) -> npt.NDArray[np.float32]:
        """[rows, columns / block]"""
        return self.scale_codes.astype(np.float32) * self.steps.astype(np.float32)[:, None]

    def weights(self) -> npt.NDArray[np.float32]:
        """[rows, columns], as the kernels compute with them."""
        rows, columns = self.codes.shape
        shifted = self.codes.reshape(rows, -1, self.block).astype(np.float32) - self.zeros[..., None]
        return (shifted * self.scales[..., None]).reshape(rows, columns)


def save(folder: Path, coded: Mapping[str, Coded]) -> None:
    """Write `codes.safetensors`; keys are parameter names of the Hugging Face model."""
    from safetensors.numpy import save_file

    tensors = {f"{name}.{part}": getattr(c, part) for name, c in coded.items() for part in PARTS}
    save_file(tensors, folder / CODES_FILE, {"bits": json.dumps({name: c.bits for name, c in coded.items()})})


def load(folder: Path) -> dict[str, Coded]:
    from safetensors import safe_open

    with safe_open(folder / CODES_FILE, "np") as file:
        widths: dict[str, int] = json.loads(file.metadata()["bits"])
        return {
            name: Coded(**{part: file.get_tensor(f"{name}.{part}") for part in PARTS}, bits=bits)
            for name, bits in widths.items()
        }
