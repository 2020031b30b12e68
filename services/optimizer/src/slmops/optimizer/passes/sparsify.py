"""Sets weights of the layers' matrices to zero, equally many per row. Storage stays dense: no gain in size or speed.

Wanda: Sun et al. 2023, "A simple and effective pruning approach for large language models".
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from slmops.optimizer.passes import Context, Params, decoder

if TYPE_CHECKING:
    import torch

_GROUP, _ZEROS = 4, 2  # the pattern 2:4


class Sparsify(Params):
    pattern: Literal["unstructured", "2:4"] = Field(
        default="unstructured", description="2:4: two zeros in every group of four neighbours of a row"
    )
    share: float = Field(default=0.5, gt=0, lt=1, description="Share of zeros; must be 0.5 for 2:4")
    method: Literal["wanda", "magnitude"] = Field(
        default="wanda",
        description="Weights to set to zero: magnitude, the smallest; wanda, the smallest products of the weight and "
        "the norm of its input on calibration text",
    )
    tokens: int = Field(default=16384, ge=256, description="Calibration tokens for wanda")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.pattern == "2:4" and self.share != _ZEROS / _GROUP:
            raise ValueError(f"the pattern 2:4 needs a share of 0.5, not {self.share:g}")
        return self


def run(given: Path, out: Path, params: Sparsify, context: Context) -> None:
    """Runs the pass. Raises `UnsupportedArchitecture`."""
    model = decoder.load(given)
    layers = decoder.decoder_layers(model)
    walk = decoder.Walk(model, decoder.calibration(given, context, params.tokens)) if params.method == "wanda" else None
    for number, layer in enumerate(layers):
        context.tell("making zeros", number / len(layers))
        _thin(layer, params, None if walk is None else walk.lengths(layer, number))
        if walk is not None:
            walk.hidden = walk.through(layer, number)  # measure the next layer on its real inputs
    decoder.save(model, given, out)


def _thin(layer: torch.nn.Module, params: Sparsify, lengths: dict[str, torch.Tensor] | None) -> None:
    import torch

    for name, part in layer.named_modules():
        if isinstance(part, torch.nn.Linear):
            score = part.weight.data.abs() if lengths is None else part.weight.data.abs() * lengths[name]
            part.weight.data[_least(score, params)] = 0


def _least(score: torch.Tensor, params: Sparsify) -> torch.Tensor:
    """Returns a mask [rows, columns] of the lowest scores per row or group of four; excess columns are not masked."""
    import torch

    rows, columns = score.shape
    mask = torch.zeros_like(score, dtype=torch.bool)
    size = _GROUP if params.pattern == "2:4" else columns
    groups = score[:, : columns // size * size].reshape(rows, -1, size)
    least = groups.argsort(dim=-1, stable=True)[..., : round(size * params.share)]
    mask[:, : columns // size * size] = torch.zeros_like(groups, dtype=torch.bool).scatter(-1, least, True).flatten(1)
    return mask
