"""The passes of recipes, one file and one function each. A pass reads and writes one of three kinds of model.

float    a Hugging Face directory in float32
coded    `model/`, a float directory, and `codes.safetensors`: some of its matrices as integer codes on grids
variant  an onnxruntime-genai folder, from which a package is made
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
    """The parameters of a pass. Unknown names are refused, because a typo must not silently select a default."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @property
    def calibrated(self) -> bool:
        """Whether the output of the pass depends on the calibration text."""
        return True


@dataclass(frozen=True)
class Context:
    """The data and functions that a pass may use besides its input."""

    reference: Path
    """The version itself as a float32 Hugging Face directory; the teacher of a distillation."""
    export: Callable[[Path], Path]
    """Exports a float directory as an onnxruntime-genai folder in float32; the result is cached."""
    calibration: Callable[[], Tokens]
    """Returns calibration tokens [windows, positions]; they never come from an evaluation text."""
    seed: int
    tell: Callable[[str, float], None]
    """Reports progress: a text for people, and the share of this pass that is done."""
    predecessor: Path | None = None
    """The genai folder of the predecessor's variant, if there is one."""
    adapter: Path | None = None
    """The LoRA in PEFT's format with its base in `base`, if the version is a LoRA. `reference` is the merged model."""
    clock_s: Callable[[], float] = time.monotonic
    """A monotonic clock in seconds, for time budgets."""


class Function(Protocol):
    """Runs a pass on `given` and writes `out`, which must not exist. After an error `out` may be incomplete."""

    def __call__(self, given: Path, out: Path, params: Any, context: Context) -> None: ...


@dataclass(frozen=True)
class Pass:
    """A pass: `takes` is the kind of model that it reads, `gives` the kind that it writes."""

    takes: Form
    gives: Form
    params: type[Params]
    run: Function


def passes() -> Mapping[str, Pass]:
    """Returns every pass by name."""
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
