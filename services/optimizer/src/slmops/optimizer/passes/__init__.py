"""The passes that a recipe may name: one file each, one function each, and what it takes and gives.

float    a Hugging Face directory in float32
coded    `model/`, a float directory, and `codes.safetensors`: some of its matrices as integer codes on grids
variant  an onnxruntime-genai folder: what a package is made of
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

Form = Literal["float", "coded", "variant"]
Tokens = npt.NDArray[np.int64]


class Params(BaseModel):
    """A pass's parameters. A name that it does not know is refused: a typing error must not become a default."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @property
    def calibrated(self) -> bool:
        """Whether the pass reads calibration text, so that its output depends on it."""
        return True


@dataclass(frozen=True)
class Context:
    """What a pass may use besides its input."""

    reference: Path
    """The version itself as a float32 Hugging Face directory: the teacher of a distillation."""
    export: Callable[[Path], Path]
    """Float directory → its onnxruntime-genai folder in float32, made once."""
    calibration: Callable[[], Tokens]
    """Calibration tokens [windows, positions]; never those of an evaluation text."""
    seed: int
    tell: Callable[[str, float], None]
    """Progress for a person: what is happening, and the share of this pass that is done."""
    predecessor: Path | None = None
    """The genai folder of the variant that is replaced, if the job knows one."""
    adapter: Path | None = None
    """The LoRA as PEFT wrote it, with its base in `base`, if the version is one. `reference` is both merged."""
    clock_s: Callable[[], float] = time.monotonic
    """Seconds of a clock that never goes back, for budgets of time."""


class Function(Protocol):
    """Writes `out`, which does not exist yet; it may leave it incomplete when it raises or is killed."""

    def __call__(self, given: Path, out: Path, params: Any, context: Context) -> None: ...


@dataclass(frozen=True)
class Pass:
    """`takes` the form that its input may have, `gives` that of its output."""

    takes: Form
    gives: Form
    params: type[Params]
    run: Function


def passes() -> Mapping[str, Pass]:
    """Every pass by name."""
    from slmops.optimizer.passes import (
        anchor,
        build,
        distill,
        pack,
        prune_depth,
        prune_heads,
        prune_vocabulary,
        prune_width,
        quantize,
        sparsify,
    )

    return {
        "prune-depth": Pass("float", "float", prune_depth.PruneDepth, prune_depth.run),
        "prune-width": Pass("float", "float", prune_width.PruneWidth, prune_width.run),
        "prune-heads": Pass("float", "float", prune_heads.PruneHeads, prune_heads.run),
        "prune-vocabulary": Pass("float", "float", prune_vocabulary.PruneVocabulary, prune_vocabulary.run),
        "sparsify": Pass("float", "float", sparsify.Sparsify, sparsify.run),
        "distill": Pass("float", "float", distill.Distill, distill.run),
        "quantize": Pass("float", "coded", quantize.Quantize, quantize.run),
        "pack": Pass("coded", "variant", pack.Pack, pack.run),
        "anchor": Pass("float", "variant", anchor.Anchor, anchor.run),
        "build": Pass("float", "variant", build.Build, build.run),
    }
