"""Quantizes with the onnxruntime-genai builder and its options, for comparison with the common practice."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from slmops.optimizer.intake import export
from slmops.optimizer.passes import Context, Params


class Build(Params):
    precision: Literal["fp32", "int8", "int4"] = "int4"
    options: dict[str, str] = Field(
        default={"accuracy_level": "4", "block_size": "32"}, description="The builder's --extra_options"
    )

    @property
    def calibrated(self) -> bool:
        return False


def run(given: Path, out: Path, params: Build, context: Context) -> None:
    """Runs the pass. Raises `OptimizationFailed`."""
    context.tell(f"building {params.precision}", 0.0)
    export.build(given, out, params.precision, params.options)
