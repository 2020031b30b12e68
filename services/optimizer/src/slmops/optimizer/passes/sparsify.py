"""Exact zeros in the layers' matrices, as many in every row. Storage stays dense: nothing gets smaller or faster.

Wanda: Sun et al. 2023, "A simple and effective pruning approach for large language models".
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from slmops.optimizer.passes import Context, Params, decoder

if TYPE_CHECKING:
    import torch

_GROUP, _ZEROS = 4, 2  # of 2:4


class Sparsify(Params):
    pattern: Literal["unstructured", "2:4"] = Field(
        default="unstructured", description="2:4: two zeros in every four neighbours of a row"
    )
    share: float = Field(default=0.5, gt=0, lt=1, description="Share of zeros; of 2:4 always a half")
    method: Literal["wanda", "magnitude"] = Field(
        default="wanda",
        description="Which weights go: magnitude, the smallest; wanda, the smallest times the length of their input on "
        "calibration text",
    )
    tokens: int = Field(default=16384, ge=256, description="Calibration tokens that wanda looks at")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.pattern == "2:4" and self.share != _ZEROS / _GROUP:
            raise ValueError(f"2:4 is a share of 0.5, not of {self.share:g}")
        return self


def run(given: Path, out: Path, params: Sparsify, context: Context) -> None:
    """Raises `UnsupportedArchitecture`."""
    model = decoder.load(given)
    layers = decoder.decoder_layers(model)
    walk = decoder.Walk(model, decoder.calibration(given, context, params.tokens)) if params.method == "wanda" else None
    for number, layer in enumerate(layers):
        context.tell("making zeros", number / len(layers))
        _thin(layer, params, None if walk is None else walk.lengths(layer, number))
        if walk is not None:
            walk.hidden = walk.through(layer, number)  # the next layer is measured on what it will be fed
    decoder.save(model, given, out)


def _thin(layer: torch.nn.Module, params: Sparsify, lengths: dict[str, torch.Tensor] | None) -> None:
    import torch

    for name, part in layer.named_modules():
        if isinstance(part, torch.nn.Linear):
            score = part.weight.data.abs() if lengths is None else part.weight.data.abs() * lengths[name]
            part.weight.data[_least(score, params)] = 0


def _least(score: torch.Tensor, params: Sparsify) -> torch.Tensor:
    """Mask [rows, columns] of the least scores of each row, or of each four neighbours; columns left over stay."""
    import torch

    rows, columns = score.shape
    mask = torch.zeros_like(score, dtype=torch.bool)
    size = _GROUP if params.pattern == "2:4" else columns
    groups = score[:, : columns // size * size].reshape(rows, -1, size)
    least = groups.argsort(dim=-1, stable=True)[..., : round(size * params.share)]
    mask[:, : columns // size * size] = torch.zeros_like(groups, dtype=torch.bool).scatter(-1, least, True).flatten(1)
    return mask
