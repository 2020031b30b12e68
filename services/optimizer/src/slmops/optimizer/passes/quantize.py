"""Quantizes float matrices to codes on grids, by rounding or with calibration; sensitive matrices get more bits."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from slmops.optimizer.passes import Context, Params
from slmops.optimizer.weights import codes, decoder, fisher
from slmops.optimizer.weights.gptq import gptq
from slmops.optimizer.weights.grid import Grid, fit

if TYPE_CHECKING:
    import torch

UPGRADED_BITS = 8
_SMALLEST_BLOCK = 16


class Quantize(Params):
    method: Literal["rtn", "searched", "gptq"] = Field(
        default="searched",
        description="rtn: rounds to a grid between each block's extremes; searched: uses the grid with the least "
        "squared error; gptq: as searched, then corrects each column's error in the next columns, on calibration text",
    )
    bits: Literal[4, 8] = 4
    block: Literal[16, 32, 64, 128] = Field(
        default=32,
        description="Weights that share a scale and a zero; a matrix whose columns it does not divide gets the largest "
        "smaller block that does, or blocks of 16 with a shorter last one",
    )
    scale_bits: Literal[8, 16] = Field(
        default=16, description="8: a block's scale is a multiple of 1/255 of the largest scale of its row"
    )
    symmetric: bool = Field(default=False, description="Stores no zeros: fewer bytes, lower fidelity")
    embedding_bits: Literal[4, 8] | None = Field(
        default=8, description="Bits of the embedding and of a head that is tied to it; null leaves them in float32"
    )
    upgraded_share: float = Field(
        default=0, ge=0, le=1, description="Share of the layers' weights that get 8 bits, the most sensitive first"
    )
    windows: int = Field(default=96, ge=1, description="Calibration windows for gptq")
    sensitivity_windows: int = Field(default=16, ge=1, description="Windows of these for measuring sensitivity")
    guided: bool = Field(default=True, description="gptq weights each position by the energy of its gradient")
    damping: float = Field(default=0.01, gt=0, le=1)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.upgraded_share and self.bits == UPGRADED_BITS:
            raise ValueError("upgraded_share has no effect with bits: 8")
        return self

    @property
    def calibrated(self) -> bool:
        return self.method == "gptq" or self.upgraded_share > 0


def run(given: Path, out: Path, params: Quantize, context: Context) -> None:
    """Runs the pass."""
    out.mkdir()
    (out / codes.MODEL_FOLDER).symlink_to(given.resolve(), target_is_directory=True)
    model = decoder.load(given)
    codes.save(out, _Quantizer(model, params, context).quantize())


class _Quantizer:
    def __init__(self, model: Any, params: Quantize, context: Context) -> None:
        import torch

        self._model, self._params, self._context = model, params, context
        self._modules: dict[str, torch.nn.Linear] = {
            f"{name}.weight": module
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings()
        }
        self._tokens = torch.from_numpy(context.calibration()[: params.windows]) if params.calibrated else None
        self._energies: fisher.Energies = {}
        self._upgraded: frozenset[str] = frozenset()

    def quantize(self) -> dict[str, codes.Coded]:
        import torch

        if self._params.upgraded_share or (self._params.method == "gptq" and self._params.guided):
            self._measure()
        with torch.inference_mode():
            found = self._calibrate() if self._params.method == "gptq" else self._round()
            return found | self._quantize_embedding()

    def _measure(self) -> None:
        assert self._tokens is not None
        guided = self._params.method == "gptq" and self._params.guided
        tokens = self._tokens if guided else self._tokens[: self._params.sensitivity_windows]
        self._energies, expected = fisher.measure(
            self._model,
            self._modules,
            lambda weight: self._grid(weight, self._params.bits, search=False).rounded(weight),
            tokens,
            self._params.sensitivity_windows,
            self._context.seed,
            lambda share: self._context.tell("measuring sensitivity", share / 3),
        )
        self._upgraded = most_sensitive(
            expected,
            {n: m.weight.numel() for n, m in self._modules.items()},
            self._params.upgraded_share,
        )

    def _grid(self, weight: torch.Tensor, bits: int, *, search: bool, importance: torch.Tensor | None = None) -> Grid:
        block = fitting_block(weight.shape[1], self._params.block)
        # With 8 bits a zero gains little: the loss of a block comes from its scale.
        symmetric = self._params.symmetric or bits == UPGRADED_BITS
        return fit(
            weight,
            bits,
            block,
            scale_bits=self._params.scale_bits,
            symmetric=symmetric,
            search=search,
            importance=importance,
        )

    def _bits(self, name: str) -> int:
        return UPGRADED_BITS if name in self._upgraded else self._params.bits

    def _round(self) -> dict[str, codes.Coded]:
        found = {}
        for number, (name, module) in enumerate(self._modules.items()):
            self._context.tell("rounding", number / len(self._modules))
            weight = module.weight.detach()
            grid = self._grid(weight, self._bits(name), search=self._params.method != "rtn")
            found[name] = _coded(grid, grid.codes(weight))
        return found

    def _calibrate(self) -> dict[str, codes.Coded]:
        """Quantizes layer by layer, each on the outputs of the quantized layers before it."""
        assert self._tokens is not None
        found: dict[str, codes.Coded] = {}
        inputs = decoder.LayerInputs(self._model, self._tokens)
        count = len(decoder.layers(self._model))
        for number in range(count):
            self._context.tell("calibrating", (1 + 2 * number / count) / 3)
            for group in decoder.projections(self._model, number, partial(inputs.run, number, first=True)):
                moments = self._moments(group, partial(inputs.run, number))
                for name, module in group.modules.items():
                    grid = self._grid(module.weight, self._bits(name), search=True, importance=moments[name].diagonal())
                    chosen = gptq(module.weight, moments[name], grid, self._params.damping)
                    module.weight.copy_(grid.weights(chosen))
                    found[name] = _coded(grid, chosen)
            inputs.hidden = inputs.run(number)
        return found

    def _moments(self, group: decoder.Projections, run: Any) -> dict[str, torch.Tensor]:
        """Returns the mean of x xᵀ over positions, weighted by the energy of their gradients if it was measured."""
        import torch

        names = list(group.modules)
        sums = {name: torch.zeros(group.columns, group.columns) for name in names}
        seen = 0

        def add(_: object, inputs: tuple[torch.Tensor, ...], output: object) -> None:
            nonlocal seen
            windows = inputs[0].shape[0]
            flat = inputs[0].flatten(0, 1)
            for name in names:
                energy = self._energies.get(name)
                if energy is None:
                    weighted = flat
                else:
                    share = energy[seen : seen + windows].flatten() / energy.mean()
                    weighted = flat * share[:, None]
                sums[name].addmm_(weighted.T, flat)
            seen += windows

        with decoder.hooked([group.modules[names[0]]], add):
            run()
        return {name: total / (seen * self._tokens.shape[1]) for name, total in sums.items()}  # type: ignore[union-attr]

    def _quantize_embedding(self) -> dict[str, codes.Coded]:
        if self._params.embedding_bits is None:
            return {}
        self._context.tell("embedding", 0.99)
        found = {}
        head, embedding = self._model.get_output_embeddings(), self._model.get_input_embeddings()
        parameters = {id(module.weight): module for module in (embedding, head)}  # tied modules share a parameter
        names = {id(p): name for name, p in self._model.named_parameters()}
        for key, module in parameters.items():
            weight = module.weight.detach()
            grid = self._grid(weight, self._params.embedding_bits, search=True)
            found[names[key]] = _coded(grid, grid.codes(weight))
        return found


def fitting_block(columns: int, largest: int) -> int:
    """Returns the largest block, at most `largest`, that divides `columns`; the smallest if none does.

    The kernels take powers of two from 16, and ignore what follows the last column in the last block.
    """
    block = largest
    while columns % block and block > _SMALLEST_BLOCK:
        block //= 2
    return block


def most_sensitive(expected: Mapping[str, float], sizes: Mapping[str, int], share: float) -> frozenset[str]:
    """Returns the matrices with the largest expected loss per weight, up to `share` of all weights."""
    budget = share * sum(sizes.values())
    chosen = []
    for name in sorted(expected, key=lambda name: -expected[name] / sizes[name]):
        if sizes[name] <= budget:
            budget -= sizes[name]
            chosen.append(name)
    return frozenset(chosen)


def _coded(grid: Grid, chosen: torch.Tensor) -> codes.Coded:
    import torch

    integer_scales = bool((grid.steps != 1).any())
    return codes.Coded(
        chosen.to(torch.uint8).numpy(),
        grid.scale_codes.to(torch.uint8 if integer_scales else torch.float16).numpy(),
        grid.steps.half().numpy(),
        grid.zeros.to(torch.uint8).numpy(),
        grid.bits,
        grid.block,
    )
