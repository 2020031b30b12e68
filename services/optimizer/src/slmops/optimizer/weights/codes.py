"""Matrices as integer codes on grids: `weight = (code - zero) * scale`, with one scale and zero per block of a row.

ONNX Runtime's MatMulNBits and GatherBlockQuantized compute with this form, so packing does not round again. The kernels
take float32 scales; on disk, scales take half or a quarter of that.
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
    """A coded matrix: `codes` are uint8 [rows, columns], `zeros` uint8 [rows, columns / block].

    A block's scale is `scale_codes` · `steps`. `scale_codes` [rows, columns / block] are uint8 and `steps` [rows]
    float16; or `scale_codes` are float16 and `steps` are ones.
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
        """The scales [rows, columns / block]."""
        return self.scale_codes.astype(np.float32) * self.steps.astype(np.float32)[:, None]

    def weights(self) -> npt.NDArray[np.float32]:
        """Returns the weights [rows, columns] with which the kernels compute."""
        rows, columns = self.codes.shape
        shifted = self.codes.reshape(rows, -1, self.block).astype(np.float32) - self.zeros[..., None]
        return (shifted * self.scales[..., None]).reshape(rows, columns)


def save(folder: Path, coded: Mapping[str, Coded]) -> None:
    """Writes `codes.safetensors`; keys are parameter names of the Hugging Face model."""
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
