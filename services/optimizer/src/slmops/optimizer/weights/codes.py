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
    """A coded matrix: `codes` are uint8 [rows, columns], `zeros` uint8 [rows, blocks].

    There are ⌈columns / block⌉ blocks in a row; the last one may be shorter. A block's scale is `scale_codes` ·
    `steps`. `scale_codes` [rows, blocks] are uint8 and `steps` [rows] float16; or `scale_codes` are float16 and `steps`
    are ones.
    """

    codes: npt.NDArray[np.uint8]
    scale_codes: npt.NDArray[np.uint8] | npt.NDArray[np.float16]
    steps: npt.NDArray[np.float16]
    zeros: npt.NDArray[np.uint8]
    bits: int
    block: int

    @property
    def scales(self) -> npt.NDArray[np.float32]:
        """The scales [rows, blocks]."""
        return self.scale_codes.astype(np.float32) * self.steps.astype(np.float32)[:, None]

    def weights(self) -> npt.NDArray[np.float32]:
        """Returns the weights [rows, columns] with which the kernels compute."""
        rows, columns = self.codes.shape
        shifted = self.in_blocks().astype(np.float32) - self.zeros[..., None]
        return (shifted * self.scales[..., None]).reshape(rows, -1)[:, :columns]

    def in_blocks(self) -> npt.NDArray[np.uint8]:
        """Returns the codes as [rows, blocks, block], a shorter last block filled up with its zero."""
        missing = -self.codes.shape[1] % self.block
        if not missing:
            return self.codes.reshape(len(self.codes), -1, self.block)
        filled = np.concatenate([self.codes, np.repeat(self.zeros[:, -1:], missing, axis=1)], axis=1)
        return filled.reshape(len(self.codes), -1, self.block)


def save(folder: Path, coded: Mapping[str, Coded]) -> None:
    """Writes `codes.safetensors`; keys are parameter names of the Hugging Face model."""
    from safetensors.numpy import save_file

    tensors = {f"{name}.{part}": getattr(c, part) for name, c in coded.items() for part in PARTS}
    widths = {name: [c.bits, c.block] for name, c in coded.items()}
    save_file(tensors, folder / CODES_FILE, {"widths": json.dumps(widths)})


def load(folder: Path) -> dict[str, Coded]:
    from safetensors import safe_open

    with safe_open(folder / CODES_FILE, "np") as file:
        widths: dict[str, tuple[int, int]] = json.loads(file.metadata()["widths"])
        return {
            name: Coded(**{part: file.get_tensor(f"{name}.{part}") for part in PARTS}, bits=bits, block=block)
            for name, (bits, block) in widths.items()
        }
