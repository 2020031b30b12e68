"""Makes model files with typical tensors for the tests of deltas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from slmops.kit.delta import Stat, apply, by_digest, make

Array = npt.NDArray[Any]


def halves(codes: Array) -> Array:
    """Packs 4-bit codes, two per byte."""
    packed: Array = (codes[..., ::2] | (codes[..., 1::2] << 4)).astype(np.uint8)
    return packed


def tensors(seed: int = 0, rows: int = 64) -> dict[str, Array]:
    """Returns codes of 4 and 8 bits, scales, and a norm in half precision."""
    random = np.random.default_rng(seed)
    return {
        "codes4": halves(np.clip(np.rint(random.normal(7.5, 2.5, (rows, 1024))), 0, 15).astype(np.uint8)),
        "codes8": np.clip(np.rint(random.normal(128, 20, (rows, 512))), 0, 255).astype(np.uint8),
        "scales": np.abs(random.normal(0.05, 0.01, (rows, 32))).astype(np.float32),
        "norm": random.normal(1, 0.1, 512).astype(np.float16),
    }


def tuned(before: dict[str, Array], share: float = 0.005, seed: int = 1) -> dict[str, Array]:
    """Returns the tensors as after a few steps of training: some codes differ by 1, every scale differs a little."""
    random = np.random.default_rng(seed)
    after = {name: array.copy() for name, array in before.items()}
    low, high = after["codes4"] & 15, after["codes4"] >> 4
    for half in (low, high):
        changed = random.random(half.shape) < share
        half[changed] = np.clip(half[changed].astype(int) + random.choice([-1, 1], changed.sum()), 0, 15)
    after["codes4"] = (low | (high << 4)).astype(np.uint8)
    after["codes8"][random.random(after["codes8"].shape) < share] += 1
    after["scales"] *= (1 + random.normal(0, 1e-4, after["scales"].shape)).astype(np.float32)
    return after


def write(folder: Path, arrays: dict[str, Array], **texts: str) -> Path:
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file(arrays, folder / "model.safetensors")
    for name, text in texts.items():
        (folder / f"{name}.json").write_text(text)
    return folder


def made(base: Path, target: Path, scratch: Path) -> tuple[Stat, Path]:
    delta = scratch / "it.delta"
    return make(base, target, delta), delta


def applied(delta: Path, base: Path, out: Path) -> Path:
    apply(delta, by_digest(base), lambda file: out / file.path, limit_bytes=8 << 30, durable=False)
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
